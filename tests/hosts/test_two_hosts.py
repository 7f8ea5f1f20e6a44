"""The reference topology over tcp, on two hosts that both have its file."""

from __future__ import annotations

import os
import signal
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, running
from runs import FOREVER, Run, assert_closed

from ddrl_bus.launch import closing
from ddrl_bus.transport import ledger

LATE_S = 10.0
DOWN_S = 2.0

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


def share(cable: Cable, host: str, folder: Path, *overrides: str) -> AbstractContextManager[Run]:
    """`ddrl-node --host HOST` on that host."""
    words = ("-t", "two-hosts", "--host", host, "nodes.actor.count=2", *overrides)
    return running(cable, host, folder, *words, GPU0=ADDRESSES["gpu0"], CPU1=ADDRESSES["cpu1"])


def assert_books_agree(learner: Run, actors: Run) -> ledger.Balance:
    """What the controller heard of the other host closes the books exactly as that host's own ledgers do."""
    told = learner.books()
    pages = [ledger.read(page) for run in (learner, actors) for page in (run.folder / "ledger").glob("*.page")]
    assert ledger.audit(pages)["trajectories"] == told
    assert len(list(closing.lives(learner.folder))) == len(pages)
    assert_closed(told)
    return told


def test_the_actors_come_ten_seconds_late_and_it_is_solved(cable: Cable, tmp_path: Path) -> None:
    with share(cable, "gpu0", tmp_path / "gpu0") as learner:
        learner.pid("learner-0")
        time.sleep(LATE_S)
        with share(cable, "cpu1", tmp_path / "cpu1") as actors:
            ended = learner.ends()
            assert actors.ends() == {}  # the controller is elsewhere
            assert ended["reason"] == "reward"
            assert ended["return"] >= 475
            balance = assert_books_agree(learner, actors)
            assert balance.lost == balance.refused == balance.queued == 0
            assert ended["ledger"]["closed"]
            steps = sum(actors.counters(f"actor-{n}")["env_steps"] for n in (0, 1))
            assert ended["env_steps"] == steps
            assert {"actor-0", "actor-1", "learner-0", "evaluator-0"} <= ended["overhead"].keys()


def test_the_learner_comes_late_and_the_cable_is_pulled(cable: Cable, tmp_path: Path) -> None:
    """For two seconds nothing goes through; training goes on, and every unroll is accounted for."""
    overrides = ("stop.reward=null", "stop.steps=400000")
    with share(cable, "cpu1", tmp_path / "cpu1", *overrides) as actors:
        actors.pid("actor-0")
        time.sleep(LATE_S)
        assert actors.process.poll() is None, actors.said
        with share(cable, "gpu0", tmp_path / "gpu0", *overrides) as learner:
            learner.until(lambda: learner.trained() > 20, "training over tcp")
            cable.unplugged(DOWN_S)
            learner.trains_on(50, "training after the cable was plugged in again")
            ended = learner.ends()
            assert actors.ends() == {}
            assert (ended["reason"], ended["restarts"]) == ("steps", 0)
            assert ended["return"] > 60
            assert_books_agree(learner, actors)
            assert ended["ledger"]["closed"]


def test_a_signal_to_one_host_drains_both(cable: Cable, tmp_path: Path) -> None:
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *FOREVER) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *FOREVER) as actors,
    ):
        learner.until(lambda: learner.trained() > 20, "training over tcp")
        learner.process.send_signal(signal.SIGTERM)
        assert learner.ends()["reason"] == "stop"
        assert actors.ends() == {}
        balance = assert_books_agree(learner, actors)
        assert (balance.lost, balance.queued) == (0, 0)


def test_a_killed_actor_of_another_host_closes_the_books_exactly(cable: Cable, tmp_path: Path) -> None:
    """Its last heartbeat was older than its last unroll: the next life tells what the ledger of the dead one holds."""
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *FOREVER) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *FOREVER) as actors,
    ):
        learner.until(lambda: learner.trained() > 20, "training over tcp")
        actors.kill("actor-0")
        actors.pid("actor-0", life=2)
        learner.trains_on(50, "training after the restart")
        learner.process.send_signal(signal.SIGTERM)
        ended = learner.ends()
        assert actors.ends() == {}
        assert_books_agree(learner, actors)
        assert ended["ledger"]["closed"]
