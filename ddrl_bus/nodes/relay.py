"""The relay: one copy of another host's weights for all who act by them on this one.

    learner ─ tcp ─→ newest frame, as it came ─ ipc ─→ actors, inference, evaluator

It decodes nothing. A value keeps the version of its origin, so that to a subscriber a new life of the relay is nothing
new, and the weights never go back. For each learner that may publish it has an address of its own, for whoever follows
the one that leads.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from ddrl_bus.nodes.base import Node
from ddrl_bus.transport.links import Publisher


class Relay(Node):
    role: ClassVar[str] = "relay"

    async def start(self) -> None:
        self.publishers: dict[tuple[str, str], Publisher] = {
            (link, origin): self.bus.publisher(link, [address])
            for link, port in self.ports.items()
            if port.link.relay
            for origin, address in zip(port.peers, port.binds, strict=True)
        }

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            forwarding = [tasks.create_task(self._forward(link, origin)) for link, origin in self.publishers]
            await self.draining.wait()
            for task in forwarding:
                task.cancel()

    async def _forward(self, link: str, origin: str) -> None:
        await self._leads(origin)
        subscriber = self.open_subscriber(link, origin)
        while True:
            version, value = await subscriber.next_value()
            self.publishers[link, origin].relay(version, value)

    async def _leads(self, origin: str) -> None:
        """Wait until it does: what the other replicas of a learner publish is for their own processes."""
        while "sync" in self.plan.links:
            self.control_changed.clear()
            if (group := self.control.group) is not None and next(iter(group.members)) == origin:
                return
            await self.control_changed.wait()
