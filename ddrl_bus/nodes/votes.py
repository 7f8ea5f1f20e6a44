"""What replicas of a learner tell one another over `sync`: who is ready for which update, and what it came to.

A vote is a promise: its learner goes through with every update up to `ready`, so that whoever has heard all of them may
begin, and nobody is waited for inside a collective.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final

from ddrl_bus.errors import DivergedError
from ddrl_bus.messages import Group, Vote, fields_of, parse
from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.links import Subscriber
from ddrl_bus.transport.wire import Arena

REMEMBERED: Final = 4
"""Updates whose digests a vote holds; nobody is that far ahead of anybody."""


class Votes:
    """This replica's votes, and the newest of all others."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.changed = asyncio.Event()
        self.group = Group(0, {}, "")
        """Whose votes count."""
        self.mine = Vote(0, 0, 0, held=False)
        self._publisher = node.open_publisher("sync")
        self._others = {name: node.open_subscriber("sync", name) for name in node.ports["sync"].peers}
        self._heard: dict[str, tuple[int, Vote]] = {}
        self._digests: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._said = 0

    def begin(self, group: Group) -> None:
        """Nothing that was said in an earlier group counts."""
        self.group = group
        self._digests.clear()

    def say(self, ready: int, rows: int, *, held: bool) -> None:
        """Tell the others, if it is news."""
        vote = Vote(self.group.generation, ready, rows, held, list(self._digests))
        if vote != self.mine:
            self.mine = vote
            self._said += 1
            self._publisher.publish(self._said, Arena.of(Vote.KIND, {}), fields_of(vote))

    def made(self, update: int, digest: int) -> None:
        """This update was made, and left parameters of this digest.

        Raises:
            DivergedError: they are not what another replica has.
        """
        self._digests.append((update, digest))
        for name in self._heard:
            self._compare(name)

    # ---- what all say

    def ready(self, update: int) -> bool:
        """Whether every member goes through with `update`, and what it made of the last ones has been compared."""
        return all(vote.ready >= update and _compared(vote, update) for vote in self._members())

    def done(self, update: int) -> int:
        """Members that are ready for `update`."""
        return sum(vote.ready >= update for vote in self._members())

    def rows(self) -> int:
        """Environment steps of the batches that all members are ready with."""
        return sum(vote.rows for vote in self._members())

    def quiet(self, update: int) -> bool:
        """Whether `update` will not be made, for nobody promises any more."""
        return all(vote.held for vote in self._members()) and not self.ready(update)

    def _members(self) -> list[Vote]:
        """The votes of this group's members; of those that said nothing in it yet, an empty one."""
        votes = []
        for name, epoch in self.group.members.items():
            heard_epoch, vote = (epoch, self.mine) if name == self.node.name else self._heard.get(name, (0, _NOTHING))
            counts = heard_epoch == epoch and vote.generation == self.group.generation
            votes.append(vote if counts else _NOTHING)
        return votes

    # ---- what others say

    async def listen(self) -> None:
        """Hear the others, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for name, subscriber in self._others.items():
                tasks.create_task(self._hear(name, subscriber), name=f"{self.node.name}.hear.{name}")

    async def _hear(self, name: str, subscriber: Subscriber) -> None:
        while True:
            message = await subscriber.next()
            self._heard[name] = message.epoch, parse(Vote, message)
            self._compare(name)
            self.changed.set()

    def _compare(self, name: str) -> None:
        epoch, vote = self._heard[name]
        if vote.generation != self.group.generation or self.group.members.get(name) != epoch:
            return
        theirs, mine = dict(vote.digests), dict(self._digests)
        for update in sorted(theirs.keys() & mine.keys()):
            if theirs[update] != mine[update]:
                ours, expected = (f"{digest:016x}" for digest in (mine[update], theirs[update]))
                raise DivergedError(
                    f"{self.node.name}: parameters of digest {ours} after update {update}, expected {expected}, which "
                    f"{name} has: replicas must stay equal"
                )


_NOTHING: Final = Vote(0, 0, 0, held=False)


def _compared(vote: Vote, update: int) -> bool:
    """Whether a vote tells of the update before the last, unless its group began later."""
    return not vote.digests or vote.digests[-1][0] >= update - 2
