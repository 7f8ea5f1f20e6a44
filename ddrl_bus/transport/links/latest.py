"""The two ends of a `latest`.

XPUB → SUB      [`A`, head, body] to all subscribers of this host, and on an own topic to one who joins:
                    [epoch, number], frame          a small value, or any in this process
                    [epoch, number, file], -        it lies in shared memory; without a name it has to be fetched
                    [epoch, number], -              a beacon
                [own topic, chunk head, chunk body] to one who fetches
SUB → XPUB      subscriptions: `A`; the own topic; and the own topic with a question behind it, which the next one takes
                the place of. libzmq repeats the last one on a new connection, and takes it back when one is lost.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from time import perf_counter_ns, time_ns
from typing import Any, Final, NamedTuple

import msgpack

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import Backend, SocketKind, scheme
from ddrl_bus.transport.links.end import End, Host, topic
from ddrl_bus.transport.sessions.latest import (
    BEACON_EVERY_S,
    Ask,
    Chunk,
    LatestPublisher,
    LatestSubscriber,
    Life,
    Version,
)
from ddrl_bus.transport.shared import SharedSlots, SlotWriter
from ddrl_bus.transport.wire import Arena, Buffer, Codec, Message

ALL: Final = b"A"
"""The topic of what goes to every subscriber of this host; each has one of its own."""
SHARE_FROM: Final = 64 << 10
"""Bytes: what is larger reaches many sooner where it is shared (`ddrl bench sharing`)."""
_QUESTION: Final = re.compile(rb"([\x00\x01])S([A-Za-z0-9_.-]{1,64})\x00([0-9a-f]{16})\x00(?:([AF])([0-9.]+))?")


class _Question(NamedTuple):
    life: Life
    fetches: bool
    ask: Ask


class Publisher(End):
    """The publishing end of a `latest`: binds an XPUB that keeps the last value for whoever joins.

    Args:
        codec: delta: who fetches gets what is different from what it holds, compressed.
        rate: bytes a second that may leave to all who fetch together.
        share_from: bytes from which a value is shared on this host instead of sent.
    """

    def __init__(
        self,
        host: Host,
        backend: Backend,
        link: str,
        binds: Sequence[str],
        codec: Codec = "auto",
        rate: float | None = None,
        share_from: int = SHARE_FROM,
    ) -> None:
        super().__init__(host, link)
        self._share_from = share_from
        self._core = LatestPublisher(codec == "delta", rate, self._loop.time())
        self._throttle: asyncio.TimerHandle | None = None
        self._throttled_ns = self._counter("throttled_ns")
        self._messages, self._encode_ns = self._counter("messages_out"), self._counter("encode_ns")
        self._bytes, self._values = self._counter("bytes_out"), self._counter("value_bytes_out")
        self._beacon_at = 0.0
        self._audience = False
        """Whether anybody on this host listens to `ALL`."""
        self._announced: tuple[bytes, Buffer] | None = None
        self._slots: SlotWriter | None = None
        self._socket = self._open(backend, SocketKind.XPUB, self._on_subscription, bind=binds)
        near = next((address for address in binds if scheme(address) != "tcp"), None)
        self._by_reference = near is not None and scheme(near) == "memory"
        if near is not None and not self._by_reference:
            self._slots = SlotWriter(near, self._epoch)

    def publish(self, number: int, arena: Arena, fields: Mapping[str, Any]) -> None:
        """Replace the value; never waits. Nobody may write to `arena` any more.

        Raises:
            ValueError: `number` is not above the last one of this life.
        """
        self._ensure_open()
        began = perf_counter_ns()
        self.relay((self._epoch, number), arena.encode(self._node, self._epoch, number, fields))
        self._encode_ns.add(perf_counter_ns() - began)

    def relay(self, version: Version, value: memoryview) -> None:
        """Replace the value by a frame as somebody else published it, under the version that it has from there.

        Raises:
            ValueError: `version` is not newer than the last one.
        """
        self._ensure_open()
        self._core.publish(version, value)
        self._announced = None
        self._messages.add()
        if self._audience:
            self._announce(ALL)
        for one in self._core.fetching:
            self._send_more(one)

    def _announce(self, to: bytes) -> None:
        head, body = self._announced = self._announced or self._announcement()
        self._socket.send(to, head, body)
        self._bytes.add(len(body))
        self._values.add(len(self._core.value))

    def _announcement(self) -> tuple[bytes, Buffer]:
        assert self._core.version is not None
        version, value = self._core.version, self._core.value
        if self._by_reference or len(value) < self._share_from:
            return msgpack.packb(version), value
        return msgpack.packb([*version, (self._slots and self._slots.write(value)) or ""]), b""

    def _send_more(self, to: Life) -> None:
        for chunk in self._core.more(to, self._loop.time()):
            self._send_chunk(to, chunk)
            if chunk.last:
                self._values.add(chunk.payload.value)
        self._wait_for_rate()

    def _wait_for_rate(self) -> None:
        now = self._loop.time()
        if self._throttle is None and (wait_s := self._core.throttled_s(now)) is not None:
            self._throttle = self._loop.call_later(wait_s, self._go_on, now)

    def _go_on(self, since: float) -> None:
        self._throttle = None
        self._throttled_ns.add(round((self._loop.time() - since) * 1e9))
        while self._core.throttled_s(self._loop.time()) == 0:
            self._send_more(self._core.turn())
        self._wait_for_rate()

    def _send_chunk(self, to: Life, chunk: Chunk) -> None:
        self._socket.send(topic(b"S", *to), msgpack.packb(chunk.head), chunk.body)
        self._bytes.add(len(chunk.body))

    def _on_subscription(self, parts: list[Buffer]) -> None:
        said = bytes(parts[0])
        if said[1:] == ALL:
            self._audience = said[:1] == b"\x01"
            return
        match = _QUESTION.fullmatch(said) if len(parts) == 1 else None
        if match is None:
            if said[:1] != b"\x00":
                self._reject(self._socket, "hello")
        elif match[4] is not None:
            self._on_question(match[1] == b"\x01", _question(match))

    def _on_question(self, asked: bool, question: _Question | None) -> None:
        if question is None:
            if asked:
                self._reject(self._socket, "hello")
            return
        if not asked:
            self._core.gone(question.life, question.ask)
            return
        if not self._may_speak(self._socket, question.life[0]):
            return
        self._counter("questions").add()
        if question.fetches:
            if self._core.asked(question.life, question.ask, self._loop.time()):
                self._send_more(question.life)
            else:
                self._refuse("crowd")
        elif self._core.version is not None and self._core.version > question.ask.held:
            self._announce(topic(b"S", *question.life))

    def _poll(self, now: float) -> None:
        if self._core.version is None or now < self._beacon_at:
            return
        self._beacon_at = now + BEACON_EVERY_S
        if self._audience:
            self._socket.send(ALL, msgpack.packb(self._core.version), b"")
        for one in self._core.fetching:
            for chunk in self._core.beacon(one):
                self._send_chunk(one, chunk)

    def close(self) -> None:
        super().close()
        if self._throttle is not None:
            self._throttle.cancel()
        if self._slots is not None:
            self._slots.close()


def _question(match: re.Match[bytes]) -> _Question | None:
    ask = Ask.parsed(match[5])
    return ask and _Question((match[2].decode(), int(match[3], 16)), match[4] == b"F", ask)


class Subscriber(End):
    """The subscribing end of a `latest`, towards one publisher.

    A value may lie where the publisher will write others: have `shared.read` look at it.
    """

    def __init__(self, host: Host, backend: Backend, link: str, address: str) -> None:
        super().__init__(host, link)
        self._address = address
        self._near = scheme(address) != "tcp"
        self._core = LatestSubscriber(self._loop.time(), fetches=not self._near)
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._values = self._counter("value_bytes_in")
        self._decode_ns, self._wire_ns = self._counter("decode_ns"), self._counter("wire_ns")
        self._superseded = self._counter("superseded")
        self._fresh: Message | None = None
        self._frame: memoryview | None = None
        self._file: tuple[str, SharedSlots | None] = ("", None)
        """The last that was named; None: it cannot be had here."""
        self._own = topic(b"S", self._node, self._epoch)
        self._asked = b""
        self._socket = self._open(backend, SocketKind.SUB, self._on_message, connect=[address])
        if self._near:
            self._socket.subscribe(ALL)
        self._socket.subscribe(self._own)
        self._ask(self._loop.time())

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
        """As `next`, but the frame as it was published, a private copy, under its version: to be published again."""
        message = await self.next()
        if message.slots is None:
            assert self._frame is not None
            return (message.epoch, message.seq), self._frame
        frame = message.slots.copied()
        message = wire.decode(frame)
        return (message.epoch, message.seq), frame

    def _on_message(self, parts: list[Buffer]) -> None:
        began, now = perf_counter_ns(), self._loop.time()
        try:
            message = self._taken(parts, now)
        except WireError as error:
            self._refuse(error.reason)
            message = None
        self._ask(now)
        if message is None:
            return
        if self._messages.value:  # the first was there before us, for how long says nothing of the way
            self._wire_ns.add(max(0, time_ns() - message.sent_at))
        if self._fresh is not None:
            self._superseded.add()
        self._fresh = message
        self._messages.add()
        self._values.add(message.nbytes)
        self._decode_ns.add(perf_counter_ns() - began)
        self._signal.notify()

    def _taken(self, parts: list[Buffer], now: float) -> Message | None:
        """The value that a message brings, if it brings one that is newer."""
        if len(parts) != 3:
            raise WireError("parts", f"{len(parts)} parts, expected topic, head and body")
        head, body = wire.unpack(parts[1]), memoryview(parts[2])
        if self._near and type(head) is list and len(head) in (2, 3):
            return self._announced(head, body, now)
        complete = self._core.chunk(head, body, now)
        self._bytes.add(len(body))
        return self._decoded(*complete) if complete is not None else None

    def _announced(self, head: list[Any], body: memoryview, now: float) -> Message | None:
        epoch, number, *file = head
        if type(epoch) is not int or type(number) is not int or (file and type(file[0]) is not str):
            raise WireError("chunk", "an announcement holds two integers, and perhaps the name of a file")
        version = epoch, number
        if not self._core.wants(version, now):
            return None
        if file:
            return self._shared(version, file[0], now)
        if not len(body):
            return None
        message = self._decoded(version, body)
        self._core.took(version, body, now)
        self._bytes.add(len(body))
        return message

    def _shared(self, version: Version, name: str, now: float) -> Message | None:
        slots = self._mapped(name)
        message = slots.newest()[0] if slots is not None else None
        if message is None or (message.epoch, message.seq) < version:
            self._core.fetch(True, now)
            return None
        self._core.fetch(False, now)
        self._core.took((message.epoch, message.seq), None, now)
        self._frame = None
        return message

    def _mapped(self, name: str) -> SharedSlots | None:
        if self._file[0] != name:
            self._file = name, None
            try:
                self._file = name, SharedSlots(self._address, name) if name else None
            except OSError:  # another container: it has to be fetched
                self._counter("unshared").add()
        return self._file[1]

    def _decoded(self, version: Version, value: memoryview) -> Message:
        message = wire.decode(value)
        if (message.epoch, message.seq) != version:
            raise WireError("torn", f"value of version {(message.epoch, message.seq)} sent as {version}")
        self._frame = value
        return message

    def _ask(self, now: float) -> None:
        ask = self._core.question(now)
        if ask is None:
            return
        before, self._asked = self._asked, self._own + (b"F" if self._core.fetches else b"A") + ask.text()
        self._socket.subscribe(self._asked)
        if before:
            self._socket.unsubscribe(before)

    def _poll(self, now: float) -> None:
        self._ask(now)
