"""A bundle of a real run: actor and learner in one process, over memory between them and ipc to the others."""

from __future__ import annotations

from pathlib import Path

from runs import FOREVER, assert_closed, running

BUNDLE = ("nodes.actor.count=1", "nodes.actor.bundle=w", "nodes.learner.bundle=w")


def test_a_killed_bundle_starts_again_as_one(tmp_path: Path) -> None:
    with running(tmp_path / "run", *FOREVER, *BUNDLE, "checkpoint.every=300ms") as run:
        assert run.pid("actor-0") == run.pid("learner-0")
        run.until(lambda: list((tmp_path / "run" / "checkpoints").iterdir()), "a checkpoint")
        run.kill("learner-0")
        assert run.pid("actor-0", life=2) == run.pid("learner-0", life=2) != run.pid("actor-0")
        run.trains_on(20, "training in the second life")
        run.until(lambda: (run.status() or {}).get("return") is not None, "an evaluation from outside")
        run.process.terminate()
        ended = run.ends()
    assert (ended["reason"], ended["restarts"]) == ("stop", 1)
    assert "w-0 was killed by SIGKILL; restart 1 of 3" in run.said
    assert_closed(run.books())
    for name in ("actor-0", "learner-0"):
        assert "state=stopped" in (tmp_path / "run" / "logs" / f"{name}.log").read_text()
