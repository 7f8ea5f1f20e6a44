"""A learner's end of `samples`: batches out of the shards of a replay, drawn as if these were one.

    deal a batch's columns over the shards ─→ ask all at once ─→ slot, weights ─→ train ─→ new priorities
      ↑ in proportion to their mass                                                              │
      └───────────────────────── each shard's next question carries those of its items ←─────────┘

An item is drawn with the probability that its shard was dealt a column, times that within the shard (Schaul et al.
2016, arXiv 1511.05952; Horgan et al. 2018, arXiv 1803.00933). A shard that is silent, or has kept us waiting, is left
out until it says otherwise.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from ddrl_bus.algos.lazy import torch
from ddrl_bus.errors import UnreachableError
from ddrl_bus.experience import BatchSlots, Slot
from ddrl_bus.messages import Sample, Sampled, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.batches import allocator
from ddrl_bus.nodes.waiting import PATIENCE_S, Waiting
from ddrl_bus.transport.links import Client
from ddrl_bus.transport.wire import Array, Message

LOST_S: Final = 3.0
"""A shard that leaves a question unanswered for so long is lost: well above what a shard keeps a question for."""
SETTLE_S: Final = 1.0
"""How long the last priorities of a run may take."""


@dataclass(slots=True)
class Shard:
    """One replay node, as its newest answer told."""

    name: str
    client: Client
    life: int = 0
    items: int = 0
    mass: float = 0.0
    env_steps: int = 0
    waits: str = ""
    again: asyncio.Future[Message] | None = None
    """Of a lost shard: the question that is repeated until it is back."""
    priorities: list[tuple[int, Array, Array]] = field(default_factory=list)
    """(its life, ids, priorities) that it does not know yet."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Columns of a batch that one shard drew."""

    shard: Shard
    life: int
    id: Array
    probability: Array
    """among the items of all shards"""


class Samples:
    """The asking end of `samples`; to a learner what `batches.Intake` is.

    Args:
        env_steps: what the run had played when this learner's parameters were saved; default: what its shards had
            taken in when they were first asked.
    """

    rows = 0
    """Environment steps that a batch under way will add: none for sure, its items may be old."""

    def __init__(self, node: Node, env_steps: int | None = None) -> None:
        peers = node.ports["samples"].peers
        self.shards = [Shard(name, node.open_client("samples", n)) for n, name in enumerate(peers)]
        self._joins = env_steps is None
        self._uncounted = -(env_steps or 0)  # environment steps that shards took in, and no batch has counted
        self._alpha, self._beta = node.windows.alpha, node.windows.beta
        self._batch: int = node.plan.algo.batch
        self._schema = node.windows_schema
        self._sharing = _learners(node, next(iter(peers)))
        self._rng = np.random.default_rng(node.seeds(stream=1))
        self._drawn: dict[int, list[Drawn]] = {}
        self._columns = self._steps = 0  # trained on, and counted for it
        self._ledger, self._log = node.ledger, node.log
        self._wait = Waiting(node.log)
        self._unpack = clock(node.ledger, "unpack")

    def allocate(self, slots: int, device: torch.device) -> list[Slot]:
        """Memory for so many batches; on the compute thread, for it may need torch."""
        self.batches = BatchSlots(self._schema, self._batch, slots, allocator(device))
        return self.batches.free

    # ---- drawing

    async def fill(self, slot: Slot) -> Slot:
        """Draw columns until the slot is full, and weigh them. Waits for as long as there is nothing to draw."""
        drawn = self._drawn[id(slot)] = []
        await self._meet()
        while not slot.full:
            dealt = self._deal(slot.width - slot.columns)
            answers = await asyncio.gather(*(self._ask(shard, count) for shard, count, _ in dealt))
            with self._unpack:
                for (shard, _, share), answer in zip(dealt, answers, strict=True):
                    if answer is not None:
                        self.batches.copy(slot, answer, 0)
                        part = answer.arrays["id"], answer.arrays["probability"] * share
                        drawn.append(Drawn(shard, answer.epoch, *part))
            if not slot.full:
                self._wait.waits(self._reasons())
                await self._somebody()
        self._wait.waits("")
        slot.weight = self._weights(np.concatenate([part.probability for part in drawn]))
        slot.env_steps = self._new_steps()
        return slot

    async def _meet(self) -> None:
        """Ask shards that were never heard how they stand: that is answered at once, items perhaps much later."""
        unknown = [shard for shard in self.shards if not shard.life and self._is_here(shard)]
        await asyncio.gather(*(self._ask(shard, 0) for shard in unknown))

    def _deal(self, columns: int) -> list[tuple[Shard, int, float]]:
        """Each shard that is there, how many columns it is to draw, and the probability of a column to be its."""
        here = [shard for shard in self.shards if self._is_here(shard)]
        mass = np.array([0.0 if shard.waits else shard.mass for shard in here])
        if not mass.any():
            mass = np.ones(len(here))  # nobody is known to have any: whoever has first
        shares = mass / mass.sum()
        counts: list[int] = self._rng.multinomial(columns, shares).tolist() if here else []
        return list(zip(here, counts, shares.tolist(), strict=True))

    async def _ask(self, shard: Shard, count: int) -> Message | None:
        """Its answer with so many items; None when it has none for us now."""
        question = fields_of(Sample(count, shard.life)), self._priorities(shard)
        try:
            answer = await shard.client.request(Sample.KIND, *question, timeout_s=LOST_S)
        except UnreachableError:
            self._log.warning("%s does not answer: its share is drawn from the others", shard.name)
            shard.again = shard.client.ask(Sample.KIND, fields_of(Sample(0)), timeout_s=math.inf)
            return None
        return self._heard(shard, answer, count)

    def _heard(self, shard: Shard, answer: Message, count: int) -> Message | None:
        sampled = parse(Sampled, answer)
        before = sampled.env_steps if self._joins and not shard.life else shard.env_steps
        self._uncounted += max(0, sampled.env_steps - before)  # back from a checkpoint, it knows of fewer
        shard.life, shard.items, shard.mass = answer.epoch, sampled.items, sampled.mass
        shard.env_steps, shard.waits = sampled.env_steps, sampled.waits
        if all(each.life for each in self.shards):  # together they may know of fewer than our parameters
            self._uncounted = max(0, self._uncounted)
        if sampled.waits or not count:
            return None
        if reason := self._refusal(answer, count):
            self._ledger.counter("samples", "refused", reason).add(count)
            shard.waits = f"its items are not what was asked for: {reason}"
            return None
        return answer

    def _refusal(self, answer: Message, count: int) -> str | None:
        """Why these are no items to learn from, or None."""
        expected = {"id": ("int64", (count,)), "probability": ("float64", (count,))}
        found = {name: (array.dtype.name, array.shape) for name, array in answer.arrays.items() if name in expected}
        if reason := self._schema.check(answer):
            return reason
        return None if found == expected and answer.arrays["obs"].shape[1] == count else "schema"

    def _is_here(self, shard: Shard) -> bool:
        """Whether it answers, as far as is known; one that answers again is back."""
        if shard.again is not None and shard.again.done():
            self._heard(shard, shard.again.result(), 0)
            self._log.info("%s answers again", shard.name)
            shard.again = None
        return shard.again is None

    async def _somebody(self) -> None:
        """Where no shard is there, wait for the first that is back."""
        lost = [shard.again for shard in self.shards if shard.again is not None]
        if len(lost) == len(self.shards):
            await asyncio.wait(lost, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)

    def _weights(self, probability: Array) -> Array | None:
        """[B] (N·P)^-β over the largest of them, in which N falls out."""
        if not self._alpha or not self._beta:
            return None
        weights: Array = (probability.min() / probability) ** self._beta
        return weights.astype(np.float32)

    def _new_steps(self) -> int:
        """Environment steps that the shards took in since the last batch; each learner counts its share of them."""
        new = max(0, self._uncounted) // self._sharing
        self._uncounted -= new * self._sharing
        self._steps += new
        return new

    # ---- priorities, and books

    def trained(self, slot: Slot) -> None:
        """The slot was trained on: its errors are the new priorities of its items."""
        self._columns += slot.columns
        self._ledger.counter("samples", "trained").add(slot.columns)
        drawn = self._drawn.pop(id(slot))
        if slot.errors is None or not self._alpha:
            return
        parts = np.split(slot.errors, np.cumsum([len(part.id) for part in drawn])[:-1])
        for part, errors in zip(drawn, parts, strict=True):
            part.shard.priorities.append((part.life, part.id, errors))

    def refuse(self, slot: Slot, reason: str) -> None:
        """Nothing was learnt from the slot: the next one counts its steps."""
        self._uncounted += slot.env_steps * self._sharing
        self._steps -= slot.env_steps
        self._ledger.counter("samples", "left_out", reason).add(slot.columns)
        del self._drawn[id(slot)]

    def _priorities(self, shard: Shard) -> dict[str, Array]:
        """What its next question carries."""
        told, shard.priorities = shard.priorities, []
        mine = [(ids, errors) for life, ids, errors in told if life == shard.life]
        gone = sum(len(ids) for life, ids, _ in told if life != shard.life)
        self._ledger.counter("priorities", "late").add(gone)
        if not mine:
            return {}
        return {
            "id": np.concatenate([ids for ids, _ in mine]),
            "priority": np.concatenate([errors for _, errors in mine]).astype(np.float32),
        }

    async def settle(self) -> None:
        """Nothing more is trained on: tell the last priorities."""
        for shard in self.shards:
            if shard.again is not None:
                shard.again.cancel()
        last = [shard for shard in self.shards if shard.again is None and shard.priorities]
        questions = [
            shard.client.ask(Sample.KIND, fields_of(Sample(0, shard.life)), self._priorities(shard), timeout_s=SETTLE_S)
            for shard in last
        ]
        await asyncio.gather(*questions, return_exceptions=True)  # a shard that is gone needs none

    def _reasons(self) -> str:
        """Why there is no batch."""
        reasons = (f"{s.name}: {'no answer' if s.again is not None else s.waits or 'ready'}" for s in self.shards)
        return "no batch: " + "; ".join(reasons)

    def gauge(self) -> dict[str, float]:
        return {
            "items": sum(shard.items for shard in self.shards),
            "shards_lost": sum(shard.again is not None for shard in self.shards),
            "sample_wait_s": self._wait.seconds,
            "replay_ratio": self._columns / self._steps if self._steps else 0.0,
        }


def _learners(node: Node, shard: str) -> int:
    """How many learners draw from this shard: this one alone in a bundle with it."""
    sources = node.plan.members(node.ports["samples"].link.sources)
    return sum(shard in node.plan.ports(learner.name)["samples"].peers for learner in sources)
