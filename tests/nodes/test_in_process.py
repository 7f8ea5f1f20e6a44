"""All nodes in one loop, nobody played by a test: what comes out of a run, and that it repeats exactly."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from rig import REPLAY, epoch, make_plan

from ddrl_bus import checkpoint
from ddrl_bus.nodes.base import serve
from ddrl_bus.transport.ledger import audit, read
from ddrl_bus.transport.memory import MemoryHub

LOCK_STEP = ("links.trajectories.max_lag=0", "links.trajectories.window=1")


async def trained(folder: Path, *overrides: str, life: int = 1) -> dict[str, Any]:
    """A whole run in `folder`; its result."""
    plan = make_plan(folder, *overrides)
    hub, stop = MemoryHub(), asyncio.Event()
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        for name in plan.nodes:
            node = serve(plan, name, run_dir=folder, epoch=epoch(life), hub=hub, inline=True, stop=stop)
            tasks.create_task(node, name=name)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def digest(folder: Path) -> str:
    """sha256 over all that the last checkpoint holds: network, optimiser, random numbers, counters."""
    saved = checkpoint.newest(folder / "checkpoints")
    assert saved is not None
    sha = hashlib.sha256()
    for name in sorted(saved.arrays):
        sha.update(name.encode())
        sha.update(saved.arrays[name].tobytes())
    return sha.hexdigest()


@pytest.mark.parametrize("link", [(), LOCK_STEP], ids=["free", "lock-step"])
async def test_a_run_ends_by_its_budget_and_its_books_close(tmp_path: Path, link: tuple[str, ...]) -> None:
    result = await trained(tmp_path, "stop.steps=2000", *link)
    assert (result["reason"], result["confirmed"], result["updates"]) == ("steps", True, 50)
    assert result["env_steps"] >= 2000
    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.step == 2000
    books = [read(page) for page in (tmp_path / "ledger").glob("*.page")]
    (balance,) = audit(books).values()
    assert balance.closed
    assert balance.produced == balance.accepted == balance.taken
    assert balance.refused == balance.lost == balance.duplicates == balance.queued == 0
    learner = next(book for book in books if "trajectories/trained" in book)
    evicted = sum(n for name, n in learner.items() if name.startswith("trajectories/evicted/"))
    assert balance.taken == learner["trajectories/trained"] + evicted
    assert learner["trajectories/trained"] == 50 * 2  # 8 columns of two actors with 4 environments


async def test_lock_step_repeats_exactly(tmp_path: Path) -> None:
    """The same seed gives the same bits, another seed gives others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        await trained(tmp_path / name, "stop.steps=2000", *LOCK_STEP, f"seed={seed}")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


async def test_a_second_life_goes_on_to_a_larger_budget(tmp_path: Path) -> None:
    await trained(tmp_path, "stop.steps=1000")
    result = await trained(tmp_path, "stop.steps=2000", life=2)
    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert (saved.step, result["updates"]) == (2000, 50)
    books = [read(page) for page in (tmp_path / "ledger").glob("*.page")]
    assert all(balance.closed for balance in audit(books).values())


async def test_a_run_with_a_replay_goes_on_with_what_it_kept(tmp_path: Path) -> None:
    """What was stored is what was sent, and nobody drew more than the ratio allows, over two lives of each node."""
    ratio = "nodes.replay.samples_per_insert=1", "nodes.replay.slack=40", "nodes.replay.capacity=100_000"
    shards = [tmp_path / f"checkpoints-replay-{n}" for n in (0, 1)]
    kept = 0
    for life, steps in enumerate((1000, 2000), 1):
        words = *REPLAY, *ratio, "nodes.replay.count=2", f"stop.steps={steps}"
        assert (await trained(tmp_path, *words, life=life))["reason"] == "steps"
        learnt, *saved = (checkpoint.newest(folder) for folder in (tmp_path / "checkpoints", *shards))
        assert learnt is not None
        books = [read(page) for page in (tmp_path / "ledger").glob("*.page")]
        (balance,) = audit(books).values()
        assert balance.closed
        assert balance.taken == sum(book.get("trajectories/stored", 0) for book in books)
        items = 0
        for shard in saved:
            assert shard is not None
            counts = shard.values["limiter"]
            assert counts["inserts"] == int(shard.arrays["next_id"][0])
            assert counts["samples"] <= counts["inserts"] - 20 + 40
            items += counts["inserts"]
        assert items == balance.taken * 5 * 4 > kept
        assert steps <= learnt.step <= sum(shard.values["env_steps"] for shard in saved if shard is not None)
        assert sum(book.get("samples/trained", 0) for book in books) == learnt.values["updates"] * 8
        kept = items
