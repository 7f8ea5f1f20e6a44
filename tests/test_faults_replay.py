"""Ape-X in processes of its own, and kill -9 of what keeps its experience."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import FOREVER, Run, assert_closed, running, still

from ddrl_bus import checkpoint
from ddrl_bus.checkpoint import Checkpoint
from ddrl_bus.transport import ledger

pytestmark = pytest.mark.slow

ITEMS = 16 * 8
"""Of an unroll."""
FLOOD = ("nodes.replay.samples_per_insert=null", "nodes.replay.min_size=256", "links.trajectories.window=16")
APEX = (*FOREVER, *FLOOD, "checkpoint.every=50ms", "nodes.evaluator.count=0", "algo.hidden=[16]")
"""Nobody waits for anybody: shards are as busy as they can be."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def drawn(run: Run, shard: int) -> int:
    return run.counters(f"replay-{shard}").get("items/drawn", 0)


def keeps_drawing(run: Run, shard: int) -> None:
    before = drawn(run, shard)
    run.until(lambda: drawn(run, shard) > before + 500, f"drawing from replay-{shard}")


def checkpoints(run: Run, shard: int) -> Path:
    return run.folder / f"checkpoints-replay-{shard}"


def saved(run: Run, shard: int) -> Checkpoint:
    """What a new life of it would go on from."""
    found = run.until(lambda: checkpoint.newest(checkpoints(run, shard)), f"a checkpoint of replay-{shard}")
    assert isinstance(found, Checkpoint)
    return found


def counts(found: Checkpoint) -> tuple[int, int, int, int]:
    limiter = found.values["limiter"]
    return found.values["env_steps"], int(found.arrays["next_id"][0]), limiter["inserts"], limiter["samples"]


# ── in the middle of what ────────────────────────────────────────────────────────────────────────────────────────


def storing(run: Run, shard: int) -> bool:
    """Whether it holds unrolls that it has taken and not stored."""
    books = run.counters(f"replay-{shard}")
    taken = sum(n for name, n in books.items() if name.startswith("trajectories/") and name.endswith("/taken"))
    return taken > books["trajectories/stored"]


def saving(run: Run, shard: int) -> bool:
    """Whether a checkpoint is half written."""
    return any(checkpoints(run, shard).glob("tmp-*"))


def stopped(run: Run, shard: int, amid: Callable[[Run, int], bool]) -> int:
    """The process of the shard, stopped in the middle of something."""
    pid = run.pid(f"replay-{shard}")

    def caught() -> bool:
        os.kill(pid, signal.SIGSTOP)
        run.until(lambda: still(pid), f"replay-{shard} stopped")
        if amid(run, shard):
            return True
        os.kill(pid, signal.SIGCONT)
        return False

    run.until(caught, f"replay-{shard} amid {amid.__name__}")
    return pid


def test_a_killed_shard_goes_on_from_its_checkpoint(folder: Path) -> None:
    """Killed while it is filled and drawn from: its next life counts on from what was saved, exactly."""
    with running(folder, *APEX, topology="apex") as run:
        before = {}
        run.until(lambda: min(drawn(run, 0), drawn(run, 1)) > 1_000, "drawing from both shards")
        for shard, amid in enumerate((storing, saving)):
            saved(run, shard)
            victim = stopped(run, shard, amid)
            before[shard] = counts(saved(run, shard))
            os.kill(victim, signal.SIGKILL)
        for shard in (0, 1):
            run.pid(f"replay-{shard}", life=2)
            keeps_drawing(run, shard)
        run.process.send_signal(signal.SIGTERM)
        closing = run.ends()
        assert (closing["reason"], closing["restarts"]) == ("stop", 2)
        assert closing["ledger"]["closed"]
        assert_closed(run.books())
        for shard in (0, 1):
            _, second = sorted((run.folder / "ledger").glob(f"replay-{shard}@*.page"))
            books = ledger.read(second)
            new = books["trajectories/stored"] * ITEMS
            env_steps, next_id, inserts, samples = counts(saved(run, shard))
            assert (next_id, inserts) == (before[shard][1] + new, before[shard][2] + new)
            assert samples == before[shard][3] + books["items/drawn"]
            assert 0 <= env_steps - before[shard][0] - new <= 2 * 3 * 8  # each actor's first unroll has three rows more
