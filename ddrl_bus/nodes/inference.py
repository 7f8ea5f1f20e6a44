"""The inference node: chooses actions for environments that live elsewhere, many at a time.

    act ─→ group ─→ batch ─→ policy ─→ actions          weights ─→ policy
             └─ its unroll ─→ trajectories              where the topology gives it that port, else actors have it

A finished unroll that finds no credit holds its group's next answer back, and thereby its environments; the others go
on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any, ClassVar

from ddrl_bus.algos import memory
from ddrl_bus.algos.acting import make_policy
from ddrl_bus.errors import WireError
from ddrl_bus.messages import Act, Actions, fields_of, parse
from ddrl_bus.metrics import SharedClock, clock
from ddrl_bus.nodes.assembly import Assembler, Played, new_rows
from ddrl_bus.nodes.base import Node, places
from ddrl_bus.nodes.batching import Batcher
from ddrl_bus.nodes.groups import Group, refusal
from ddrl_bus.nodes.leader import weights_of
from ddrl_bus.nodes.predictors import Predictor
from ddrl_bus.nodes.tuning import most, tuned
from ddrl_bus.transport.links.end import Signal
from ddrl_bus.transport.links.request import Request
from ddrl_bus.transport.wire import Array, Message

Key = tuple[str, int]
"""Actor and number of a group."""


class Inference(Node):
    role: ClassVar[str] = "inference"

    def threads(self) -> int:
        options: Any = self.node.options
        return most(options.predictors)

    async def start(self) -> None:
        options: Any = self.node.options
        self.weights = weights_of(self)
        self.trajectories = self.open_sender("trajectories") if "trajectories" in self.ports else None
        self.actors = frozenset(self.ports["act"].link.sources)
        self.groups: dict[Key, Group] = {}
        self.batcher: Batcher[Key] = Batcher(options.batch, options.wait)
        self.unsent: deque[tuple[Key, Group, Played]] = deque()
        self.blocked = asyncio.Event()
        self.changed = Signal()
        self.tuned = options.predictors == "auto"
        self.in_use = 1 if self.tuned else self.threads()
        self.predictors: dict[int, Predictor] = {}
        self.waiting = SharedClock(self.ledger, self.threads())
        self.clocks = {name: clock(self.ledger, name) for name in ("weights_wait", "pack", "send")}
        self.asked, self.rows, self.batches = (
            self.ledger.counter("act", what) for what in ("messages_in", "rows", "batches")
        )
        self.unfinished = self.ledger.counter("unfinished")
        self.waited: deque[float] = deque(maxlen=256)  # seconds, the oldest request of each batch
        await self.compute(self._make_predictor, 0)
        self.requests = self.open_server("act")
        self.told: tuple[float, ...] = (self._now(), 0, 0, 0)

    async def run(self) -> None:
        with self.clocks["weights_wait"]:
            self.newest = await self.until(self.weights.next(), self.draining)
        if self.newest is not None:
            async with asyncio.TaskGroup() as tasks:
                beside = [
                    tasks.create_task(work) for work in (self.requests.serve(self._arrived), self._ship(), self._tune())
                ]
                for number in range(self.threads()):
                    tasks.create_task(self._predict(number))
                await self.draining.wait()
                self.changed.notify()
                for task in beside:
                    task.cancel()
        await self._settle()

    # ---- questions

    def _arrived(self, request: Request) -> None:
        try:
            act = parse(Act, request.message)
            group = self._group_of(request.message, act)
        except WireError as error:
            request.refuse(str(error))
            return
        key = request.message.node, act.group
        group.requests.append(request)
        if act.step > group.step:
            played, lost = group.asks(act, request.message.arrays)
            self.unfinished.add(lost * len(group.obs))
            if played is None or self._send(played):
                self._queue(key, group)
            else:
                self.unsent.append((key, group, played))
                self.blocked.set()
        elif group.answered:
            self._reply(group)

    def _queue(self, key: Key, group: Group) -> None:
        self.batcher.add(key, len(group.obs), self._now())
        self.changed.notify()

    def _group_of(self, message: Message, act: Act) -> Group:
        """The group that asks; one that is new, or has a new life, gets to know us here.

        Raises:
            WireError: why it is refused.
        """
        actor = self.plan.nodes.get(message.node) or self.plan.added(message.node)
        options: Any = actor.options if actor else None
        if not actor or actor.group not in self.actors or not 0 <= act.group < options.groups:
            raise WireError("fields", f"{message.node} has no group {act.group} in this topology")
        envs = options.envs // options.groups
        if words := refusal(message.arrays, (self.spaces.obs_dtype, (envs, *self.spaces.obs_shape))):
            raise WireError("schema", words)
        key = message.node, act.group
        group = self.groups.get(key)
        if group is None or message.epoch > group.life:
            mine = places(self.plan, actor)[act.group * envs : (act.group + 1) * envs]
            group = self.groups[key] = self._new_group(key, message.epoch, act.step, mine)
        if message.epoch < group.life:
            raise WireError("fenced", f"a newer life of {message.node} is here")
        if not group.may_ask(act.step):
            raise WireError("step", f"got step {act.step} of group {act.group}, after step {group.step}")
        return group

    def _new_group(self, key: Key, life: int, step: int, places: Array) -> Group:
        before = self.groups.get(key)
        if before is not None:
            self.batcher.drop(key)
            before.left = True
            if not before.out:  # else whoever answers it sees to that
                self.unfinished.add(before.abandon())
        envs = len(places)
        assembler = Assembler(self.unrolls_of(envs)) if self.trajectories else None
        return Group(life, step, partial(memory.initial, self.plan.algo, self.spaces, envs), places, assembler)

    # ---- answers

    async def _predict(self, number: int) -> None:
        """One of the predictors: batch after batch, until this node drains."""
        while groups := await self._next_batch(number):
            self.newest = self.weights.latest() or self.newest
            for group in groups:
                group.out = True
            await self.submit(self._answer, number, groups)
            self.batches.add()
            for group in groups:
                group.out, group.answered = False, True
                self.rows.add(len(group.obs))
                self._reply(group)
                if group.left:
                    self.unfinished.add(group.abandon())

    async def _next_batch(self, number: int) -> list[Group]:
        """The groups to answer next; none once this node drains."""
        while not self.draining.is_set():
            used = number < self.in_use
            if used and (keys := self.batcher.take(self._now())):
                self.waited.append(self.batcher.waited)
                return [self.groups[key] for key in keys]
            due_at = self.batcher.due_at if used else None
            timer = asyncio.get_running_loop().call_at(due_at, self.changed.notify) if due_at else None
            with self.waiting.waits("send_wait" if self.unsent else "requests_wait"):
                await self.changed.wait()
            if timer:
                timer.cancel()
        return []

    def _reply(self, group: Group) -> None:
        assert group.actions is not None
        with self.clocks["pack"]:
            for request in group.requests:
                request.answer(Actions.KIND, fields_of(group.actions), group.arrays)
            group.requests.clear()

    async def _tune(self) -> None:
        """Find the number of predictors that answers most rows a second."""
        if self.tuned:
            async for number in tuned(self.threads(), lambda: self.rows.value):
                self.in_use = number
                self.changed.notify()

    # ---- on the compute threads, one predictor on each

    def _make_predictor(self, number: int) -> None:
        options: Any = self.node.options
        seeds = self.seeds(stream=1 + number)
        policy = make_policy(self.algorithm, self.plan.algo, self.spaces, seeds, device=options.device)
        clocks = {name: clock(self.ledger, name) for name in ("unpack", "forward", "record")}
        self.predictors[number] = Predictor(policy, clocks)

    def _answer(self, number: int, groups: list[Group]) -> None:
        assert self.newest is not None
        if number not in self.predictors:
            self._make_predictor(number)
        self.predictors[number].answer(groups, self.newest)

    # ---- unrolls

    def _send(self, played: Played) -> bool:
        """Whether it went out: not while others wait for credit too, or while there is none."""
        assert self.trajectories is not None
        with self.clocks["send"]:
            return not self.unsent and self.trajectories.try_send(*played)

    async def _ship(self) -> None:
        """Send what found no credit, in turn; then that group's question may be answered."""
        while self.trajectories:
            await self.blocked.wait()
            while self.unsent:
                key, group, played = self.unsent[0]
                await self.trajectories.send(*played)
                self.unsent.popleft()
                if self.groups[key] is group:
                    self._queue(key, group)
            self.blocked.clear()

    async def _settle(self) -> None:
        """Actors have left: what they began comes to nothing, and so does what nobody has room for."""
        if self.trajectories is None:
            return
        while self.unsent and self.trajectories.try_send(*self.unsent[0][2]):
            self.unsent.popleft()
        for _, group, played in self.unsent:
            self.unfinished.add(new_rows(played, self.schema) * len(group.obs))
        for group in self.groups.values():
            self.unfinished.add(group.abandon())
        await self.trajectories.flush(self.plan.grace / 2)  # the rest is for the goodbye

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    def gauge(self) -> dict[str, float]:
        told = (self._now(), self.asked.value, self.rows.value, self.batches.value)
        seconds, asked, rows, batches = (now - before for now, before in zip(told, self.told, strict=True))
        self.told = told
        return {
            "requests_per_s": asked / seconds if seconds else 0.0,
            "batch_fill": rows / batches / self.batcher.batch if batches else 0.0,
            "batch_wait_ms": 1e3 * sum(self.waited) / len(self.waited) if self.waited else 0.0,
            "predictors": self.in_use,
            **({"credit": self.trajectories.credit} if self.trajectories else {}),
        }
