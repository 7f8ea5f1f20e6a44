"""The seam between links and networks: six kinds of socket, and what a link end asks of them.

A `Backend` makes sockets for one address scheme; `zeromq.py` has ipc and tcp, `memory.py` one event loop. They know
nothing of links: `links.py` builds the six link ends on these few verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Protocol

from ddrl_bus.errors import UsageError
from ddrl_bus.transport.wire import Buffer

OnMessage = Callable[[list[Buffer]], None]
"""Called in the event loop with the parts of each message; a ROUTER's first part names the peer."""

PEOPLE: Final = "people."
"""Begins the name of who asks and is no node, whose name has no dot."""
SCHEMES: Final = ("memory", "ipc", "tcp")


class SocketKind(Enum):
    PUSH = "push"
    PULL = "pull"
    XPUB = "xpub"
    SUB = "sub"
    DEALER = "dealer"
    ROUTER = "router"


class Socket(Protocol):
    @property
    def speakers(self) -> frozenset[str] | None:
        """The nodes in whose name the message that is being handed over may speak; None: anybody's, it is local."""

    def blame(self) -> None:
        """The message that is being handed over was refused: who sends many such is shut out."""

    def send(self, *parts: Buffer) -> bool:
        """Send one message without waiting. False: no room now, nothing was sent. Never touch the parts again."""

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call back once, when `send` may succeed again."""

    def subscribe(self, topic: bytes) -> None:
        """SUB only: ask for messages whose first part starts with `topic`; the publisher sees the topic."""

    def unsubscribe(self, topic: bytes) -> None: ...

    def close(self) -> None:
        """Release it; what is still unsent gets a short, bounded time."""


class Backend(Protocol):
    def socket(
        self,
        kind: SocketKind,
        on_message: OnMessage | None,
        *,
        bind: Sequence[str] = (),
        connect: Sequence[str] = (),
        link: str = "",
    ) -> Socket:
        """A socket of a link that is read for its whole life by one pump, which calls `on_message`.

        Raises:
            AddressInUseError: another socket holds a `bind` address.
        """

    def close(self) -> None: ...


def scheme(address: str) -> str:
    """The scheme of `address`.

    Raises:
        UsageError: it is none of ours.
    """
    name, separator, _ = address.partition("://")
    if not separator or name not in SCHEMES:
        raise UsageError(f"address {address!r}: expected one of {', '.join(s + '://' for s in SCHEMES)}")
    return name


def back_channel(address: str) -> str:
    """Where a queue's receiver at `address` publishes its credits: the next tcp port, or `.c` after the name."""
    if scheme(address) == "tcp":
        host, _, port = address.rpartition(":")
        return f"{host}:{int(port) + 1}"
    return address + ".c"
