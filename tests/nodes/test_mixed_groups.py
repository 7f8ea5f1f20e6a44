"""Two groups of actors with different numbers of environments, one learner: in every wiring, all nodes in one loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rig import REPLAY, epoch, make_plan

from ddrl_bus.nodes.base import serve
from ddrl_bus.transport.ledger import audit, read
from ddrl_bus.transport.memory import MemoryHub

SLOW = ("nodes.slow.kind=actor", "links.trajectories.from=[actor, slow]")
OWN = (*SLOW, "nodes.slow.envs=3", "links.weights.to=[actor, slow, evaluator]")
ASKING = (
    *("nodes.slow.kind=actor", "nodes.slow.envs=6", "nodes.slow.groups=3", "nodes.inference.kind=inference"),
    *("links.act.kind=request", "links.act.from=[actor, slow]", "links.weights.to=[inference, evaluator]"),
)
WIRINGS = {
    "queue": OWN,
    "lock-step": (*OWN, "links.trajectories.max_lag=0", "links.trajectories.window=1", "algo.batch=11"),
    "replay": (*REPLAY, *OWN),
    "act, unrolls of actors": (*ASKING, *SLOW),
    "act, unrolls of inference": (*ASKING, "links.trajectories.from=inference"),
}


@pytest.mark.parametrize("wiring", WIRINGS)
async def test_batches_are_of_columns_whoever_sent_them(wiring: str, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *WIRINGS[wiring], "stop.steps=1500")
    hub, stop = MemoryHub(), asyncio.Event()
    async with asyncio.timeout(120), asyncio.TaskGroup() as tasks:
        for name in plan.nodes:
            tasks.create_task(serve(plan, name, run_dir=tmp_path, epoch=epoch(1), hub=hub, inline=True, stop=stop))
    books = {page.name.partition("@")[0]: read(page) for page in (tmp_path / "ledger").glob("*.page")}
    assert all(books[name]["env_steps"] > 0 for name in ("actor-0", "actor-1", "slow-0"))
    balance = audit(books.values())["trajectories"]
    assert balance.closed
    assert balance.produced == balance.accepted == balance.taken > 0
    assert (balance.refused, balance.lost) == (0, 0)
