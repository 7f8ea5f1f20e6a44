"""Actors that join a run while it trains, and leave it again: real processes on one machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runs import CALM, ENVIRON, FOREVER, PATIENCE_S, Run, assert_closed, command, running

NAMES = {"actor-1.local", "actor-2.local"}


@contextmanager
def adding(run: Run, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`ddrl-node --join RUN --add actor WORDS`."""
    argv = command("--join", str(run.folder), "--add", "actor", *words, name="ddrl_node")
    process = subprocess.Popen(argv, env=ENVIRON, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def trained_of(run: Run, node: str) -> int:
    """Unrolls of a node, over all its lives, that the learner took."""
    books = run.counters("learner-0").items()
    return sum(n for name, n in books if name.startswith(f"trajectories/{node}@") and name.endswith("/taken"))


def added(run: Run) -> dict[str, int]:
    status = run.status()
    found: dict[str, int] = status["added"] if status else {}
    return found


@pytest.mark.slow
def test_two_join_one_is_killed_they_leave_and_others_end_with_the_run(tmp_path: Path) -> None:
    with running(tmp_path / "run", *FOREVER, *CALM, "nodes.actor.count=1") as run:
        run.until(lambda: run.trained() > 5, "training")
        with adding(run, "--count", "2") as share:
            run.until(lambda: all(trained_of(run, name) > 5 for name in NAMES), "training on what they play")
            run.until(lambda: added(run) == {"here": 2, "left": 0, "lost": 0}, "word that they are here")
            assert run.answers()["nodes"].keys() >= NAMES
            run.kill("actor-1.local")
            before = trained_of(run, "actor-1.local")
            run.pid("actor-1.local", life=2)
            run.until(lambda: trained_of(run, "actor-1.local") > before + 5, "training on what its next life plays")
            share.send_signal(signal.SIGTERM)
            assert share.wait(PATIENCE_S) == 0
        run.until(lambda: added(run) == {"here": 0, "left": 2, "lost": 0}, "word that they left")
        status = run.answers()
        assert status["phase"] == "run"
        assert not NAMES & status["nodes"].keys()
        run.trains_on(20, "training without them")

        with adding(run) as last:
            run.until(lambda: trained_of(run, "actor-3.local") > 0, "a name that was nobody's")
            run.process.send_signal(signal.SIGTERM)
            ended = run.ends()
            assert last.wait(PATIENCE_S) == 0
        assert (ended["reason"], ended["restarts"]) == ("stop", 0)
        result = json.loads((run.folder / "result.json").read_text())
        assert result["added"] == {"here": 0, "left": 3, "lost": 0}
        balance = run.books()
        assert_closed(balance)
        assert balance.lost <= 2  # of the one that was killed


@pytest.mark.slow
def test_they_do_not_outlive_a_head_that_is_gone(tmp_path: Path) -> None:
    with running(tmp_path / "run", *FOREVER, *CALM, "nodes.actor.count=1") as run:
        run.until(lambda: run.trained() > 2, "training")
        patched = "import ddrl_bus.launch.local as local; local.ADDED_LOST_S = local.FAR_STATUS_S = 1.0; "
        argv = command("--join", str(run.folder), "--add", "actor", name="ddrl_node")
        argv[-5] = patched + argv[-5]
        share = subprocess.Popen(argv, env=ENVIRON, stderr=subprocess.PIPE, text=True)
        try:
            run.until(lambda: trained_of(run, "actor-1.local") > 0, "training on what it plays")
            for pid in (run.process.pid, *(pid for name, pid in run.alive() if name != "actor-1.local")):
                with contextlib.suppress(ProcessLookupError):  # one takes others along
                    os.kill(pid, signal.SIGKILL)
            _, said = share.communicate(timeout=PATIENCE_S)
            assert share.returncode == 69
            assert "the head has not answered for 1 s" in said
        finally:
            share.kill()
            share.communicate()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--add", "actor", "-t", "quickstart"), "--add GROUP goes with --join"),
        (("--add", "actor"), "give either -t TOPO or --join"),
        (("--join", "quickstart", "--add", "actor", "--name", "actor-7"), "the run itself names what is added"),
        (("--join", "quickstart", "--add", "actor", "seed=3"), "seed=3: the run's topology holds for added nodes too"),
        (("--join", "tcp://10.0.0.1", "--host", "cpu1", "--count", "2"), "give --add GROUP too"),
        (("--join", "nowhere", "--add", "actor"), "no run 'nowhere': expected a run directory, or a name under runs/"),
    ],
)
def test_what_cannot_be_meant_is_said(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    argv = command(*words, name="ddrl_node")
    ended = subprocess.run(argv, env=ENVIRON, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 64, ended.stderr
    assert said in " ".join(ended.stderr.split())
