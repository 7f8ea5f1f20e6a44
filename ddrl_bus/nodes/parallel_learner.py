"""A learner with several trainers: GA3C (Babaeizadeh et al. 2017, arXiv 1611.06256).

    batch ─→ gradient of the parameters as this thread finds them ─┐
    batch ─→ gradient of the parameters as this thread finds them ─┴─→ one after the other to what they have become

`auto` uses as many trainers as make the most updates a second.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.experience import Slot
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.batches import batch_of
from ddrl_bus.nodes.learner import Learner, Updated
from ddrl_bus.nodes.trainer import make_algorithm
from ddrl_bus.nodes.tuning import most, tuned
from ddrl_bus.transport.wire import Array


class ParallelLearner(Learner):
    def threads(self) -> int:
        options: Any = self.node.options
        return most(options.trainers)

    async def start(self) -> None:
        options: Any = self.node.options
        self.tuned = options.trainers == "auto"
        self.in_use = 1 if self.tuned else self.threads()
        self.lock = threading.Lock()  # while batches are trained on, whoever reads or changes `algo` holds it
        self.of_thread = threading.local()
        self.newest = -1  # updates at the weights that were published last
        await super().start()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tuning = tasks.create_task(self._tune(), name=f"{self.name}.tune")
            await super().run()
            tuning.cancel()

    async def _tune(self) -> None:
        """Find the number of trainers, and leave them no more slots than they need: batches that wait grow old."""
        if self.tuned:
            unused = [await self.free.get() for _ in range(self.threads() - self.in_use)]
            async for number in tuned(self.threads(), lambda: self.algo.updates):
                if number > self.in_use:
                    self.free.put_nowait(unused.pop())
                elif number < self.in_use:
                    unused.append(await self.free.get())
                self.in_use = number

    def ahead(self) -> int:
        return max(super().ahead(), self.in_use)

    def _updated(self, updated: Updated) -> None:
        slot, due = updated
        if due is not None and due.weights.updates > self.newest:
            self.newest = due.weights.updates
        else:
            due = None  # a thread that was handed its batch earlier may be done later
        super()._updated((slot, due))

    # ---- on the compute threads

    def _update(self, slot: Slot) -> Updated:
        if self.in_use == 1:
            with self.lock:
                return super()._update(slot)
        gradients, report = self._gradients(batch_of(slot, self.schema))

        def applied() -> dict[str, float]:
            self.algo.apply(gradients, slot.env_steps)
            return report

        with self.lock:
            return self._apply(slot, applied)

    def _gradients(self, batch: Batch) -> tuple[dict[str, Array], dict[str, float]]:
        replica = self._replica()
        with self.lock:
            for name, network in self.algo.networks().items():
                replica.networks()[name].load_state_dict(network.state_dict())
        with clock(self.ledger, "learn"):
            return replica.gradients(batch)

    def _replica(self) -> Algorithm[Any]:
        """This thread's network."""
        if not hasattr(self.of_thread, "replica"):
            self.of_thread.replica = make_algorithm(self, str(self.algo.device))
        replica: Algorithm[Any] = self.of_thread.replica
        return replica

    def gauge(self) -> dict[str, float]:
        return {**super().gauge(), "trainers": self.in_use}
