"""The subscribing end of weights that several replicas of a learner could publish: it follows the one that leads."""

from __future__ import annotations

from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.links import Subscriber
from ddrl_bus.transport.wire import Message


class LeaderSubscriber:
    """Used like a `Subscriber`. The controller says who leads; another leader has the same parameters or newer."""

    def __init__(self, node: Node, link: str) -> None:
        self._node, self._link = node, link
        self._leader: str | None = None
        self._end: Subscriber | None = None

    def latest(self) -> Message | None:
        """The newest value if it was not taken yet."""
        self._follow()
        return self._end.latest() if self._end is not None else None

    async def next(self) -> Message:
        """The newest value not taken yet, waiting for one, and for a leader."""
        node = self._node
        while True:
            node.control_changed.clear()
            self._follow()
            if self._end is None:
                await node.control_changed.wait()
            elif (message := await node.until(self._end.next(), node.control_changed)) is not None:
                return message

    def _follow(self) -> None:
        group = self._node.control.group
        leader = next(iter(group.members)) if group is not None else self._leader
        if leader is None or leader == self._leader:
            return
        if self._end is not None:
            self._end.close()
        self._leader, self._end = leader, self._node.open_subscriber(self._link, leader)


def weights_of(node: Node) -> Subscriber | LeaderSubscriber:
    """The node's end of `weights`: its only learner's, or those of whoever leads."""
    several = len(node.ports["weights"].peers) > 1
    return LeaderSubscriber(node, "weights") if several else node.open_subscriber("weights")
