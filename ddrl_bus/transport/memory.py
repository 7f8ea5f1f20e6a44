"""`memory://`: the same sockets between nodes of one event loop, for bundles, breakpoints and quick tests.

Frames pass through the same codec; the receiver sees the sender's buffer, read-only. Messages are handed over by the
loop in the order sent, never within `send`. The semantics are ZeroMQ's: PUSH holds back what nobody can take yet, SUB
announces its topics, XPUB drops what nobody asked for, ROUTER knows its peers by number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Final

from ddrl_bus.errors import AddressInUseError
from ddrl_bus.transport.base import OnMessage, SocketKind
from ddrl_bus.transport.wire import Buffer

_SUBSCRIBE: Final = b"\x01"


class MemoryHub:
    """The addresses of one event loop: which socket is bound where, and who wants to connect."""

    def __init__(self) -> None:
        self._bound: dict[str, MemorySocket] = {}
        self._sockets: list[MemorySocket] = []
        self._identities = count(1)

    def socket(
        self,
        kind: SocketKind,
        on_message: OnMessage | None,
        *,
        bind: Sequence[str] = (),
        connect: Sequence[str] = (),
        link: str = "",
    ) -> MemorySocket:
        for address in bind:
            if address in self._bound:
                raise AddressInUseError(f"cannot bind {address}: another node of this process holds it")
        identity = next(self._identities).to_bytes(5, "big")
        socket = MemorySocket(self, kind, on_message, identity, tuple(connect))
        self._bound.update(dict.fromkeys(bind, socket))
        self._sockets.append(socket)
        for address in bind:
            for other in self._sockets:
                if address in other.targets:
                    other.joined(socket)
        for address in connect:
            if (peer := self._bound.get(address)) is not None:
                socket.joined(peer)
        return socket

    def targets(self, addresses: Iterable[str]) -> list[MemorySocket]:
        return [self._bound[address] for address in addresses if address in self._bound]

    def peer(self, identity: bytes) -> MemorySocket | None:
        return next((s for s in self._sockets if s.identity == identity), None)

    def subscribers(self, publisher: MemorySocket) -> list[MemorySocket]:
        return [s for s in self._sockets if publisher in self.targets(s.targets)]

    def forget(self, socket: MemorySocket) -> None:
        self._sockets = [s for s in self._sockets if s is not socket]
        self._bound = {address: s for address, s in self._bound.items() if s is not socket}

    def close(self) -> None:
        """Each node closes its own sockets; the hub outlives them."""


class MemorySocket:
    speakers: frozenset[str] | None = None

    def __init__(
        self,
        hub: MemoryHub,
        kind: SocketKind,
        on_message: OnMessage | None,
        identity: bytes,
        targets: tuple[str, ...],
    ) -> None:
        self.identity = identity
        self.targets = targets
        self.topics: list[bytes] = []
        self._hub = hub
        self._kind = kind
        self._on_message = on_message
        self._waiting: list[Callable[[], None]] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False

    def send(self, *parts: Buffer) -> bool:
        match self._kind:
            case SocketKind.XPUB:
                for subscriber in self._hub.subscribers(self):
                    if any(bytes(parts[0]).startswith(topic) for topic in subscriber.topics):
                        subscriber.deliver(list(parts))
                return True
            case SocketKind.ROUTER:
                peer = self._hub.peer(bytes(parts[0]))
                if peer is None:
                    return False
                peer.deliver(list(parts[1:]))
                return True
            case _:
                targets = self._hub.targets(self.targets)
                if not targets:
                    return False
                envelope: list[Buffer] = [self.identity] if self._kind is SocketKind.DEALER else []
                targets[0].deliver([*envelope, *parts])
                return True

    def deliver(self, parts: list[Buffer]) -> None:
        self._loop.call_soon(self._receive, parts)

    def _receive(self, parts: list[Buffer]) -> None:
        if not self._closed and self._on_message is not None:
            self._on_message(parts)

    def joined(self, peer: MemorySocket) -> None:
        """A peer at one of our targets is there now."""
        for topic in self.topics:
            peer.deliver([_SUBSCRIBE + topic])
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            self._loop.call_soon(callback)

    def blame(self) -> None:
        """Nodes of one process trust each other."""

    def when_writable(self, callback: Callable[[], None]) -> None:
        if self._hub.targets(self.targets):
            self._loop.call_soon(callback)
        else:
            self._waiting.append(callback)

    def subscribe(self, topic: bytes) -> None:
        self.topics.append(topic)
        for peer in self._hub.targets(self.targets):
            peer.deliver([_SUBSCRIBE + topic])

    def unsubscribe(self, topic: bytes) -> None:
        self.topics.remove(topic)

    def close(self) -> None:
        self._closed = True
        self._hub.forget(self)
