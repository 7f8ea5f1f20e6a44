"""The parameter server: applies the gradients of many workers to one set of parameters, one after the other. Of
several each is a shard: it holds its own part of the parameters, and gets that part of each gradient.

    gradients ─→ judge ─→ apply ─→ (durable: checkpoint) ─→ newest parameters back to the worker
                                └→ parameters, for whoever plays them

A gradient is applied the moment it comes, with one optimiser state and a learning rate annealed by everybody's steps
(Mnih et al. 2016, arXiv 1602.01783: A3C with shared RMSProp). It is applied once, however often it is sent: the number
of the last one of each worker lies in the same checkpoint as the parameters that hold it. Shards know nothing of each
other: each counts its own updates.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from ddrl_bus.errors import WireError
from ddrl_bus.messages import PULL, Gradient, Parameters, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import Node, node_seeds
from ddrl_bus.nodes.trainer import Snapshot, Trainer, lag_gauge
from ddrl_bus.transport.links import Request
from ddrl_bus.transport.wire import Array, Message

PUBLISH_S: Final = 0.05
"""Least time between two published versions: an evaluator needs few, and N workers make many."""
KEPT: Final = 256
"""Gradients that the gauges look back on."""
UNCOUNTED: Final = ("pulled", "held")


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of some messages, in their order, and the parameters after it; None where the answers must wait for a
    checkpoint that the disk refused: the workers will ask again."""

    verdicts: list[str]
    newest: Snapshot | None


class ParamServer(Node):
    role: ClassVar[str] = "param_server"

    applied: dict[str, tuple[int, int]]
    """Worker → its life, and the number of its last gradient that the parameters hold."""

    async def start(self) -> None:
        options: Any = self.node.options
        self.max_staleness: int | None = options.max_staleness
        self.durable: bool = options.durable
        self.server = self.open_server("gradients")
        self.workers = {node.name for node in self.plan.members(self.ports["gradients"].link.sources)}
        self.clocks = {name: clock(self.ledger, name) for name in ("learn", "send", "queue_wait")}
        self.staleness: deque[int] = deque(maxlen=KEPT)
        self.reports: deque[dict[str, float]] = deque(maxlen=KEPT)
        self.first_update_at = self.publish_at = 0.0
        self.published = 0  # updates at the parameters published last
        publisher = self.open_publisher("parameters") if "parameters" in self.ports else None
        servers = [node.name for node in self.plan.members(self.ports["gradients"].link.targets)]
        self.trainer = Trainer(self, publisher, (servers.index(self.name), len(servers)))
        await self.compute(self._build)

    def _build(self) -> None:
        self.algo = self.trainer.build("cpu")
        saved = self.trainer.resumed
        applied = saved.values.get("applied", {}) if saved else {}
        self.applied = {name: (life, number) for name, (life, number) in applied.items()}
        self.unsaved = saved is None  # a gradient belongs to the parameters that it was computed with: keep the first
        parameters = self.algo.net.named_parameters()
        self.shapes = {name: tuple(p.shape) for name, p in parameters if name in self.trainer.names}

    def seeds(self, restart: int = 0, stream: int = 0) -> np.random.SeedSequence:
        """Those of the first: together shards begin as one network."""
        return node_seeds(self.plan.seed, self.role, 0, (self.epoch >> 32) + restart, stream)

    async def run(self) -> None:
        self.trainer.publish(await self.compute(self.trainer.snapshot))
        self.published = self.algo.updates
        while not self.draining.is_set():
            self.control_changed.clear()
            await self.trainer.attend()
            with self.clocks["queue_wait"]:
                requests = await self.until(self._requests(), self.draining, self.control_changed)
            if requests:
                await self._settle(requests)
        await self.compute(self._save)

    async def _requests(self) -> list[Request]:
        """All that wait, at least one."""
        requests = [await self.server.recv()]
        while (request := self.server.try_recv()) is not None:
            requests.append(request)
        return requests

    async def _settle(self, requests: list[Request]) -> None:
        judged = await self.compute(self._judge_all, [request.message for request in requests])
        for verdict in judged.verdicts:
            self._count(verdict)
        if (newest := judged.newest) is None:
            return
        with self.clocks["send"]:
            for request, verdict in zip(requests, judged.verdicts, strict=True):
                fields = Parameters(newest.weights.env_steps, newest.weights.updates, verdict)
                request.answer(Parameters.KIND, fields_of(fields), newest.arena.arrays)
        held = self.trainer.held  # then what is to be confirmed stays the newest that is published
        if newest.weights.updates > self.published and not held:
            self._publish(newest)

    def _count(self, verdict: str) -> None:
        if verdict in ("applied", "duplicate"):
            self.ledger.counter("gradients", verdict).add()
        elif verdict not in UNCOUNTED:
            self.ledger.counter("gradients", "refused", verdict).add()

    def _publish(self, newest: Snapshot) -> None:
        if not self.first_update_at:
            self.first_update_at = time.time()
            self.report()
        if time.monotonic() >= self.publish_at:
            self.publish_at = time.monotonic() + PUBLISH_S
            self.trainer.publish(newest)
            self.published = newest.weights.updates

    # ---- on the compute thread

    def _judge_all(self, messages: list[Message]) -> Judged:
        with self.clocks["learn"]:
            verdicts = [self._judge(message) for message in messages]
        wanted = self.durable and self.unsaved
        if (wanted or self.trainer.save_due) and not self._save() and wanted:
            return Judged(verdicts, None)
        return Judged(verdicts, self.trainer.snapshot())

    def _judge(self, message: Message) -> str:
        """Apply a gradient, or say why not."""
        if message.node not in self.workers:
            return "stranger"
        epoch, number = self.applied.get(message.node, (0, 0))
        if message.epoch < epoch:
            return "fenced"
        if message.epoch > epoch:
            epoch, number = self.applied[message.node] = message.epoch, 0
        if message.kind == PULL:
            return "pulled"
        try:
            gradient = parse(Gradient, message)
        except WireError as error:
            return error.reason
        if gradient.number <= number:
            return "duplicate"
        if self.trainer.held:
            return "held"
        staleness = abs(self.algo.updates - gradient.version)  # of an earlier life's future, it may be ahead of us
        if refusal := self._refusal(gradient, message.arrays, staleness):
            return refusal
        self.algo.apply(message.arrays, gradient.env_steps)
        self.applied[message.node] = epoch, gradient.number
        self.unsaved = True
        self.staleness.append(staleness)
        self.reports.append(gradient.report)
        return "applied"

    def _refusal(self, gradient: Gradient, arrays: dict[str, Array], staleness: int) -> str:
        if gradient.env_steps < 0 or gradient.version < 0:
            return "fields"
        if not arrays or any(a.dtype != np.float32 or a.shape != self.shapes.get(name) for name, a in arrays.items()):
            return "schema"
        if not all(np.isfinite(array).all() for array in arrays.values()):
            return "non_finite"
        if self.max_staleness is not None and staleness > self.max_staleness:
            return "stale"
        return "budget" if self.trainer.spent() else ""

    def _save(self) -> bool:
        saved = self.trainer.save(applied=self.applied)
        self.unsaved = self.unsaved and not saved
        return saved

    def gauge(self) -> dict[str, float]:
        reports, counters = tuple(self.reports), self.ledger.snapshot()
        return {
            **{name: float(np.mean([r[name] for r in reports if name in r])) for name in (reports or ({},))[-1]},
            "env_steps": self.algo.env_steps,
            "updates": self.algo.updates,
            "lr": self.algo.learning_rate,
            "refused": sum(n for name, n in counters.items() if name.startswith("gradients/refused/")),
            **lag_gauge([np.array(tuple(self.staleness) or (0,))]),
            "first_update_at": self.first_update_at,
        }
