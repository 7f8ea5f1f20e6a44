"""DD-PPO in processes of its own, and what happens to its workers: whoever is left trains on, and whoever comes back
trains with the others from the same parameters. That these stay equal is checked in each run, after each update."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from replicas import forms, groups, train
from runs import FOREVER, Run, assert_closed, eventually, running, still

from ddrl_bus.errors import DivergedError
from ddrl_bus.launch import run_dir
from ddrl_bus.launch.start import plan_of
from ddrl_bus.nodes.base import node_class
from ddrl_bus.transport.memory import MemoryHub

pytestmark = pytest.mark.slow

AMID = {
    "a rollout": ("actor", "time/env", "env_steps"),
    "an update": ("learner", "time/all_reduce", "time/learn"),
}
"""What → who does it, and its counters that grow with each part of that and at the end of it."""
LONG = ("algo.unroll=64", "algo.epochs=8", "algo.anneal_steps=0", "links.trajectories.rate=512KiB")
"""Rollouts and updates take so long that they can be hit, and workers that start find cores that are free."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def workers(count: int) -> tuple[str, ...]:
    return f"nodes.actor.count={count}", f"nodes.learner.count={count}"


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────


def stopped_amid(run: Run, worker: int, what: str) -> int:
    """The process of the worker, stopped when part of this is done, and not all."""
    kind, part, whole = AMID[what]
    pid = [pid for name, pid in run.lives() if name == f"learner-{worker}"][-1]

    def caught() -> bool:
        before = run.counters(f"{kind}-{worker}")
        time.sleep(0.002)  # for a part of it
        os.kill(pid, signal.SIGSTOP)
        run.until(lambda: still(pid), f"worker {worker} stopped")
        now = run.counters(f"{kind}-{worker}")
        if now[part] > before[part] and now[whole] == before[whole]:
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    run.until(caught, f"worker {worker} amid {what}")
    return pid


def killed_and_back(run: Run, ranks: tuple[int, ...], worker: int, what: str) -> tuple[int, ...]:
    """One of the group is killed; the others train on without it, and then with it. The ranks then."""
    before = groups(run, ranks[0])[-1].generation
    os.kill(stopped_amid(run, worker, what), signal.SIGKILL)
    others = tuple(rank for rank in ranks if rank != worker)
    without = forms(run, *others, after=before)
    again = forms(run, *others, worker, after=without.generation)
    assert again.updates > without.updates
    train(run, *others, worker)
    return again.ranks


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_ended(run: Run, reason: str, *, killed: int) -> None:
    closing = run.ends()
    assert (closing["reason"], closing["restarts"]) == (reason, killed)
    assert closing["ledger"]["closed"]
    assert_closed(run.books())
    seen: dict[int, tuple[int, ...]] = {}
    left = run.books().taken
    for worker in range(sum(name.startswith("learner-") for name in closing["shares"])):
        books = run.counters(f"learner-{worker}")
        left -= books["trajectories/trained"]
        left -= sum(n for name, n in books.items() if name.startswith("trajectories/evicted/"))
        generations = [group.generation for group in groups(run, worker)]
        assert generations == sorted(set(generations))
        for group in groups(run, worker):
            assert seen.setdefault(group.generation, group.ranks) == group.ranks
            assert worker in group.ranks
        assert "DivergedError" not in (run.folder / "logs" / f"learner-{worker}.log").read_text()
    assert 0 <= left <= killed  # who is killed may hold one


def test_a_killed_worker_comes_back_and_the_run_learns(folder: Path) -> None:
    words = (*workers(2), *LONG, "stop.reward=100", "stop.steps=null", "checkpoint.every=300ms")
    with running(folder, *words, topology="ddppo") as run:
        evaluator = run.pid("evaluator-0")
        os.kill(evaluator, signal.SIGSTOP)  # nobody sees what it has learnt
        ranks = forms(run, 0, 1).ranks
        train(run, *ranks)
        ranks = killed_and_back(run, ranks, 1, "an update")
        assert ranks == (0, 1)
        ranks = killed_and_back(run, ranks, 0, "a rollout")
        assert ranks == (1, 0)
        os.kill(evaluator, signal.SIGCONT)
        assert_ended(run, "reward", killed=2)


def test_a_group_of_three_loses_its_first_and_its_last(folder: Path) -> None:
    with running(folder, *workers(3), *LONG, *FOREVER, "nodes.evaluator.count=0", topology="ddppo") as run:
        ranks = forms(run, 0, 1, 2).ranks
        train(run, *ranks)
        ranks = killed_and_back(run, ranks, 0, "an update")
        assert ranks == (1, 2, 0)
        ranks = killed_and_back(run, ranks, 2, "a rollout")
        assert ranks == (1, 0, 2)
        run.process.send_signal(signal.SIGTERM)
        assert_ended(run, "stop", killed=2)


def test_a_stopped_leader_is_left_behind_and_follows(folder: Path) -> None:
    """It is not gone: all that it knows is old, and it thinks that it leads."""
    words = (*workers(2), *LONG, *FOREVER, "nodes.learner.deadline=3s", "nodes.evaluator.count=0")
    with running(folder, *words, topology="ddppo") as run:
        first = forms(run, 0, 1)
        train(run, 0, 1)
        stopped = stopped_amid(run, 0, "an update")
        without = forms(run, 1, after=first.generation)
        train(run, 1)
        os.kill(stopped, signal.SIGCONT)
        again = forms(run, 1, 0, after=without.generation)
        assert again.updates > without.updates
        train(run, 0, 1)
        run.process.send_signal(signal.SIGTERM)
        assert_ended(run, "stop", killed=0)


def test_a_group_outlives_its_controller(folder: Path) -> None:
    """The next one takes the group over as it is, and tells an evaluator that comes later who leads it."""
    with running(folder, *workers(2), *FOREVER, "links.trajectories.rate=512KiB", topology="ddppo") as run:
        forms(run, 0, 1)
        run.kill("controller-0")
        train(run, 0, 1)
        controller = run.pid("controller-0", life=2)

        def status(node: str) -> dict[str, Any]:
            """That the second controller heard."""
            nodes = (run.status() or {"nodes": {}})["nodes"]
            ours = nodes and nodes["controller-0"]["pid"] == controller
            return nodes[node] if ours else {}

        run.until(lambda: all(status(f"learner-{n}").get("state") == "running" for n in (0, 1)), "both learners heard")
        run.kill("evaluator-0")
        evaluator = run.pid("evaluator-0", life=2)
        run.until(lambda: status("evaluator-0").get("pid") == evaluator, "the evaluator's second life")
        seen = evaluations(run)
        run.until(lambda: evaluations(run) > seen, "an evaluation of the second life")
        train(run, 0, 1)
        run.process.send_signal(signal.SIGTERM)
        assert_ended(run, "stop", killed=2)
        assert [len(groups(run, worker)) for worker in (0, 1)] == [1, 1]


def evaluations(run: Run) -> int:
    log = run.folder / "logs" / "evaluator-0.log"
    return len(re.findall(r'"return=', log.read_text() if log.exists() else ""))


# ── replicas that are no longer equal ────────────────────────────────────────────────────────────────────────────


async def test_a_replica_that_differs_fails_and_says_since_when(folder: Path) -> None:
    """One bit of one weight is enough, unless it is rounded away."""
    words = (*workers(2), *FOREVER, "nodes.learner.deadline=2s", "nodes.evaluator.count=0")
    plan = plan_of("ddppo", words, probe=False, fresh=True)
    hub, stop = MemoryHub(), asyncio.Event()
    nodes: dict[str, Any] = {name: node_class(plan, name)(plan, name, folder, 1 << 32, hub) for name in plan.nodes}
    victim, update = nodes["learner-1"], 0

    def differ() -> int:
        """After which update."""
        bits = victim.algo.net.state_dict()["policy.weight"].view(torch.int32)
        bits[0, 0] ^= 1 << 22  # the highest of the fraction
        return int(victim.algo.updates)

    async def live() -> None:
        nonlocal update
        async with asyncio.TaskGroup() as tasks:
            for node in nodes.values():
                tasks.create_task(node.live(stop))
            await asyncio.to_thread(eventually, lambda: getattr(victim, "made", 0) >= 3, "training")
            update = await victim.compute(differ)

    with run_dir.sockets(plan, "local"), pytest.raises(ExceptionGroup) as raised:
        await live()
    error = raised.value.exceptions[0]
    assert isinstance(error, DivergedError)
    said = re.fullmatch(r"(\S+): .* digest (\S+) after update (\d+), expected (\S+), which (\S+) has: .*", str(error))
    assert said, error
    assert {said[1], said[5]} == {"learner-0", "learner-1"}
    assert int(said[3]) == update + 1
    assert said[2] != said[4]
