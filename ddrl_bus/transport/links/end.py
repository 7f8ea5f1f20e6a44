"""What all six link ends share: a name, counters, a timer, waiters that are always woken, and topics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from ddrl_bus.errors import LinkClosedError
from ddrl_bus.transport.base import PEOPLE, Backend, OnMessage, Socket, SocketKind
from ddrl_bus.transport.ledger import Counter, Ledger
from ddrl_bus.transport.wire import Buffer, Message

POLL_S: Final = 0.1
"""How often a link end looks after its timers."""

Check = Callable[[Message], str | None]
"""Looks at a message before it is accepted; returns the reason to refuse it, or None."""

_TOPIC: Final = re.compile(rb"([QS])([A-Za-z0-9_.-]{1,64})\x00([0-9a-f]{16})\x00")


def life(node: str, epoch: int) -> str:
    """One life of a node, as lanes and topics name it."""
    return f"{node}@{epoch:016x}"


def topic(letter: bytes, node: str, epoch: int) -> bytes:
    return letter + node.encode() + b"\x00" + f"{epoch:016x}".encode() + b"\x00"


def subscription(parts: Sequence[Buffer], letter: bytes) -> tuple[str, int] | None:
    """(node, epoch) of a new subscription to a topic of this letter; None for an unsubscription or garbage."""
    data = bytes(parts[0])
    match = _TOPIC.fullmatch(data[1:]) if len(parts) == 1 and data[:1] == b"\x01" else None
    if match is None or match[1] != letter:
        return None
    return match[2].decode(), int(match[3], 16)


class Host(Protocol):
    """What a link end needs of the bus that made it."""

    node: str
    epoch: int
    ledger: Ledger


class Signal:
    """Wakes whoever waits. It carries no data, so a cancelled waiter loses nothing."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(future)
        try:
            await future
        finally:
            self._waiters.discard(future)

    def notify(self, error: Exception | None = None) -> None:
        for future in self._waiters:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


class End:
    """What all six share: a name, counters, a timer, an orderly end."""

    def __init__(self, host: Host, link: str) -> None:
        self.link = link
        self._node = host.node
        self._epoch = host.epoch
        self._ledger = host.ledger
        self._loop = asyncio.get_running_loop()
        self._signal = Signal()
        self._sockets: list[Socket] = []
        self._closed = False
        self._timer = self._loop.call_later(POLL_S, self._tick)

    def _open(
        self,
        backend: Backend,
        kind: SocketKind,
        on_message: OnMessage | None,
        *,
        bind: Sequence[str] = (),
        connect: Sequence[str] = (),
    ) -> Socket:
        try:
            socket = backend.socket(kind, on_message, bind=bind, connect=connect, link=self.link)
        except Exception:
            self.close()  # half an end would hold its addresses and tick on
            raise
        self._sockets.append(socket)
        return socket

    def _tick(self) -> None:
        self._timer = self._loop.call_later(POLL_S, self._tick)
        self._poll(self._loop.time())

    def _poll(self, now: float) -> None:
        """Look after timers."""

    def _counter(self, *path: str) -> Counter:
        return self._ledger.counter(self.link, *path)

    def _refuse(self, reason: str) -> None:
        """Count bytes that belong to no lane: garbage, strangers, zombies."""
        self._counter("stray", reason).add()

    def _reject(self, socket: Socket, reason: str) -> None:
        """Refuse what no honest peer sends."""
        self._refuse(reason)
        socket.blame()

    def _may_speak(self, socket: Socket, node: str) -> bool:
        """Whether whoever sent what `socket` hands over now may speak for this node; else it is refused."""
        speakers = socket.speakers
        if speakers is None or node in speakers or (node.startswith(PEOPLE) and PEOPLE in speakers):
            return True
        self._reject(socket, "rights")
        return False

    def _ensure_open(self) -> None:
        if self._closed:
            raise LinkClosedError(f"{self.link}: this end of {self._node} is closed")

    def close(self) -> None:
        """Release sockets and timer; whoever waits gets LinkClosedError."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        for socket in self._sockets:
            socket.close()
        self._signal.notify(LinkClosedError(f"{self.link}: this end of {self._node} closed"))
