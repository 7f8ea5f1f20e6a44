"""The actor without a policy: its environments do what an inference node says.

    step ─→ observations ─→ act ─→ actions ─→ step ─→ …          and, where the topology gives it that port,
       └─ rows of an unroll ─────────┘ ─→ trajectories           unrolls; else the inference node assembles them

The environments are dealt into groups: while one waits for its actions, the thread steps another.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, Final

from ddrl_bus.envs import Step, VectorEnv
from ddrl_bus.errors import EnvError, LinkClosedError, UnreachableError
from ddrl_bus.experience import FINAL
from ddrl_bus.messages import Act, Actions, fields_of, parse
from ddrl_bus.metrics import SharedClock, clock
from ddrl_bus.nodes.assembly import Assembler, Played, new_rows
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.env_faults import EnvFaults
from ddrl_bus.transport.links import Client
from ddrl_bus.transport.wire import Array, Message

ANSWER_S: Final = 10.0
"""How long to wait for actions before saying so; the question is then asked again."""


class EnvGroup:
    """Some of an actor's environments, stepped as one vector, and what is asked for them next.

    Args:
        make: the environments, anew.
        assembler: puts their unrolls together; None where the inference node does.
    """

    def __init__(self, number: int, make: Callable[[], VectorEnv], server: Client, assembler: Assembler | None) -> None:
        self.number, self.server, self.assembler = number, server, assembler
        self._make = make
        self.act = Act(number, -1)
        self.arrays: dict[str, Array] = {}
        """Of `act`."""
        self.server_life = 0
        self.restart()

    def restart(self) -> int:
        """Make the environments (again); returns the rows of an unroll that came to nothing.

        Raises:
            EnvError: as they did.
        """
        self.steps = 0
        """Since they were made."""
        self.env = self._make()
        obs = self.env.reset()
        lost = self.assembler.restart() if self.assembler else 0
        self._ask({"obs": obs})
        return lost

    def _ask(
        self, arrays: dict[str, Array], returns: Sequence[float] = (), lengths: Sequence[int] = ()
    ) -> Played | None:
        played = self.assembler.observed(arrays["obs"]) if self.assembler else None
        begins = self.assembler is not None and self.assembler.begins
        self.act = Act(self.number, self.act.step + 1, begins, list(returns), list(lengths))
        self.arrays = arrays
        return played

    def led_to(self, step: Step) -> Played | None:
        """What the actions led to, which is also the next question; returns the unroll that ends there, if one does."""
        self.steps += 1
        arrays = {"reward": step.reward, "terminated": step.terminated, "truncated": step.truncated}
        returns, lengths = [r for r, _ in step.episodes], [n for _, n in step.episodes]
        if step.episodes and (cut := step.truncated[step.final_index]).any():
            arrays |= dict(zip(FINAL, (step.final_index[cut], step.final_obs[cut]), strict=True))
        if self.assembler:
            self.assembler.led_to(arrays, returns, lengths)
        return self._ask({"obs": step.obs, **arrays}, returns, lengths)

    def acted(self, answer: Message) -> int:
        """Write down what was answered; returns the rows of an unroll that came to nothing.

        An inference node that is younger than the unroll knows nothing of what the agents carried.
        """
        lost = 0
        if self.assembler:
            if answer.epoch != self.server_life:
                lost, self.server_life = self.assembler.restart(), answer.epoch
                self.assembler.observed(self.arrays["obs"])
            self.assembler.acted(answer.arrays, parse(Actions, answer))
        return lost


class EnvActor(Node):
    role: ClassVar[str] = "actor"

    async def start(self) -> None:
        options: Any = self.node.options
        self.trajectories = self.open_sender("trajectories") if "trajectories" in self.ports else None
        self.env_steps = self.ledger.counter("env_steps")
        self.env_faults = self.ledger.counter("env_faults")
        self.unfinished = self.ledger.counter("unfinished")
        self.clocks = {name: clock(self.ledger, name) for name in ("env", "record", "pack", "send")}
        self.waiting = SharedClock(self.ledger, options.groups)
        self.round_trips: deque[float] = deque(maxlen=512)  # seconds
        self.envs: int = options.envs // options.groups
        servers = len(self.ports["act"].peers)
        numbers = [(self.node.index * options.groups + g) % servers for g in range(options.groups)]
        self.servers = {number: self.open_client("act", number) for number in set(numbers)}
        self.groups = [await self.compute(self._new_group, g, self.servers[n]) for g, n in enumerate(numbers)]

    def _new_group(self, number: int, server: Client) -> EnvGroup:
        assembler = Assembler(self.unrolls_of(self.envs)) if self.trajectories else None
        return EnvGroup(number, partial(self._make_env, number), server, assembler)

    def _make_env(self, group: int) -> VectorEnv:
        """The environments of a group; after a fault their seeds are others."""
        options: Any = self.node.options
        seeds = self.seeds(restart=self.env_faults.value).spawn(options.groups)[group]
        return VectorEnv(self.env, self.envs, seeds)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hang_up())
            for group in self.groups:
                tasks.create_task(self._play(group))
        for group in self.groups:
            if group.assembler:
                self.unfinished.add(group.assembler.restart() * self.envs)
        if self.trajectories:
            await self.trajectories.flush(self.plan.grace / 2)  # the rest is for the goodbye

    async def _hang_up(self) -> None:
        """Once this node drains, nobody waits for actions any more."""
        await self.draining.wait()
        for server in self.servers.values():
            server.close()

    async def _play(self, group: EnvGroup) -> None:
        faults = EnvFaults(self.env_faults, self.log)
        while answer := await self._actions(group):
            played = await self.submit(self._step, group, answer, faults)
            if played and not await self._send(played):
                self.unfinished.add(new_rows(played, self.schema) * self.envs)
                break

    async def _actions(self, group: EnvGroup) -> Message | None:
        """The answer to what the group asks; None once this node drains."""
        began = time.perf_counter()
        while not self.draining.is_set():
            try:
                with self.clocks["pack"]:
                    answer = group.server.ask(Act.KIND, fields_of(group.act), group.arrays, timeout_s=ANSWER_S)
                with self.waiting.waits("act_wait"):
                    message = await answer
            except UnreachableError as error:
                self.log.warning("%s; asking again", error)
            except LinkClosedError:
                break
            else:
                self.round_trips.append(time.perf_counter() - began)
                return message
        return None

    async def _send(self, played: Played) -> bool:
        """Hand the unroll over; False if the node drains while nobody has room for it."""
        assert self.trajectories is not None
        with self.clocks["send"]:
            if self.trajectories.try_send(*played):
                return True
        with self.waiting.waits("send_wait"):
            return bool(await self.until(self._sent(played), self.draining))

    async def _sent(self, played: Played) -> bool:
        assert self.trajectories is not None
        await self.trajectories.send(*played)
        return True

    # ---- on the compute thread

    def _step(self, group: EnvGroup, answer: Message, faults: EnvFaults) -> Played | None:
        """Do what was answered; returns the unroll that this completes, if it does.

        Environments that fail are rebuilt: the next question is then about the first observations of new ones.
        """
        with self.clocks["record"]:
            self.unfinished.add(group.acted(answer) * self.envs)
        try:
            with self.clocks["env"]:
                step = group.env.step(answer.arrays["action"])
        except EnvError as error:
            self._rebuild(group, error, faults)
            return None
        self.env_steps.add(self.envs)
        with self.clocks["record"]:
            played = group.led_to(step)
        if group.steps == self.schema.unroll:
            faults.over()
        return played

    def _rebuild(self, group: EnvGroup, error: EnvError, faults: EnvFaults) -> None:
        while True:
            faults.happened(error)
            group.env.close()
            try:
                self.unfinished.add(group.restart() * self.envs)
            except EnvError as again:
                error = again
            else:
                return

    def gauge(self) -> dict[str, float]:
        trips = sorted(self.round_trips)
        times = {"round_trip_ms": fmean(trips), "round_trip_p95_ms": trips[int(0.95 * len(trips))]} if trips else {}
        return {"env_steps": self.env_steps.value, **{name: 1e3 * seconds for name, seconds in times.items()}}
