"""The learner: fills batches from unrolls as they come, or from what a replay draws; trains, publishes weights.

    trajectories, or samples ─→ slot (one copy) ─→ ready ─→ train ─→ weights
                                 ↑ while the last batch is trained on, the next one fills

What it publishes, when it stops and what it saves is the trainer's business.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from ddrl_bus.experience import Slot
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.batches import Intake, batch_of, oldest
from ddrl_bus.nodes.samples import Samples
from ddrl_bus.nodes.trainer import Snapshot, Trainer, lag_gauge
from ddrl_bus.transport.wire import Array, Message

Updated = tuple[Slot, Snapshot | None]
"""A slot that was trained on, and the weights that are due to be published now, if any are."""


class Learner(Node):
    role: ClassVar[str] = "learner"

    async def start(self) -> None:
        options: Any = self.node.options
        self.publish_every: int = options.publish_every
        self.delay: int = options.delay
        self.clocks = {name: clock(self.ledger, name) for name in ("learn", "queue_wait")}
        self.lags: deque[Array] = deque(maxlen=64)  # of the last batches, per row
        self.metrics: dict[str, float] = {}
        self.delayed: deque[Snapshot] = deque()
        self.first_update_at = 0.0
        self.trainer = Trainer(self, self.open_publisher("weights"))
        self.algo = await self.compute(self.trainer.build, options.device)
        replayed = "samples" in self.ports
        self.source = Samples(self, self.algo.env_steps) if replayed else Intake(self, self._lag)
        ahead: int = options.prefetch if replayed else self.threads()
        self.slots = await self.compute(self.source.allocate, ahead + 2, self.algo.device)
        self.free: asyncio.Queue[Slot] = asyncio.Queue()
        self.ready: deque[Slot] = deque()
        self.batch_ready = asyncio.Event()
        self.training: deque[asyncio.Future[Updated]] = deque()
        for slot in self.slots:
            self.free.put_nowait(slot)

    async def run(self) -> None:
        self.trainer.publish(await self.compute(self.trainer.snapshot))
        assembling = asyncio.create_task(self._assemble(), name=f"{self.name}.assemble")
        assembling.add_done_callback(lambda _: self.batch_ready.set())  # it failed: whoever waits for a batch is to see
        try:
            await self._train_until_drained(assembling)
        finally:
            assembling.cancel()
        await self.source.settle()
        await self.compute(self.trainer.save)

    # ---- batches

    async def _assemble(self) -> None:
        """Fill slots while the compute thread trains."""
        while True:
            self.ready.append(await self.source.fill(await self.free.get()))
            self.batch_ready.set()
            self._train_ahead()

    def _lag(self, message: Message) -> int:
        """Versions that the learner will be ahead of it when the batch that fills now is trained on."""
        waiting = len(self.slots) - self.free.qsize() - 1
        return self.algo.updates + waiting - oldest(message)

    # ---- training

    async def _train_until_drained(self, assembling: asyncio.Task[None]) -> None:
        try:
            while self.training or not self.draining.is_set():
                if assembling.done():
                    assembling.result()
                self._train_ahead()
                if self.training:
                    self._updated(await self.training[0])
                else:
                    await self._attend()
        finally:
            await asyncio.gather(*self.training, return_exceptions=True)  # the first failure is the one to show

    def _train_ahead(self) -> None:
        while self.ready and len(self.training) < self.ahead() and self._may_train():
            self.training.append(self.submit(self._update, self._next()))

    def _next(self) -> Slot:
        return self.ready.popleft()

    def ahead(self) -> int:
        """Batches that are handed to the thread at a time: the second hides the switch between loop and thread."""
        return 2

    def _may_train(self) -> bool:
        """Whether one more update, after those under way, is wanted."""
        return not (self.trainer.held or self.trainer.spent(len(self.training) * self.source.rows))

    async def _attend(self) -> None:
        """Nothing is being trained: see to the controller's wishes, or wait for a batch."""
        self.control_changed.clear()
        self.batch_ready.clear()
        await self.trainer.attend()
        if self.done is not None or self.control.phase != "run":
            await self.until(self.control_changed.wait(), self.draining)
            return
        if not self.ready:
            with self.clocks["queue_wait"]:
                await self.until(self.batch_ready.wait(), self.draining, self.control_changed)

    def _updated(self, updated: Updated) -> None:
        self.training.popleft()
        slot, due = updated
        self.source.trained(slot)
        self._free(slot)
        if not self.first_update_at:
            self.first_update_at = time.time()
            self.report()
        if due is not None:
            self.trainer.publish(due)

    def _free(self, slot: Slot) -> None:
        slot.clear()
        self.free.put_nowait(slot)

    # ---- on the compute thread

    def _update(self, slot: Slot) -> Updated:
        updated = self._apply(slot, partial(self.algo.step, batch_of(slot, self.schema), slot.env_steps))
        slot.errors = self.algo.errors
        return updated

    def _apply(self, slot: Slot, step: Callable[[], dict[str, float]]) -> Updated:
        """One update by `step`, and what is due after it."""
        self.lags.append(self.algo.updates - slot.version[: slot.length])
        with self.clocks["learn"]:
            self.metrics.update(step())
        if self.trainer.save_due:
            self.trainer.save()
        return slot, self._due()

    def _due(self) -> Snapshot | None:
        """Every `publish_every` updates the weights of `delay` updates ago, as soon as there are such."""
        if self.algo.updates % self.publish_every:
            return None
        self.delayed.append(self.trainer.snapshot())
        due = None
        while self.delayed and self.algo.updates - self.delayed[0].weights.updates >= self.delay:
            due = self.delayed.popleft()
        return due

    def gauge(self) -> dict[str, float]:
        return {
            "env_steps": self.algo.env_steps,
            "updates": self.algo.updates,
            **lag_gauge(self.lags),
            "first_update_at": self.first_update_at,
            **self.source.gauge(),
            **self.metrics,
        }
