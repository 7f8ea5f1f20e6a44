"""A learner that trains together with its like, without a server: DD-PPO (Wijmans et al. 2020, arXiv 1911.00357), and
IMPALA or APPO with several learners.

    batch ─→ vote ─→ everybody has voted ─→ gradient ─→ sum over all ─→ the same step everywhere ─→ digest ─→ vote …

Votes travel on the bus, sums through torch.distributed. Who belongs to the group is the controller's to say, and it
changes between two updates only. A collective that somebody does not come to fails at all others, who meet anew without
them; then those who are behind take everything from one who is furthest. That is also how a learner joins.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Any, Final

import numpy as np

from ddrl_bus.algos.lazy import torch
from ddrl_bus.errors import DivergedError, FencedError, LostReplicaError
from ddrl_bus.experience import Slot
from ddrl_bus.messages import Group, Replica, Tally, fields_of
from ddrl_bus.metrics import clock
from ddrl_bus.nodes.collective import Collective, Rendezvous
from ddrl_bus.nodes.learner import Learner, Updated
from ddrl_bus.nodes.trainer import Snapshot
from ddrl_bus.nodes.votes import Votes
from ddrl_bus.topology.schema import split_address
from ddrl_bus.transport.wire import Arena, Array, decode

LOOPBACK: Final = "127.0.0.1"


class ReplicaLearner(Learner):
    async def start(self) -> None:
        options: Any = self.node.options
        self.deadline: float = options.deadline
        self.votes = Votes(self)
        self.tally = self.open_publisher("tally") if "tally" in self.ports else None
        self.told = Tally(0, 0, 0)
        self.tallies = 0
        self.made = 0  # updates, as far as the event loop knows
        self.promised = 0
        self.formed = False
        self.collective: Collective | None = None
        self.digests: deque[tuple[int, int]] = deque()  # of updates that the event loop does not know of yet
        self.failed: list[Slot] = []  # what was under way when the group failed
        self.failed_at = 0  # environment steps before the first of it
        self.failure: LostReplicaError | None = None
        await super().start()
        self.clocks |= {name: clock(self.ledger, name) for name in ("all_reduce", "replicas_wait")}
        self.trainer.saves = False
        self.rendezvous = await self.compute(Rendezvous, self._address(), self.deadline)
        self.replica = Replica(self.rendezvous.address)
        self.report()

    def _address(self) -> str:
        """Of this host, as the other replicas dial it."""
        hosts = {self.plan.nodes[name].host for name in (self.name, *self.ports["sync"].peers)}
        split = split_address(self.plan.hosts[self.node.host])
        return split[0] if split and len(hosts) > 1 else LOOPBACK

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            hearing = [tasks.create_task(work) for work in (self.votes.listen(), self._heed())]
            while not self.formed and not self.draining.is_set():
                await self._meet()
            await super().run()
            for task in hearing:
                task.cancel()
        if self.collective is not None:
            self.collective.close()

    async def _heed(self) -> None:
        """Act on what others say."""
        while True:
            await self.votes.changed.wait()
            self.votes.changed.clear()
            self._train_ahead()
            self.batch_ready.set()  # there may be reason to train no more, and to attend

    # ---- training

    def _train_ahead(self) -> None:
        if self.formed:
            self._vote()
            super()._train_ahead()
            self._tell_actor()

    def _may_train(self) -> bool:
        """As soon as all have voted for it: not even who was told to hold still meanwhile breaks a promise."""
        update = self.made + len(self.training) + 1
        return update <= self.promised and not self.failed and self._new_group() is None and self.votes.ready(update)

    def _next(self) -> Slot:
        slot = super()._next()
        slot.env_steps = self.votes.rows()
        return slot

    def _vote(self) -> None:
        under_way = len(self.training) * self.source.rows * len(self.votes.group.members)
        held = self.trainer.held or self.trainer.spent(under_way) or bool(self.failed)
        if not held:
            self.promised = self.made + len(self.training) + len(self.ready)
        self.votes.say(self.promised, self.ready[0].steps if self.ready else self.votes.mine.rows, held=held)

    def _tell_actor(self) -> None:
        """How many have played their rollouts for the next update."""
        tally = Tally(self.made + 1, self.votes.done(self.made + 1), len(self.votes.group.members))
        if self.tally is not None and tally != self.told:
            self.told, self.tallies = tally, self.tallies + 1
            self.tally.publish(self.tallies, Arena.of(Tally.KIND, {}), fields_of(tally))

    async def _attend(self) -> None:
        """Between two updates."""
        self.control_changed.clear()
        self.batch_ready.clear()
        if not self.formed or self._new_group() is not None:
            if await self._meet():
                self.trainer.publish(await self.compute(self.trainer.snapshot))
            return
        if self.votes.quiet(self.made + 1):
            await self.trainer.attend()
        with self.clocks["replicas_wait" if self.ready else "queue_wait"]:
            await self.until(self.batch_ready.wait(), self.draining, self.control_changed)

    def _updated(self, updated: Updated) -> None:
        slot, _ = updated
        if any(slot is each for each in self.failed):
            self.training.popleft()
            if not self.training and self.failure is not None:
                self._lost(self.failure)
            return
        self.made += 1
        self.votes.made(*self.digests.popleft())
        super()._updated(updated)
        self._train_ahead()

    def _due(self) -> Snapshot | None:
        return super()._due() if self._publishes() else None

    def _publishes(self) -> bool:
        """Whether anybody listens: to the one that leads all others, to each the actors in its own process."""
        return self.trainer.saves or self.node.bundle is not None

    # ---- the group

    def _new_group(self) -> Group | None:
        """A group that we belong to, and are not yet in.

        Raises:
            FencedError: a newer life of this node belongs to it.
        """
        group = self.control.group
        if group is None or group.generation <= self.votes.group.generation or self.name not in group.members:
            return None
        if group.members[self.name] > self.epoch:
            raise FencedError(f"a newer life of {self.name} is in generation {group.generation} of the learners")
        return group if group.members[self.name] == self.epoch else None

    async def _meet(self) -> bool:
        """Form the group that the controller wants, once it wants one; says whether our weights are news to anybody."""
        if (group := self._new_group()) is None:
            await self.until(self.control_changed.wait(), self.draining)
            self.control_changed.clear()
            return False
        self.formed = False
        self.votes.begin(group)
        try:
            await self.compute(self._form, group)
        except LostReplicaError as lost:
            self._lost(lost)
            return False
        led, self.trainer.saves = self.trainer.saves, next(iter(group.members)) == self.name
        advanced = self.algo.updates - self.made
        self.made = self.promised = self.algo.updates
        self._settle_failed()
        self.formed = True
        self._stand(group=group)
        self.log.info("generation=%d of=%s updates=%d", group.generation, ",".join(group.members), self.made)
        return advanced > 0 or self.trainer.saves > led

    def _settle_failed(self) -> None:
        """The first of what was under way was made to count, by us or by others, or all of it is to be done again; but
        what has become too old. Others who went on without us counted other steps."""
        slots, self.failed, self.failure = self.failed, [], None
        if slots and self.algo.env_steps == self.failed_at + slots[0].env_steps:
            self.source.trained(slots[0])
            self._free(slots.pop(0))
        self.ready.extendleft(reversed(slots))
        if (max_lag := self.ports["trajectories"].link.max_lag) is not None:
            oldest = self.algo.updates - max_lag
            waiting = list(self.ready)
            self.ready.clear()
            for slot in waiting:
                if slot.version[: slot.length].min() >= oldest:
                    self.ready.append(slot)
                else:
                    self.source.refuse(slot, "stale")
                    self._free(slot)

    def _lost(self, lost: LostReplicaError) -> None:
        """Have the controller look who is left."""
        self.log.warning("%s", lost)
        self.formed = False
        self._stand(broken=self.votes.group.generation)

    def _stand(self, **changes: Any) -> None:
        """Tell the controller where we stand."""
        assert self.replica is not None
        self.replica = replace(self.replica, **changes)
        self.report()

    def gauge(self) -> dict[str, float]:
        return {**super().gauge(), "replicas": len(self.votes.group.members), "generation": self.votes.group.generation}

    # ---- on the compute thread

    def _form(self, group: Group) -> None:
        if self.collective is not None:
            self.collective.close()
        ranks = list(group.members)
        self.collective = Collective(
            group.store,
            group.generation,
            ranks.index(self.name),
            len(ranks),
            self._address(),
            self.algo.device,
            self.deadline,
            lambda: self.control.group is not None and self.control.group.generation > group.generation,
        )
        self.algo.all_reduce = self._sum if len(ranks) > 1 else None
        self._agree(self.collective)

    def _agree(self, collective: Collective) -> None:
        """Have what one of those has who are furthest."""
        told = collective.gather([self.algo.gradient_steps, self.algo.digest()])
        source = max(range(collective.world), key=lambda rank: (told[rank][0], -rank))
        if all(each == told[source] for each in told):
            return
        if collective.rank == source:
            collective.broadcast(_packed(self.algo.state()), source)
            return
        self.algo.load_state(decode(collective.broadcast(None, source).tobytes()).arrays)
        if (digest := self.algo.digest()) != told[source][1]:
            raise DivergedError(
                f"{self.name}: parameters of digest {digest:016x} came, rank {source} has {told[source][1]:016x}"
            )

    def _sum(self, tensor: torch.Tensor) -> None:
        assert self.collective is not None
        with self.clocks["all_reduce"]:
            self.collective.sum(tensor)

    def _update(self, slot: Slot) -> Updated:
        """An update that breaks off counts if anything of it was applied; what is left of its passes is left out."""
        before = self.algo.gradient_steps
        try:
            updated = super()._update(slot)
        except LostReplicaError as lost:
            if not self.failed:
                self.failed_at = self.algo.env_steps
            if self.algo.gradient_steps > before:
                self.algo.count(slot.env_steps)
            self.failure = lost
            self.failed.append(slot)
            return slot, None
        self.digests.append((self.algo.updates, self.algo.digest()))
        return updated


def _packed(arrays: dict[str, Array]) -> Array:
    """As one array of bytes."""
    return np.frombuffer(Arena.of("state", arrays).encode("", 0, 0, {}), np.uint8).copy()
