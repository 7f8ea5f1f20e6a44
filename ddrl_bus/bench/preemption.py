"""What one slow worker costs those that train in step with it, and what preemption saves: `ddrl bench preemption`.

Real runs of the topology ddppo, one after the other: WORKERS processes and a controller each, over ipc, started one by
one as `ddrl-node --name` does, for the last one is to be slow. Its environment sleeps SLOWER times as long in each step
as those of the others. They do nothing but sleep: cores hardly matter, and the least time of an update follows from the
rule. Rollouts are of UNROLL steps of one environment.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import gymnasium as gym
import numpy as np

from ddrl_bus.bench.crew import Member, crew
from ddrl_bus.bench.report import MS, PER_S, RATIO, About, Kind, Row, row
from ddrl_bus.launch import node, run_dir
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.launch.start import plan_of
from ddrl_bus.topology import Plan
from ddrl_bus.transport import ledger

WORKERS, UNROLL, STEP_S, SLOWER = 4, 64, 4e-3, 5.0
LEAST: Final = 0.25
"""Share of its rollout that a worker plays in any case: `algo.preempt_after`."""
WARM_UP: Final = 3
"""Updates."""
POLL_S: Final = 2e-3
PATIENCE_S: Final = 120.0
"""Against hangs only."""


@dataclass(frozen=True)
class Case:
    slower: float
    """times as long as the others' that the last worker's steps take"""
    preempt: float
    """share of the workers that must have played; 0: nobody is stopped"""
    workers: int = WORKERS

    @property
    def least_s(self) -> float:
        """That environments sleep for an update: a rollout, or what the last worker plays in any case."""
        return UNROLL * STEP_S * max(1.0, self.slower * (LEAST if self.preempt else 1))

    def __str__(self) -> str:
        last = f"last {self.slower:g}× slower" if self.slower > 1 else "all alike"
        return f"{self.workers} workers, {last}, preempt {self.preempt:g}"


CASES: Final = (Case(1, 0), Case(SLOWER, 0), Case(SLOWER, 0.6))


ABOUT: Final = About(
    bench="preemption",
    title="What one slow worker costs those that train in step with it, and what preemption saves",
    method=f"""Real runs of the topology ddppo, one after the other: {WORKERS} workers whose environments only
sleep, so that few cores do. In two of them the last worker's steps take {SLOWER:g} times as long; in one of these
the others may end its rollout early.""",
    reading=f"""Least is what an update takes by the rule, from the sleeping alone. The figure to look at is an
update's time; its spread is over the updates of one run. Rows are what the slow worker plays of {UNROLL}.""",
)
KINDS: Final = {
    "update": MS,
    "least": Kind("ms", ""),
    "of all alike": RATIO,
    "its rows": Kind("", ""),
    "steps": PER_S,
}


def measure(updates: int = 20, cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """A row for each case; an update is a repeat."""
    first = None
    for case in cases:
        seconds, steps = _run(case, updates)  # [updates + 1], [updates + 1, workers]
        took, played = np.diff(seconds) * 1e3, np.diff(steps, axis=0)
        first = first or float(np.median(took))
        found = [
            {"update": ms, "least": case.least_s * 1e3, "of all alike": ms / first, "its rows": rows[-1], "steps": rate}
            for ms, rows, rate in zip(took.tolist(), played.tolist(), played.sum(axis=1) / took * 1e3, strict=True)
        ]
        yield row("time of an update", str(case), found, KINDS)


def _run(case: Case, updates: int) -> tuple[Any, Any]:
    """When updates were over, and the steps that each worker had played by then."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name:
        folder = Path(name)
        plan = _plan(case, folder)
        run_dir.create(plan, path=folder, command=sys.argv, started=time.time())
        names = sorted(plan.processes)
        with run_dir.sockets(plan, "local"), crew(len(names)) as members:
            for name, member in zip(names, members, strict=True):
                member.start(_live, name, case, folder)
            moments = list(islice(_updates(folder, case.workers, members), WARM_UP, WARM_UP + updates + 1))
    seconds, steps = zip(*moments, strict=True)
    return np.array(seconds), np.array(steps)


def _updates(folder: Path, workers: int, members: Sequence[Member]) -> Iterator[tuple[float, list[int]]]:
    """After each update: the time in seconds, and the steps of each worker."""
    seen, heard = 0, time.perf_counter()
    while True:
        made, now = _count(folder, "learner-0", "trajectories/trained"), time.perf_counter()
        if made > seen:
            seen, heard = made, now
            yield now, [_count(folder, f"actor-{index}", "env_steps") for index in range(workers)]
        elif gone := next((member for member in members if member.has_answered), None):
            gone.answer()
        elif now - heard > PATIENCE_S:
            raise TimeoutError(f"no update after {PATIENCE_S:.0f} s")
        time.sleep(POLL_S)


def _count(folder: Path, name: str, what: str) -> int:
    """Of the one life of this node, from its page: it need not answer."""
    return sum(ledger.read(page).get(what, 0) for page in (folder / "ledger").glob(f"{name}@*.page"))


# ---- processes


def _plan(case: Case, folder: Path) -> Plan:
    overrides = (
        *(f"nodes.actor.count={case.workers}", f"nodes.learner.count={case.workers}", "nodes.evaluator.count=0"),
        *("nodes.actor.envs=1", "algo.batch=1", "algo.minibatches=1", "algo.epochs=1", f"algo.unroll={UNROLL}"),
        *(f"algo.preempt={case.preempt}", f"algo.preempt_after={LEAST}", "algo.anneal_steps=0"),
        *("env.id=Sleepy-v0", "stop.reward=null", "stop.steps=null"),
    )
    return _here(plan_of("ddppo", overrides, probe=False), folder)


def _here(plan: Plan, folder: Path) -> Plan:
    """Apart from what runs at the same time."""
    return replace(plan, ipc_dir=folder / "ipc")


def _live(_: Connection, name: str, case: Case, folder: Path) -> None:
    """One process of the run, with a pace of its own."""
    step_s = STEP_S * (case.slower if name == f"worker-{case.workers - 1}" else 1)
    gym.register("Sleepy-v0", lambda **_: Sleepy(step_s), max_episode_steps=200)
    code = node.run(_here(load_lock(folder), folder), name, folder)
    raise RuntimeError(f"{name} left with exit code {code}")


class Sleepy(gym.Env[Any, Any]):
    """There is nothing to see, and nothing to win."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._obs = np.zeros(4, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        time.sleep(self._step_s)
        return self._obs, 0.0, False, False, {}
