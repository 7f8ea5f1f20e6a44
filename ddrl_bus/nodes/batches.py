"""From unrolls as they arrive to batches as a learning rule wants them, and the books about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.errors import WireError
from ddrl_bus.experience import RECORD, STATE, Allocate, BatchSlots, Slot, UnrollSchema, under
from ddrl_bus.messages import Trajectory, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.links import Check
from ddrl_bus.transport.wire import Array, Message


class Intake:
    """The receiving end of `trajectories`: copies unrolls into batches, and answers for every one that it took: each
    is trained on or evicted.

    Args:
        lag: versions between an unroll and what will be trained when the batch that fills now is trained on.
    """

    def __init__(self, node: Node, lag: Callable[[Message], int]) -> None:
        self.receiver = node.open_receiver("trajectories")
        self.receiver.check = check(node.schema)
        self.returns: deque[float] = deque(maxlen=100)
        link = node.ports["trajectories"].link
        self.max_lag = link.max_lag
        senders = (sender.name for sender in node.plan.members(link.sources))
        self._senders = {name for name in senders if node.name in node.plan.ports(name)[link.name].peers}
        self._lag = lag
        self._plan, self._schema, self._ledger = node.plan, node.schema, node.ledger
        self._unpack = clock(node.ledger, "unpack")
        self._trained = node.ledger.counter("trajectories", "trained")
        self._next: deque[Message] = deque()
        self._column = 0  # of the first of them
        self.rows: int = node.plan.algo.batch * node.plan.algo.unroll
        """Environment steps that a batch adds to the run's."""

    def allocate(self, slots: int, device: torch.device) -> list[Slot]:
        """Memory for so many batches; on the compute thread, for it may need torch."""
        self.batches = BatchSlots(self._schema, self._plan.algo.batch, slots, allocator(device))
        return self.batches.free

    async def fill(self, slot: Slot) -> Slot:
        """Copy unrolls into the slot until it is full, each column once; what is left over begins the next one."""
        while not slot.full:
            if not self._next:
                self._next.extend(await self._unrolls())
            message = self._next[0]
            with self._unpack:
                self._column = self.batches.copy(slot, message, self._column)
            if self._column == message.arrays["obs"].shape[1]:
                self._next.popleft()
                self._column = 0
        slot.env_steps = self.rows
        return slot

    async def _unrolls(self) -> list[Message]:
        """The next one; in lock-step one of every sender, in the senders' order, so that a batch repeats exactly."""
        if self.max_lag != 0:
            return [await self._unroll()]
        round_: dict[str, Message] = {}
        while len(round_) < len(self._senders):
            message = await self._unroll()
            if message.node in round_:  # of an earlier life, which died meanwhile
                self.evict("superseded", 1)
            round_[message.node] = message
        return [round_[name] for name in sorted(round_)]

    async def _unroll(self) -> Message:
        """The next unroll that is not too old."""
        while True:
            message = await self.receiver.recv()
            self.returns.extend(parse(Trajectory, message).returns)
            if self.max_lag is None or self._lag(message) <= self.max_lag:
                return message
            self.evict("stale", 1)

    # ---- books

    def trained(self, slot: Slot) -> None:
        """The slot was trained on."""
        self._trained.add(slot.messages)

    def refuse(self, slot: Slot, reason: str) -> None:
        """Nothing was learnt from the slot."""
        self.evict(reason, slot.messages)

    def evict(self, reason: str, messages: int) -> None:
        self._ledger.counter("trajectories", "evicted", reason).add(messages)

    async def settle(self) -> None:
        """Nothing more is trained on: evict what came besides."""
        while self.receiver.try_recv() is not None:
            pass
        books = {name: n for name, n in self._ledger.snapshot().items() if name.startswith("trajectories/")}
        taken = sum(n for name, n in books.items() if name.endswith("/taken"))
        evicted = sum(n for name, n in books.items() if name.startswith("trajectories/evicted/"))
        self.evict("drained", taken - self._trained.value - evicted)

    def gauge(self) -> dict[str, float]:
        mean = {"return_mean": float(np.mean(self.returns))} if self.returns else {}
        return {"queue": self.receiver.queued, **mean}


def check(schema: UnrollSchema) -> Check:
    """Looks at an unroll before it is accepted; gives the reason to refuse it, or None."""

    def refusal(message: Message) -> str | None:
        try:
            parse(Trajectory, message)
        except WireError as error:
            return error.reason
        return schema.check(message)

    return refusal


def oldest(message: Message) -> int:
    """Version of the weights that the unroll began with."""
    return int(message.arrays["version"][0])


def batch_of(slot: Slot, schema: UnrollSchema) -> Batch:
    """What a full slot holds; the arrays are the slot's own."""
    index, final = slot.final_rows(schema.obs)
    timed = {name: array for name, array in slot.rows.items() if not name.startswith(STATE)}
    timed = {name: array[: slot.length + (name == "obs")] for name, array in timed.items()}
    return Batch(
        **{name: array for name, array in timed.items() if not name.startswith(RECORD)},
        record=under(RECORD, timed),
        state=under(STATE, slot.rows),
        version=slot.version[: slot.length],
        final_obs=final,
        final_index=index,
        weight=slot.weight,
    )


def allocator(device: torch.device) -> Allocate:
    """Where batches for this device lie: copies to a GPU are direct from pinned memory."""

    def allocate(dtype: str, shape: tuple[int, ...]) -> Array:
        array: Array = np.empty(shape, dtype)
        return torch.from_numpy(array).pin_memory().numpy() if device.type == "cuda" else array

    return allocate
