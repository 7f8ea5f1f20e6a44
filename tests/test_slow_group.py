"""Two groups of actors of different sizes, one of them on a slow host: it gives less, and stalls nobody. Counted in
unrolls of their lanes, for a slow machine is slow for both."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from runs import ENVIRON, FOREVER, Run, assert_closed, command

pytestmark = pytest.mark.slow

SLOWER = 3
"""At least. Its steps take 60 ms in its environments alone; who had to wait for it would take no more steps than it."""
GROUPS = (
    *("env.id=paced_envs:Paced-v0", "env.vectorization=sync", "algo.unroll=5", "algo.batch=5", "grace=30s"),
    *("nodes.actor.count=1", "nodes.actor.envs=4", "nodes.actor.groups=1", "nodes.evaluator.count=0"),
    *("nodes.slow.kind=actor", "nodes.slow.envs=2", "nodes.slow.groups=1", "links.trajectories.from=[actor, slow]"),
    *FOREVER,
)
WIRINGS = {
    "quickstart": ("links.weights.to=[actor, slow]",),
    "ga3c": ("links.act.from=[actor, slow]", "nodes.inference.predictors=1", "nodes.learner.trainers=1"),
}


def taken(run: Run, node: str) -> int:
    books = run.counters("learner-0").items()
    return sum(n for name, n in books if name.startswith(f"trajectories/{node}@") and name.endswith("/taken"))


@pytest.mark.parametrize("topology", WIRINGS)
def test_a_slow_group_stalls_nobody(topology: str, tmp_path: Path) -> None:
    path = os.pathsep.join([ENVIRON["PYTHONPATH"], str(Path(__file__).parent / "launch")])
    words = ("run", topology, "--json", "--run-dir", str(tmp_path / "run"), *GROUPS, *WIRINGS[topology])
    run = Run(tmp_path / "run", command(*words), ENVIRON | {"PYTHONPATH": path})
    try:
        run.until(lambda: taken(run, "actor-0") > 0 and taken(run, "slow-0") > 0, "unrolls of both")
        before = {name: taken(run, name) for name in ("actor-0", "slow-0")}
        run.until(lambda: taken(run, "slow-0") >= before["slow-0"] + 6, "some of the slow one")
        fast, slow = (taken(run, name) - before[name] for name in before)
        assert fast >= SLOWER * slow, (fast, slow)
        run.process.send_signal(signal.SIGTERM)
        assert run.ends()["restarts"] == 0
        balance = run.books()
        assert_closed(balance)
        assert balance.lost == balance.refused == 0
    finally:
        run.close()
