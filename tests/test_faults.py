"""kill -9 of every role of a real run, and what must hold afterwards. Books are read from the ledgers of all lives."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from runs import FOREVER, Run, assert_closed, eventually, running

from ddrl_bus import checkpoint
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.transport import shared

pytestmark = pytest.mark.slow

UNTRAINED = 40.0
"""CartPole's mean return of untrained weights is below it."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def best_return(run: Run) -> float:
    status = run.status()
    return float(status["best_return"] or 0) if status else 0.0


def evaluations(run: Run) -> list[tuple[int, float]]:
    """(env steps of the learner, return) of every evaluation that the metrics hold."""
    found = []
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["return"] is not None:
            found.append((int(record["nodes"]["learner-0"].get("env_steps", 0)), float(record["return"])))
    return found


def rows(saved: checkpoint.Checkpoint) -> float:
    """Environment steps of one update."""
    return float(saved.step / saved.values["updates"])


def test_a_killed_actor_comes_back_and_the_run_is_solved(folder: Path) -> None:
    with running(folder, "stop.steps=2000000") as run:
        run.until(lambda: run.trained() > 20, "training")
        victim = run.pid("actor-1")
        os.kill(victim, signal.SIGKILL)
        run.pid("actor-1", life=2)
        ended = run.ends()
        assert (ended["reason"], ended["restarts"]) == ("reward", 1)
        assert ended["return"] >= 475
        assert "actor-1 was killed by SIGKILL; restart 1 of 3" in run.said
        balance = run.books()
        assert_closed(balance)
        assert 0 <= balance.lost <= 2 + 1  # its window, and what it wrote down and could not send
        assert balance.refused == balance.duplicates == 0
        assert ended["ledger"]["closed"]
        assert ended["ledger"]["lost"] == balance.lost
        second = run.counters("actor-1")["env_steps"]
        assert second > 0
        learner = run.counters("learner-0")
        evicted = sum(n for name, n in learner.items() if name.startswith("trajectories/evicted/"))
        assert balance.taken == learner["trajectories/trained"] + evicted


LARGE = ("algo.hidden=[144, 144]", "links.weights.precision=float32")


def test_a_killed_learner_goes_on_from_its_checkpoint(folder: Path) -> None:
    """Its weights are large enough to be shared: what the first life left in memory is of no use to anybody."""
    with running(folder, *FOREVER, *LARGE, "checkpoint.every=300ms") as run:
        run.until(lambda: best_return(run) > 2 * UNTRAINED, "learning")
        run.kill("learner-0")
        saved = checkpoint.newest(folder / "checkpoints")
        assert saved is not None
        pid = run.pid("learner-0", life=2)

        def resumed() -> bool:
            learner = (run.status() or {"nodes": {"learner-0": {}}})["nodes"]["learner-0"]
            return learner.get("pid") == pid and learner["state"] == "running" and learner["gauges"]["updates"] > 0

        run.until(resumed, "the learner's second life")
        assert run.answers()["nodes"]["learner-0"]["gauges"]["updates"] >= saved.values["updates"] > 0
        run.trains_on(100, "training after the restart")
        seen = len(evaluations(run))
        run.until(lambda: len(evaluations(run)) > seen + 1, "evaluations of the second life")
        run.process.send_signal(signal.SIGTERM)
        ended = run.ends()
        assert (ended["reason"], ended["restarts"]) == ("stop", 1)
        assert_closed(run.books())
        assert ended["ledger"]["closed"]
        after = [value for steps, value in evaluations(run) if steps > saved.step]
        assert after
        assert min(after[-2:]) > UNTRAINED
        final = checkpoint.newest(folder / "checkpoints")
        assert final is not None
        assert final.step > saved.step
        assert final.values["updates"] > saved.values["updates"]
        read = run.counters("actor-0")
        assert read["weights/value_bytes_in"] > 1 << 20
        assert read["weights/bytes_in"] == 0
        assert not list(shared.MEMORY.glob(f"{shared._owner(load_lock(folder).ipc_dir)}*"))


def test_training_survives_the_controller(folder: Path) -> None:
    with running(folder, "stop.reward=null", "stop.steps=150000") as run:
        run.until(lambda: run.trained() > 20, "training")
        before = run.counters("actor-0")["env_steps"]
        run.kill("controller-0")
        run.trains_on(20, "training without a controller")
        run.pid("controller-0", life=2)
        ended = run.ends()
        assert (ended["reason"], ended["restarts"]) == ("steps", 1)
        assert ended["return"] is not None
        steps = sum(run.counters(f"actor-{n}")["env_steps"] for n in (0, 1))
        assert ended["env_steps"] == steps > 2 * before
        saved = checkpoint.newest(folder / "checkpoints")
        assert saved is not None
        assert 150_000 <= saved.step < 150_000 + rows(saved)
        balance = run.books()
        assert_closed(balance)
        assert (balance.lost, balance.queued) == (0, 0)
        assert run.lives()[-1][0] == "controller-0"


def test_a_killed_supervisor_leaves_nobody_and_the_run_resumes(folder: Path) -> None:
    with running(folder, *FOREVER, "grace=30s") as run:
        run.until(lambda: run.trained() > 50, "training")
        assert len(run.alive()) == 5
        run.process.kill()
        eventually(lambda: not run.alive(), "nobody left behind")
        for node in ("actor-0", "actor-1", "learner-0"):
            assert "state=stopped was=draining" in (folder / "logs" / f"{node}.log").read_text()
        assert_closed(run.books())
        saved = checkpoint.newest(folder / "checkpoints")
        assert saved is not None  # the learner drained, and saved what it had learnt
        trained = run.trained()
    goal = saved.step + 20_000
    with running(folder, "--resume", str(folder), f"stop.steps={goal}") as run:
        ended = run.ends()
        assert ended["reason"] == "steps"
        assert ended["updates"] > saved.values["updates"]
        final = checkpoint.newest(folder / "checkpoints")
        assert final is not None
        assert goal <= final.step < goal + rows(saved)
        assert rows(final) == rows(saved)
        assert run.trained() > trained
        assert_closed(run.books())
        assert ended["ledger"]["closed"]


def test_everybody_signalled_at_once_drains(folder: Path) -> None:
    """As systemd does with a whole unit, or a shell with its job: in any order, nothing is lost."""
    with running(folder, *FOREVER) as run:
        run.until(lambda: run.trained() > 20, "training")
        for pid in [pid for _, pid in run.alive()] + [run.process.pid]:
            os.kill(pid, signal.SIGTERM)
        ended = run.ends(within_s=40)
        assert ended["reason"] == "stop"
        assert not run.alive()
        assert_closed(run.books())


def test_a_second_ctrl_c_kills(folder: Path) -> None:
    with running(folder, *FOREVER) as run:
        run.until(lambda: run.trained() > 20, "training")
        frozen = run.pid("learner-0")
        os.kill(frozen, signal.SIGSTOP)  # it drains for ever
        run.process.send_signal(signal.SIGINT)
        run.until(lambda: "stopping; once more to kill at once" in run.said, "the first Ctrl-C")
        run.process.send_signal(signal.SIGINT)
        run.ends(within_s=20)
        assert not run.alive()
        assert "killing every node" in run.said
        assert_closed(run.books())
