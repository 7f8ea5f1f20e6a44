"""A node's way onto the bus: opens link ends, picks the backend by address, closes everything in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from ddrl_bus.errors import UsageError
from ddrl_bus.transport.base import Backend, scheme
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Check, Client, Publisher, Receiver, Sender, Server, Subscriber
from ddrl_bus.transport.links.latest import SHARE_FROM
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.sessions.queue import OnLoss
from ddrl_bus.transport.wire import Codec

if TYPE_CHECKING:
    from ddrl_bus.transport.security import Guard

End = TypeVar("End", Sender, Receiver, Publisher, Subscriber, Client, Server)


class Bus:
    """All link ends of one life of one node. Open it inside the event loop that will run them.

    Args:
        node: the node's name.
        epoch: its life; a later life has a higher one.
        ledger: where the ends count.
        hub: makes `memory://` addresses available.
        guard: who may come over tcp; without one everybody may.
    """

    def __init__(
        self, node: str, epoch: int, ledger: Ledger, hub: MemoryHub | None = None, guard: Guard | None = None
    ) -> None:
        self.node = node
        self.epoch = epoch
        self.ledger = ledger
        self._hub = hub
        self._guard = guard
        self._zeromq: Backend | None = None
        self._ends: list[Sender | Receiver | Publisher | Subscriber | Client | Server] = []

    def sender(
        self,
        link: str,
        receivers: Mapping[str, str],
        on_loss: OnLoss = "count",
        codec: Codec = "auto",
        rate: float | None = None,
    ) -> Sender:
        return self._opened(Sender(self, self._backend(receivers.values()), link, receivers, on_loss, codec, rate))

    def receiver(
        self, link: str, binds: Sequence[str], window: int, on_loss: OnLoss = "count", check: Check | None = None
    ) -> Receiver:
        return self._opened(Receiver(self, self._backend(binds), link, binds, window, on_loss, check))

    def publisher(
        self,
        link: str,
        binds: Sequence[str],
        codec: Codec = "auto",
        rate: float | None = None,
        share_from: int = SHARE_FROM,
    ) -> Publisher:
        return self._opened(Publisher(self, self._backend(binds), link, binds, codec, rate, share_from))

    def subscriber(self, link: str, address: str) -> Subscriber:
        return self._opened(Subscriber(self, self._backend([address]), link, address))

    def client(self, link: str, address: str) -> Client:
        return self._opened(Client(self, self._backend([address]), link, address))

    def server(self, link: str, binds: Sequence[str]) -> Server:
        return self._opened(Server(self, self._backend(binds), link, binds))

    def close(self) -> None:
        """Close every end, then the sockets' context; bounded by their linger."""
        for end in self._ends:
            end.close()
        if self._zeromq is not None:
            self._zeromq.close()

    def _opened(self, end: End) -> End:
        self._ends.append(end)
        return end

    def _backend(self, addresses: Iterable[str]) -> Backend:
        schemes = {scheme(address) for address in addresses}
        if schemes == {"memory"}:
            if self._hub is None:
                raise UsageError("memory:// addresses join nodes of one process; this node runs alone")
            return self._hub
        if "memory" in schemes:
            raise UsageError(f"a link end cannot mix memory:// with {', '.join(sorted(schemes - {'memory'}))}")
        if self._zeromq is None:
            from ddrl_bus.transport.zeromq import ZmqBackend

            self._zeromq = ZmqBackend(self._guard)
        return self._zeromq
