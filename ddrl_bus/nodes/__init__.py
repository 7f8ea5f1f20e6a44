"""The nodes: where bus and algorithm meet. A module is imported when a node of its kind is made."""

from __future__ import annotations

import asyncio
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ddrl_bus.topology.plan import Plan
from ddrl_bus.transport.memory import MemoryHub

if TYPE_CHECKING:
    from ddrl_bus.nodes.base import Node

KINDS: Final = {
    "actor": "Actor",
    "learner": "Learner",
    "evaluator": "Evaluator",
    "controller": "Controller",
}


def make(plan: Plan, name: str, *, run_dir: Path, epoch: int, hub: MemoryHub | None = None) -> Node:
    """One life of the node `name`. Make it inside the event loop that will run it."""
    kind = plan.nodes[name].kind
    cls: type[Node] = getattr(import_module(f"ddrl_bus.nodes.{kind}"), KINDS[kind])
    return cls(plan, name, run_dir, epoch, hub)


async def serve(
    plan: Plan, name: str, *, run_dir: Path, epoch: int, hub: MemoryHub | None = None, stop: asyncio.Event
) -> None:
    """Run one node to its end: until it drained, because the run is over or `stop` was set.

    Raises:
        Exception: the first that anything in it raised, as it was.
    """
    await make(plan, name, run_dir=run_dir, epoch=epoch, hub=hub).live(stop)
