"""The worker, a learner that has parameter servers apply its gradients: A3C (Mnih et al. 2016, arXiv 1602.01783), and
with a replay Gorila (Nair et al. 2015, arXiv 1507.04296).

    newest parameters ─→ weights ─→ its actors play ─→ trajectories, or samples ─→ gradient ─→ newest parameters …

From unrolls as they come, nothing is computed that other parameters than the ones at hand played. Of several servers
each holds a part of the parameters and gets that part of a gradient, all at once. A worker outlives its servers: it
repeats a gradient, under the same number, until it hears from each what became of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ddrl_bus.errors import FencedError, UnreachableError
from ddrl_bus.messages import PULL, Gradient, Parameters, Weights, fields_of, parse
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.base import ANSWER_S, Node
from ddrl_bus.nodes.batches import Intake, batch_of, oldest
from ddrl_bus.nodes.outliers import Outliers
from ddrl_bus.nodes.samples import Samples
from ddrl_bus.nodes.shards import parts
from ddrl_bus.nodes.trainer import make_algorithm
from ddrl_bus.transport.wire import Arena, Array, Message

HELD_S: Final = 0.2
"""How long a worker rests while a server holds still."""


class Worker(Node):
    role: ClassVar[str] = "learner"

    async def start(self) -> None:
        options: Any = self.node.options
        self.source: Intake | Samples = Samples(self) if "samples" in self.ports else Intake(self, self._lag)
        self.weights = self.open_publisher("weights")
        self.names = list(self.ports["gradients"].peers)
        self.servers = [self.open_client("gradients", n) for n in range(len(self.names))]
        names = ("learn", "pack", "send", "unpack", "queue_wait", "weights_wait")
        self.clocks = {name: clock(self.ledger, name) for name in names}
        self.outliers = Outliers(options.outliers or math.inf)
        self.versions = [0] * len(self.servers)
        """Updates at the parameters at hand, by each server's count."""
        self.rounds = self.gradients = 0
        await self.compute(self._build, options.device)

    def _build(self, device: str) -> None:
        self.algo = make_algorithm(self, device)
        self.parts = parts(self.algo.weights(), len(self.servers))
        (self.slot,) = self.source.allocate(1, self.algo.device)

    async def run(self) -> None:
        answers = await self._pull()
        while answers is not None and not self.draining.is_set():
            await self._take(answers)
            with self.clocks["queue_wait"]:
                filled = await self.until(self.source.fill(self.slot), self.draining)
            if filled is None:
                break
            arrays, report = await self.compute(self._gradient)
            if self.outliers.stands_out(report["loss"]):
                self._settled("outlier")
                answers = await self._pull()
            else:
                answers = await self._push(arrays, report)
        await self.source.settle()

    @property
    def version(self) -> int:
        """Tells parameters apart: the updates of all servers together."""
        return sum(self.versions)

    def _lag(self, message: Message) -> int:
        """A server that came back from its checkpoint may have gone back too: then those ahead do not fit either."""
        return abs(self.version - oldest(message))

    async def _take(self, answers: list[Message]) -> None:
        """Have the newest parameters played, and learn with them."""
        newest = [parse(Parameters, answer) for answer in answers]
        self.versions = [each.updates for each in newest]
        arrays = {name: array for answer in answers for name, array in answer.arrays.items()}
        with self.clocks["pack"]:
            arena = Arena.of(Weights.KIND, arrays)
        with self.clocks["send"]:
            self.rounds += 1
            weights = Weights(min(each.env_steps for each in newest), self.version)
            self.weights.publish(self.rounds, arena, fields_of(weights))
        await self.compute(self._load, arrays, min(self.versions))  # while they play

    # ---- what servers are asked

    async def _pull(self) -> list[Message] | None:
        """The newest parameters of all servers; None if the node drained before."""
        answers = await self._all([self._ask(server, PULL) for server in range(len(self.servers))])
        return answers if len(answers) == len(self.servers) else None

    async def _push(self, arrays: Mapping[str, Array], report: dict[str, float]) -> list[Message] | None:
        """The answers that settle the gradient; None if the node drained before there were all."""
        self.gradients += 1
        answers = await self._all([self._push_part(n, arrays, report) for n in range(len(self.servers))])
        verdicts = [parse(Parameters, answer).verdict for answer in answers]
        if verdicts:
            applied = (verdict for verdict in verdicts if verdict in ("applied", "duplicate"))
            self._settled(next(applied, verdicts[0]))
        return answers if len(answers) == len(self.servers) else None

    async def _push_part(self, server: int, arrays: Mapping[str, Array], report: dict[str, float]) -> Message | None:
        """The answer that settles this server's part; None if the node drained before there was one."""
        gradient = fields_of(Gradient(self.gradients, self.versions[server], self.slot.env_steps, report))
        part = {name: arrays[name] for name in self.parts[server] if name in arrays}
        while (answer := await self._ask(server, Gradient.KIND, gradient, part)) is not None:
            verdict = parse(Parameters, answer).verdict
            if verdict not in ("held", "budget"):  # a server that went back to a checkpoint may have room again
                if verdict not in ("applied", "duplicate"):
                    self.log.info("gradient %d refused by %s: %s", self.gradients, answer.node, verdict)
                return answer
            await self.until(asyncio.sleep(HELD_S), self.draining)
            if self.draining.is_set():
                break
        return None

    def _settled(self, verdict: str) -> None:
        if verdict in ("applied", "duplicate"):
            self.source.trained(self.slot)
        else:
            self.source.refuse(self.slot, verdict)
        self.slot.clear()

    async def _all(self, asked: list[Any]) -> list[Message]:
        """The answers that come of these, in their order."""
        with self.clocks["weights_wait"]:
            return [answer for answer in await asyncio.gather(*asked) if answer is not None]

    async def _ask(
        self,
        server: int,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
    ) -> Message | None:
        """The server's answer, however long it is away; None if the node drains meanwhile."""
        while True:
            try:
                answer = await self.servers[server].request(kind, fields, arrays, timeout_s=ANSWER_S)
            except UnreachableError:
                self.log.warning("%s unreachable; asking again", self.names[server])
                if self.draining.is_set():
                    return None
            else:
                if parse(Parameters, answer).verdict == "fenced":
                    raise FencedError(f"{answer.node} knows a newer life of {self.name}")
                return answer

    # ---- on the compute thread

    def _load(self, parameters: Mapping[str, Array], updates: int) -> None:
        with self.clocks["unpack"]:
            self.algo.load(parameters, updates)

    def _gradient(self) -> tuple[dict[str, Array], dict[str, float]]:
        with self.clocks["learn"]:
            found = self.algo.gradients(batch_of(self.slot, self.schema))
            self.slot.errors = self.algo.errors
            return found

    def gauge(self) -> dict[str, float]:
        return {"version": self.version, "gradients": self.gradients, **self.source.gauge()}
