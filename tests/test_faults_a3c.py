"""A3C in processes of its own, and kill -9 of what makes it: no gradient is applied twice, and none that was
acknowledged is missing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from runs import Run, assert_closed, running

from ddrl_bus import checkpoint
from ddrl_bus.launch.start import evaluated
from ddrl_bus.nodes import shards

pytestmark = pytest.mark.slow

BUDGET = 30_000
ROWS = 16 * 20
"""Environment steps of one gradient."""
A3C = (
    *("stop.reward=null", "checkpoint.every=200ms", "nodes.evaluator.episodes=5"),
    *("algo.unroll=20", "algo.batch=16", "nodes.actor.envs=16", "nodes.actor.count=2", "nodes.learner.count=2"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def trained(run: Run, worker: int) -> int:
    return run.counters(f"learner-{worker}").get("trajectories/trained", 0)


def ended(run: Run, reason: str, servers: int = 1) -> list[checkpoint.Checkpoint]:
    """The last checkpoint of each server of a run that ends in order, after one death in it."""
    closing = run.ends()
    assert (closing["reason"], closing["restarts"]) == (reason, 1)
    assert closing["ledger"]["closed"]
    balance = run.books()
    assert_closed(balance)
    workers = [run.counters(f"learner-{n}") for n in (0, 1)]
    evicted = sum(n for books in workers for name, n in books.items() if name.startswith("trajectories/evicted/"))
    left = balance.taken - trained(run, 0) - trained(run, 1) - evicted
    assert left in (0, 1)  # a worker that is killed may hold one
    found = [shards.newest(run.folder, f"param_server-{n}", servers) for n in range(servers)]
    saved = [each for each in found if each is not None]
    assert len(saved) == servers
    assert all(each.step == each.values["updates"] * ROWS for each in saved)
    assert max(each.values["updates"] for each in saved) == closing["updates"]
    return saved


def test_a_killed_parameter_server_applies_every_gradient_once(folder: Path) -> None:
    """Its second life holds exactly what was acknowledged, and so does the other server: the numbers of the workers'
    gradients have no gap."""
    settings = (f"stop.steps={BUDGET}", "nodes.param_server.durable=true", "nodes.param_server.count=2")
    with running(folder, *A3C, *settings, topology="a3c") as run:
        run.until(lambda: min(trained(run, 0), trained(run, 1)) > 5, "training")
        run.kill("param_server-0")
        saved = ended(run, "steps", servers=2)
        assert BUDGET <= max(each.step for each in saved) < BUDGET + ROWS
        assert min(each.step for each in saved) >= BUDGET - 2 * ROWS  # one holds still when another has enough
        last = [{worker: number for worker, (_, number) in each.values["applied"].items()} for each in saved]
        for each, numbers in zip(saved, last, strict=True):
            assert sum(numbers.values()) == each.values["updates"]
        for worker in (0, 1):
            assert trained(run, worker) == max(numbers[f"learner-{worker}"] for numbers in last)
    played = evaluated(str(folder), episodes=2, seed=1)
    assert played["env_steps"] == min(each.step for each in saved)


def test_a_killed_worker_comes_back(folder: Path) -> None:
    with running(folder, *A3C, "stop.steps=null", "links.trajectories.rate=256KiB", topology="a3c") as run:
        run.until(lambda: min(trained(run, 0), trained(run, 1)) > 5, "training")
        run.kill("learner-1")
        run.pid("actor-1", life=2)
        first = trained(run, 1)  # of its first life, as far as that heard
        run.until(lambda: trained(run, 1) > first + 5, "training of its second life")
        run.process.send_signal(signal.SIGTERM)
        (saved,) = ended(run, "stop")
        applied = {worker: (life >> 32, number) for worker, (life, number) in saved.values["applied"].items()}
        assert applied == {"learner-0": (1, trained(run, 0)), "learner-1": (2, trained(run, 1) - first)}
        lost = saved.values["updates"] - trained(run, 0) - trained(run, 1)
        assert lost in (0, 1)  # it died before it heard of the last one, perhaps
