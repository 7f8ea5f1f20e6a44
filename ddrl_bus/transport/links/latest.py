"""The two ends of a `latest`.

XPUB → SUB      [topic, msgpack chunk head, chunk body]; an empty body is a beacon
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter_ns
from typing import Any, Final

import msgpack

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import Backend, SocketKind
from ddrl_bus.transport.links.end import End, Host, subscription, topic
from ddrl_bus.transport.sessions.latest import BEACON_EVERY_S, LatestPublisher, LatestSubscriber, Version
from ddrl_bus.transport.wire import Arena, Buffer, Message

ALL: Final = b"A"
"""The topic of what goes to every subscriber; each has one of its own for its snapshot."""


class Publisher(End):
    """The publishing end of a `latest`: binds an XPUB that keeps the last value for whoever joins."""

    def __init__(self, host: Host, backend: Backend, link: str, binds: Sequence[str]) -> None:
        super().__init__(host, link)
        self._core = LatestPublisher()
        self._messages, self._bytes = self._counter("messages_out"), self._counter("bytes_out")
        self._encode_ns = self._counter("encode_ns")
        self._beacon_at = 0.0
        self._socket = self._open(backend, SocketKind.XPUB, self._on_subscription, bind=binds)

    def publish(self, number: int, arena: Arena, fields: Mapping[str, Any]) -> None:
        """Replace the value; never waits. Nobody may write to `arena` any more.

        Raises:
            ValueError: `number` is not above the last one of this life.
        """
        self._ensure_open()
        began = perf_counter_ns()
        value = arena.encode(self._node, self._epoch, number, fields)
        chunks = self._core.publish((self._epoch, number), value)
        for chunk in chunks:
            self._socket.send(ALL, msgpack.packb(chunk.head), chunk.body)
        self._encode_ns.add(perf_counter_ns() - began)
        self._messages.add()
        self._bytes.add(len(value))

    def relay(self, version: Version, value: memoryview) -> None:
        """Replace the value by a frame of somebody else's, under the version that it has there.

        Raises:
            ValueError: `version` is not above the last one.
        """
        self._ensure_open()
        for chunk in self._core.publish(version, value):
            self._socket.send(ALL, msgpack.packb(chunk.head), chunk.body)
        self._messages.add()
        self._bytes.add(len(value))

    def _on_subscription(self, parts: list[Buffer]) -> None:
        joined = subscription(parts, b"S")
        if joined is None:
            if bytes(parts[0]) not in (b"\x01A", b"\x00A") and bytes(parts[0][:1]) != b"\x00":
                self._reject(self._socket, "hello")
            return
        if not self._may_speak(self._socket, joined[0]):
            return
        for chunk in self._core.snapshot():
            self._socket.send(topic(b"S", *joined), msgpack.packb(chunk.head), chunk.body)
        self._counter("snapshots").add()

    def _poll(self, now: float) -> None:
        if self._core.version is not None and now >= self._beacon_at:
            self._beacon_at = now + BEACON_EVERY_S
            self._socket.send(ALL, msgpack.packb([*self._core.version, 0, 0, 0]), b"")


class Subscriber(End):
    """The subscribing end of a `latest`, towards one publisher."""

    def __init__(self, host: Host, backend: Backend, link: str, address: str) -> None:
        super().__init__(host, link)
        self._core = LatestSubscriber(self._loop.time())
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._decode_ns, self._superseded = self._counter("decode_ns"), self._counter("superseded")
        self._fresh: Message | None = None
        self._own = topic(b"S", self._node, self._epoch)
        self._socket = self._open(backend, SocketKind.SUB, self._on_message, connect=[address])
        self._socket.subscribe(ALL)
        self._socket.subscribe(self._own)

    def latest(self) -> Message | None:
        """The newest value if it was not taken yet; `(epoch, seq)` is its version."""
        message, self._fresh = self._fresh, None
        return message

    async def next(self) -> Message:
        """The newest value not taken yet, waiting for one.

        Raises:
            LinkClosedError: this end was closed.
        """
        while self._fresh is None:
            self._ensure_open()
            await self._signal.wait()
        message, self._fresh = self._fresh, None
        return message

    async def next_value(self) -> tuple[Version, memoryview]:
        """As `next`, but its version and its frame.

        Raises:
            LinkClosedError: this end was closed.
        """
        await self.next()
        return self._value

    def _on_message(self, parts: list[Buffer]) -> None:
        began = perf_counter_ns()
        try:
            message = self._assemble(parts)
        except WireError as error:
            self._refuse(error.reason)
            return
        if message is None:
            return
        if self._fresh is not None:
            self._superseded.add()
        self._fresh = message
        self._messages.add()
        self._bytes.add(message.nbytes)
        self._decode_ns.add(perf_counter_ns() - began)
        self._signal.notify()

    def _assemble(self, parts: list[Buffer]) -> Message | None:
        if len(parts) != 3:
            raise WireError("parts", f"{len(parts)} parts, expected topic, head and body")
        head, body, now = wire.unpack(parts[1]), memoryview(parts[2]), self._loop.time()
        if len(body) == 0:
            if not isinstance(head, list) or len(head) != 5 or any(type(n) is not int for n in head):
                raise WireError("chunk", "a beacon holds five integers")
            self._core.beacon((head[0], head[1]), now)
            return None
        complete = self._core.chunk(head, body, now)
        if complete is None:
            return None
        version, value = complete
        message = wire.decode(value)
        if (message.epoch, message.seq) != version:
            raise WireError("torn", f"value of version {(message.epoch, message.seq)} sent as {version}")
        self._value = complete
        return message

    def _poll(self, now: float) -> None:
        if self._core.poll(now):
            self._socket.unsubscribe(self._own)
            self._socket.subscribe(self._own)
            self._counter("snapshots_asked").add()
