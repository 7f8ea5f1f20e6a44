"""One network's parameters on several parameter servers: each is a shard, and holds whole arrays of its own.

    shards ─→ who holds which: every node computes the same
    Slices ─→ what several publish, as one network
    saved  ─→ what several saved, as one network

Source: Nair et al. 2015 (Gorila, arXiv 1507.04296), after Dean et al. 2012 (DistBelief).
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddrl_bus import checkpoint
from ddrl_bus.checkpoint import Checkpoint
from ddrl_bus.errors import RefusedFileError, UsageError
from ddrl_bus.messages import Weights, parse
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.leader import LeaderSubscriber, weights_of
from ddrl_bus.topology.plan import Plan
from ddrl_bus.transport.links import Subscriber
from ddrl_bus.transport.shared import kept
from ddrl_bus.transport.wire import Array, Message


def shards(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The parameters of each of `count` shards, none without any: the largest first, each to the shard with least.

    Args:
        sizes: parameter → bytes.
    Raises:
        UsageError: there are more shards than parameters.
    """
    if not 1 <= count <= len(sizes):
        raise UsageError(f"{count} parameter servers, expected 1 to {len(sizes)}: each holds whole parameters of these")
    dealt: list[list[str]] = [[] for _ in range(count)]
    emptiest = [(0, 0, shard) for shard in range(count)]  # a heap of bytes, parameters, shard
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        held, parameters, shard = emptiest[0]
        dealt[shard].append(name)
        heapq.heapreplace(emptiest, (held + sizes[name], parameters + 1, shard))
    return dealt


def parts(weights: Mapping[str, Array], count: int) -> list[list[str]]:
    """`shards` of these parameters."""
    return shards({name: array.nbytes for name, array in weights.items()}, count)


# ── published ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Published:
    """A network, of one moment or of as many as there are shards. Its counters are those of the shard that is least
    far; `epoch` is the newest life among them."""

    weights: Weights
    epoch: int
    arrays: dict[str, Array]
    slices: list[Message]

    def kept(self) -> Published:
        """These, or newer ones that have taken their place by now, to keep: what `Slices` has may be overwritten."""
        return merged([kept(message) for message in self.slices])


class Slices:
    """An evaluator's end of `parameters`, of which each server publishes a slice, or of a learner's `weights`."""

    def __init__(self, node: Node) -> None:
        self._subscribers: list[Subscriber | LeaderSubscriber] = (
            [node.open_subscriber("parameters", server) for server in node.ports["parameters"].peers]
            if "parameters" in node.ports
            else [weights_of(node)]
        )
        self._newest: dict[int, Message] = {}
        self._news = False

    async def next(self) -> Published:
        """The newest slices, once each has come and one of them is new. Cancelled while it waits, nothing is lost."""
        while not self._news or len(self._newest) < len(self._subscribers):
            await self._listen()
        self._news = False
        return merged([self._newest[n] for n in range(len(self._subscribers))])

    async def _listen(self) -> None:
        """Wait for at least one new slice."""
        coming = [asyncio.ensure_future(subscriber.next()) for subscriber in self._subscribers]
        try:
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for n, message in enumerate(coming):
                if message.done():
                    self._newest[n], self._news = message.result(), True
                message.cancel()


def merged(slices: list[Message]) -> Published:
    """One network; it is for a confirmation once all of it is."""
    weights = [parse(Weights, message) for message in slices]
    confirm = {each.confirm for each in weights}
    counters = Weights(
        env_steps=min(each.env_steps for each in weights),
        updates=min(each.updates for each in weights),
        confirm=confirm.pop() if len(confirm) == 1 else 0,
    )
    arrays = {name: array for message in slices for name, array in message.arrays.items()}
    return Published(counters, max(message.epoch for message in slices), arrays, slices)


# ── saved ────────────────────────────────────────────────────────────────────────────────────────────────────────


def folder(run_dir: Path, node: str, count: int) -> Path:
    """Where a node that is one of `count` shards saves: a folder has one writer."""
    return run_dir / ("checkpoints" if count == 1 else f"checkpoints-{node}")


def newest(run_dir: Path, node: str, count: int) -> Checkpoint | None:
    """The newest checkpoint of one of `count` shards; None if it has none.

    Raises:
        RefusedFileError: none of them is whole, or the parameters were dealt over another number of nodes.
    """
    for other in (1, 2):
        saved = checkpoint.newest(folder(run_dir, node, other))
        if saved is None:
            continue
        if (found := saved.values.get("shards", 1)) != count:
            raise RefusedFileError(
                f"{folder(run_dir, node, other)}: saved by {found} parameter servers, expected {count}: a run goes on "
                "with as many as it began with"
            )
        return saved
    return None


def saved(plan: Plan, run_dir: Path) -> Checkpoint:
    """What a run saved last; of several parameter servers the parameters that each holds, and nothing else. The
    counters are those of the shard that is least far.

    Raises:
        RefusedFileError: one has no checkpoint that is whole.
    """
    servers = [node.name for node in plan.nodes.values() if node.kind == "param_server"] or [""]
    found = []
    for server in servers:
        if (newest_of_it := newest(run_dir, server, len(servers))) is None:
            raise RefusedFileError(f"{folder(run_dir, server, len(servers))}: no checkpoint yet")
        found.append(newest_of_it)
    if len(found) == 1:
        return found[0]
    arrays = {f"net.{name}": each.arrays[f"net.{name}"] for each in found for name in each.values["parameters"]}
    counters = {name: min(each.values[name] for each in found) for name in ("env_steps", "updates")}
    return Checkpoint(min(each.step for each in found), arrays, counters)
