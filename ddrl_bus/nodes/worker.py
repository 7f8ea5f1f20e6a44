"""The worker, a learner that has a parameter server apply its gradients: A3C (Mnih et al. 2016, arXiv 1602.01783).

    newest parameters ─→ weights ─→ its actors play one unroll each ─→ trajectories ─→ gradient ─→ newest parameters …

Nothing is computed from unrolls that other parameters than the ones at hand played. A worker outlives its server: it
repeats a gradient, under the same number, until it hears what became of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ddrl_bus.errors import FencedError, UnreachableError
from ddrl_bus.messages import PULL, Gradient, Parameters, Weights, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import ANSWER_S, Node
from ddrl_bus.nodes.batches import Intake, batch_of, oldest
from ddrl_bus.nodes.trainer import make_algorithm
from ddrl_bus.transport.wire import Arena, Array, Message

HELD_S: Final = 0.2
"""How long a worker rests while the server holds still."""


class Worker(Node):
    role: ClassVar[str] = "learner"

    async def start(self) -> None:
        options: Any = self.node.options
        self.intake = Intake(self, self._lag)
        self.weights = self.open_publisher("weights")
        self.server = self.open_client("gradients")
        names = ("learn", "pack", "send", "unpack", "queue_wait", "weights_wait")
        self.clocks = {name: clock(self.ledger, name) for name in names}
        self.version = 0  # updates at the parameters at hand
        self.rounds = self.gradients = 0
        await self.compute(self._build, options.device)

    def _build(self, device: str) -> None:
        self.algo = make_algorithm(self, device)
        (self.slot,) = self.intake.allocate(1, self.algo.device)

    async def run(self) -> None:
        answer = await self._ask(PULL)
        while answer is not None and not self.draining.is_set():
            await self._take(answer)
            with self.clocks["queue_wait"]:
                filled = await self.until(self.intake.fill(self.slot), self.draining)
            if filled is None:
                break
            gradient = await self.compute(self._gradient)
            answer = await self._push(*gradient)
        self.intake.settle()

    def _lag(self, message: Message) -> int:
        """A server that came back from its checkpoint may have gone back too: then those ahead do not fit either."""
        return abs(self.version - oldest(message))

    async def _take(self, answer: Message) -> None:
        """Have the newest parameters played, and learn with them."""
        newest = parse(Parameters, answer)
        self.version = newest.updates
        with self.clocks["pack"]:
            arena = Arena.of(Weights.KIND, answer.arrays)
        with self.clocks["send"]:
            self.rounds += 1
            self.weights.publish(self.rounds, arena, fields_of(Weights(newest.env_steps, newest.updates)))
        await self.compute(self._load, answer.arrays)  # while they play

    async def _push(self, arrays: Mapping[str, Array], report: dict[str, float]) -> Message | None:
        """The answer that settles the gradient; None if the node drained before there was one."""
        self.gradients += 1
        rows = self.plan.algo.batch * self.plan.algo.unroll
        gradient = fields_of(Gradient(self.gradients, self.version, rows, report))
        while (answer := await self._ask(Gradient.KIND, gradient, arrays)) is not None:
            verdict = parse(Parameters, answer).verdict
            if verdict not in ("held", "budget"):  # a server that went back to a checkpoint may have room again
                self._settled(verdict)
                return answer
            await self.until(asyncio.sleep(HELD_S), self.draining)
            if self.draining.is_set():
                break
        return None

    def _settled(self, verdict: str) -> None:
        if verdict in ("applied", "duplicate"):
            self.intake.trained(self.slot.messages)
        else:
            self.log.info("gradient %d refused: %s", self.gradients, verdict)
            self.intake.evict(verdict, self.slot.messages)
        self.slot.clear()

    async def _ask(
        self, kind: str, fields: Mapping[str, Any] | None = None, arrays: Mapping[str, Array] | None = None
    ) -> Message | None:
        """The server's answer, however long it is away; None if the node drains meanwhile."""
        while True:
            try:
                with self.clocks["weights_wait"]:
                    answer = await self.server.request(kind, fields, arrays, timeout_s=ANSWER_S)
            except UnreachableError:
                self.log.warning("parameter server unreachable; asking again")
                if self.draining.is_set():
                    return None
            else:
                if parse(Parameters, answer).verdict == "fenced":
                    raise FencedError(f"{answer.node} knows a newer life of {self.name}")
                return answer

    # ---- on the compute thread

    def _load(self, parameters: Mapping[str, Array]) -> None:
        with self.clocks["unpack"]:
            self.algo.load(parameters)

    def _gradient(self) -> tuple[dict[str, Array], dict[str, float]]:
        with self.clocks["learn"]:
            return self.algo.gradients(batch_of(self.slot, self.schema))

    def gauge(self) -> dict[str, float]:
        return {"version": self.version, "gradients": self.gradients, **self.intake.gauge()}
