"""The six link ends: sender and receiver, publisher and subscriber, client and server.

Each is a thin shell: a session core decides, sockets of whatever backend carry, the ledger counts. Everything runs in
one event loop; nothing here blocks, and nothing waits on a socket.

On the wire:

    queue     PUSH → PULL   one wire frame a message
              SUB  ← XPUB   [topic of the sender, msgpack credit]; subscribing to it is the sender's hello
    latest    XPUB → SUB    [topic, msgpack chunk head, chunk body]; an empty body is a beacon
    request   DEALER ⇄ ROUTER   one wire frame each way, `seq` is the request's number
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from time import perf_counter_ns
from typing import Any, Final, Protocol

import msgpack

from ddrl_bus.errors import FencedError, LinkClosedError, RemoteError, UnreachableError, WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import Backend, OnMessage, Socket, SocketKind, back_channel
from ddrl_bus.transport.ledger import Counter, Ledger
from ddrl_bus.transport.sessions.latest import BEACON_EVERY_S, LatestPublisher, LatestSubscriber
from ddrl_bus.transport.sessions.queue import (
    ACCEPT,
    Credit,
    Inbound,
    Lane,
    OnLoss,
    Probe,
    QueueReceiver,
    QueueSender,
    Resend,
)
from ddrl_bus.transport.sessions.request import RequestClient, RequestServer
from ddrl_bus.transport.wire import Arena, Array, Buffer, Message

POLL_S: Final = 0.1
"""How often a link end looks after its timers."""
PROBE_KIND: Final = "_probe"
ERROR_KIND: Final = "_error"
MAX_OPEN_REQUESTS: Final = 1024
MAX_LANES: Final = 2048
"""Lives of senders that one receiver ever keeps books of: a stranger could say hello under any number of names."""

Check = Callable[[Message], str | None]
"""Looks at a message before it is accepted; returns the reason to refuse it, or None."""

_TOPIC: Final = re.compile(rb"([QS])([A-Za-z0-9_.-]{1,64})\x00([0-9a-f]{16})\x00")
_ALL: Final = b"A"


def life(node: str, epoch: int) -> str:
    """One life of a node, as lanes and topics name it."""
    return f"{node}@{epoch:016x}"


def _topic(letter: bytes, node: str, epoch: int) -> bytes:
    return letter + node.encode() + b"\x00" + f"{epoch:016x}".encode() + b"\x00"


def _subscription(parts: Sequence[Buffer], letter: bytes) -> tuple[str, int] | None:
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


class _Signal:
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


class _End:
    """What all six share: a name, counters, a timer, an orderly end."""

    def __init__(self, host: Host, link: str) -> None:
        self.link = link
        self._node = host.node
        self._epoch = host.epoch
        self._ledger = host.ledger
        self._loop = asyncio.get_running_loop()
        self._signal = _Signal()
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
            socket = backend.socket(kind, on_message, bind=bind, connect=connect)
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


@dataclass(slots=True)
class _Draft:
    """What it takes to encode a message again, for another life of the receiver."""

    arena: Arena
    fields: Mapping[str, Any]
    frame: memoryview


class Sender(_End):
    """The sending end of a `queue`: one PUSH per receiver, credits back on a SUB.

    Args:
        receivers: node name → data address.
        on_loss: `count` what a broken connection took, or `resend` it.
    """

    def __init__(
        self, host: Host, backend: Backend, link: str, receivers: Mapping[str, str], on_loss: OnLoss = "count"
    ) -> None:
        super().__init__(host, link)
        self._core: QueueSender[_Draft] = QueueSender(self._node, self._epoch, on_loss)
        self._redo: deque[_Draft] = deque()
        self._messages, self._bytes = self._counter("messages_out"), self._counter("bytes_out")
        self._encode_ns, self._wait_ns = self._counter("encode_ns"), self._counter("send_wait_ns")
        self._data: dict[str, Socket] = {}
        self._produced: dict[tuple[str, int], Counter] = {}
        topic = _topic(b"Q", self._node, self._epoch)
        for receiver, address in receivers.items():
            self._data[receiver] = self._open(backend, SocketKind.PUSH, None, connect=[address])
            credits = self._open(backend, SocketKind.SUB, self._on_credit, connect=[back_channel(address)])
            credits.subscribe(topic)

    async def send(self, arena: Arena, fields: Mapping[str, Any]) -> None:
        """Hand one message over, waiting for credit. Nobody may write to `arena` any more.

        Cancelled while it waits, nothing was sent.

        Raises:
            LinkClosedError: this end was closed.
        """
        if self.try_send(arena, fields):
            return
        began = perf_counter_ns()
        while True:
            await self._signal.wait()
            if self.try_send(arena, fields):
                self._wait_ns.add(perf_counter_ns() - began)
                return

    def try_send(self, arena: Arena, fields: Mapping[str, Any]) -> bool:
        """Send now if a receiver has credit; say whether it went out."""
        self._ensure_open()
        lane = self._core.ready(self._loop.time()) if not self._redo else None
        return lane is not None and self._send_on(lane, arena, fields)

    def _send_on(self, lane: Lane[_Draft], arena: Arena, fields: Mapping[str, Any]) -> bool:
        began = perf_counter_ns()
        frame = arena.encode(self._node, self._epoch, lane.sent + 1, fields, lane.epoch)
        self._encode_ns.add(perf_counter_ns() - began)
        produced = self._produced_on(lane)
        produced.add()  # before the bytes leave: a kill in between must not let more arrive than were produced
        socket = self._data[lane.receiver]
        if not socket.send(frame):
            produced.add(-1)
            socket.when_writable(self._signal.notify)
            return False
        self._core.sent(lane, _Draft(arena, fields, frame), self._loop.time())
        self._messages.add()
        self._bytes.add(len(frame))
        return True

    def _produced_on(self, lane: Lane[_Draft]) -> Counter:
        key = (lane.receiver, lane.epoch)
        counter = self._produced.get(key)
        if counter is None:
            ends = f"{life(self._node, self._epoch)}>{life(*key)}"
            counter = self._produced[key] = self._counter(ends, "produced")
        return counter

    def _on_credit(self, parts: list[Buffer]) -> None:
        try:
            credit = _parse_credit(parts)
        except WireError as error:
            self._refuse(error.reason)
            return
        if credit.receiver not in self._data:
            self._refuse("unknown_receiver")
            return
        reopened = self._core.credit(credit, self._loop.time())
        if reopened is not None:
            # Into fresh bytes: ZeroMQ may still be reading the old ones.
            self._redo.extend(_Draft(d.arena.extended({}), d.fields, d.frame) for d in reopened.redo)
        while self._redo and (lane := self._core.ready(self._loop.time())) is not None:
            if not self._send_on(lane, self._redo[0].arena, self._redo[0].fields):
                return
            self._redo.popleft()
        self._signal.notify()

    def _poll(self, now: float) -> None:
        for action in self._core.poll(now):
            match action:
                case Probe(lane, sent):
                    self._probe(lane, sent)
                case Resend(lane, _, draft):
                    self._data[lane.receiver].send(draft.frame)
                    self._counter("resent").add()

    def _probe(self, lane: Lane[Any], sent: int) -> None:
        probe = wire.encode(PROBE_KIND, self._node, self._epoch, 0, {"sent": sent}, lane=lane.epoch)
        self._data[lane.receiver].send(probe)

    @property
    def credit(self) -> int:
        """How many messages could go out now."""
        return sum(max(0, lane.credit) for lane in self._core.lanes.values())

    @property
    def connected(self) -> bool:
        """Whether any receiver has been heard."""
        return bool(self._core.lanes)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until every message sent is acknowledged; False if `timeout_s` ran out first.

        Raises:
            LinkClosedError: this end was closed.
        """
        self._ensure_open()
        for lane in self._core.lanes.values():
            if not lane.settled:
                self._probe(lane, lane.sent)
        try:
            async with asyncio.timeout(timeout_s):
                while self._redo or not self._core.settled:
                    await self._signal.wait()
        except TimeoutError:
            return False
        return True


def _parse_credit(parts: Sequence[Buffer]) -> Credit:
    values = wire.unpack(parts[1]) if len(parts) == 2 else None
    kinds = (str, int, str, int, int, int, int)
    if not isinstance(values, list) or tuple(map(type, values)) != kinds:
        raise WireError("credit", "expected [receiver, epoch, sender, epoch, received, freed, window]")
    if any(type(value) is int and value < 0 for value in values):
        raise WireError("credit", "numbers are unsigned")
    return Credit(*values)


@dataclass(slots=True)
class _LaneBooks:
    accepted: Counter
    refused: Counter
    lost: Counter
    duplicates: Counter
    taken: Counter


class Receiver(_End):
    """The receiving end of a `queue`: binds a PULL, and an XPUB for credits beside it.

    Args:
        binds: data addresses.
        window: messages that each sender may have unread here.
        check: looks at each message before it is accepted.
    """

    def __init__(
        self,
        host: Host,
        backend: Backend,
        link: str,
        binds: Sequence[str],
        window: int,
        on_loss: OnLoss = "count",
        check: Check | None = None,
    ) -> None:
        super().__init__(host, link)
        self.check = check
        self._core = QueueReceiver(self._node, self._epoch, window, on_loss)
        self._box: deque[tuple[Message, int, _LaneBooks]] = deque()
        self._books: dict[tuple[str, int], _LaneBooks] = {}
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._decode_ns, self._queue_ns = self._counter("decode_ns"), self._counter("queue_wait_ns")
        self._credits_due = False
        self._open(backend, SocketKind.PULL, self._on_data, bind=binds)
        self._credits = self._open(backend, SocketKind.XPUB, self._on_hello, bind=[back_channel(b) for b in binds])

    async def recv(self) -> Message:
        """The next message, in arrival order. Cancelled while it waits, nothing is lost.

        Raises:
            LinkClosedError: this end was closed.
        """
        while not self._box:
            self._ensure_open()
            await self._signal.wait()
        return self._take()

    def try_recv(self) -> Message | None:
        return self._take() if self._box else None

    def _take(self) -> Message:
        message, arrived, books = self._box.popleft()
        books.taken.add()
        self._queue_ns.add(perf_counter_ns() - arrived)
        self._core.freed(message.node, message.epoch)
        self._credits_soon()
        return message

    @property
    def queued(self) -> int:
        """Messages that wait to be taken."""
        return len(self._box)

    def _on_data(self, parts: list[Buffer]) -> None:
        began = perf_counter_ns()
        if len(parts) != 1:
            self._refuse("parts")
            return
        try:
            message = wire.decode(parts[0])
        except WireError as error:
            self._refuse(error.reason)
            return
        now = self._loop.time()
        if message.kind == PROBE_KIND:
            sent = message.fields.get("sent")
            if type(sent) is not int or sent < 0:
                self._refuse("probe")
                return
            self._core.probed(message.node, message.epoch, sent, message.lane, now)
            self._credits_soon()
            return
        verdict = self._core.arrived(message.node, message.epoch, message.seq, message.lane, now)
        if verdict == ACCEPT:
            self._accept(message, began)
        elif verdict == "duplicate":
            self._lane_books(message.node, message.epoch).duplicates.add()
        else:
            self._refuse(verdict)
        self._credits_soon()

    def _accept(self, message: Message, began: int) -> None:
        books = self._lane_books(message.node, message.epoch)
        reason = self.check(message) if self.check is not None else None
        if reason is not None:
            books.refused.add()
            self._counter("refused", reason).add()
            self._core.freed(message.node, message.epoch)
            return
        books.accepted.add()
        self._messages.add()
        self._bytes.add(message.nbytes)
        arrived = perf_counter_ns()
        self._decode_ns.add(arrived - began)
        self._box.append((message, arrived, books))
        self._signal.notify()

    def _lane_books(self, sender: str, epoch: int) -> _LaneBooks:
        books = self._books.get((sender, epoch))
        if books is None:
            ends = f"{life(sender, epoch)}>{life(self._node, self._epoch)}"
            books = self._books[sender, epoch] = _LaneBooks(
                *(self._counter(ends, what) for what in ("accepted", "refused", "lost", "duplicates", "taken"))
            )
        return books

    def _on_hello(self, parts: list[Buffer]) -> None:
        hello = _subscription(parts, b"Q")
        if hello is None:
            if bytes(parts[0][:1]) != b"\x00":
                self._refuse("hello")
            return
        known = self._core.senders.get(hello[0])
        is_new = known is None or known.epoch < hello[1]
        if is_new and max(len(self._books), len(self._core.senders)) >= MAX_LANES:
            self._refuse("lanes")
            return
        if self._core.hello(*hello) is None:
            self._refuse("fenced")
        self._credits_soon()

    def _credits_soon(self) -> None:
        # One round of credits per turn of the loop, however many messages it moved.
        if self._core.credits_due and not self._credits_due:
            self._credits_due = True
            self._loop.call_soon(self._send_credits)

    def _send_credits(self) -> None:
        self._credits_due = False
        if self._closed:
            return
        for credit in self._core.credits():
            self._credits.send(_topic(b"Q", credit.sender, credit.sender_epoch), msgpack.packb(astuple(credit)))

    def _poll(self, now: float) -> None:
        for inbound, lost in self._core.poll(now):
            self._lane_books(inbound.sender, inbound.epoch).lost.add(lost)
        self._send_credits()

    @property
    def senders(self) -> Mapping[str, Inbound]:
        return self._core.senders


class Publisher(_End):
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
            self._socket.send(_ALL, msgpack.packb(chunk.head), chunk.body)
        self._encode_ns.add(perf_counter_ns() - began)
        self._messages.add()
        self._bytes.add(len(value))

    def _on_subscription(self, parts: list[Buffer]) -> None:
        joined = _subscription(parts, b"S")
        if joined is None:
            if bytes(parts[0]) not in (b"\x01A", b"\x00A") and bytes(parts[0][:1]) != b"\x00":
                self._refuse("hello")
            return
        for chunk in self._core.snapshot():
            self._socket.send(_topic(b"S", *joined), msgpack.packb(chunk.head), chunk.body)
        self._counter("snapshots").add()

    def _poll(self, now: float) -> None:
        if self._core.version is not None and now >= self._beacon_at:
            self._beacon_at = now + BEACON_EVERY_S
            self._socket.send(_ALL, msgpack.packb([*self._core.version, 0, 0, 0]), b"")


class Subscriber(_End):
    """The subscribing end of a `latest`, towards one publisher."""

    def __init__(self, host: Host, backend: Backend, link: str, address: str) -> None:
        super().__init__(host, link)
        self._core = LatestSubscriber(self._loop.time())
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._decode_ns, self._superseded = self._counter("decode_ns"), self._counter("superseded")
        self._fresh: Message | None = None
        self._own = _topic(b"S", self._node, self._epoch)
        self._socket = self._open(backend, SocketKind.SUB, self._on_message, connect=[address])
        self._socket.subscribe(_ALL)
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
        return message

    def _poll(self, now: float) -> None:
        if self._core.poll(now):
            self._socket.unsubscribe(self._own)
            self._socket.subscribe(self._own)
            self._counter("snapshots_asked").add()


class Client(_End):
    """The asking end of a `request`, towards one server."""

    def __init__(self, host: Host, backend: Backend, link: str, address: str) -> None:
        super().__init__(host, link)
        self._core: RequestClient[memoryview] = RequestClient()
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._messages = self._counter("messages_out")
        self._address = address
        self._socket = self._open(backend, SocketKind.DEALER, self._on_answer, connect=[address])

    async def request(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
        *,
        timeout_s: float,
    ) -> Message:
        """The server's answer.

        Raises:
            UnreachableError: none came within `timeout_s`.
            RemoteError: the server refused it; carries its words.
            FencedError: the server knows a newer life of this node.
            LinkClosedError: this end was closed.
        """
        self._ensure_open()
        number = self._core.next_id()
        frame = wire.encode(kind, self._node, self._epoch, number, fields or {}, arrays)
        self._core.open(number, frame, self._loop.time(), timeout_s)
        future = self._waiting[number] = self._loop.create_future()
        self._socket.send(frame)  # with no room now it is repeated by the timer
        self._messages.add()
        try:
            answer: Message = await future
            return answer
        finally:
            self._core.abandon(number)
            self._waiting.pop(number, None)

    def _on_answer(self, parts: list[Buffer]) -> None:
        if len(parts) != 1:
            self._refuse("parts")
            return
        try:
            message = wire.decode(parts[0])
        except WireError as error:
            self._refuse(error.reason)
            return
        if not self._core.answered(message.seq):
            self._counter("late").add()
            return
        future = self._waiting[message.seq]
        if future.done():
            return
        if message.kind == ERROR_KIND:
            refusal = FencedError if message.fields.get("fenced") is True else RemoteError
            future.set_exception(refusal(f"{self.link}: {message.node}: {message.fields.get('error')}"))
        else:
            future.set_result(message)

    def _poll(self, now: float) -> None:
        due = self._core.poll(now)
        for frame in due.again:
            self._socket.send(frame)
            self._counter("repeated").add()
        for number in due.expired:
            future = self._waiting.get(number)
            if future is not None and not future.done():
                future.set_exception(UnreachableError(f"{self.link}: no answer from {self._address} in time"))

    def close(self) -> None:
        super().close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(LinkClosedError(f"{self.link}: this end of {self._node} closed"))


@dataclass(slots=True)
class Request:
    """One question; `answer` or `refuse` it once."""

    message: Message
    _server: Server
    _peer: Buffer

    def answer(
        self, kind: str, fields: Mapping[str, Any] | None = None, arrays: Mapping[str, Array] | None = None
    ) -> None:
        self._server.reply(self._peer, self.message, kind, fields or {}, arrays)

    def refuse(self, error: str) -> None:
        """The client gets RemoteError with these words."""
        self.answer(ERROR_KIND, {"error": error})


class Server(_End):
    """The answering end of a `request`: binds a ROUTER; runs each request once, repeats kept answers."""

    def __init__(self, host: Host, backend: Backend, link: str, binds: Sequence[str]) -> None:
        super().__init__(host, link)
        self._core: RequestServer[memoryview] = RequestServer()
        self._box: deque[Request] = deque()
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._socket = self._open(backend, SocketKind.ROUTER, self._on_request, bind=binds)

    async def recv(self) -> Request:
        """The next request. Cancelled while it waits, nothing is lost.

        Raises:
            LinkClosedError: this end was closed.
        """
        while not self._box:
            self._ensure_open()
            await self._signal.wait()
        return self._box.popleft()

    def _on_request(self, parts: list[Buffer]) -> None:
        if len(parts) != 2:
            self._refuse("parts")
            return
        try:
            message = wire.decode(parts[1])
        except WireError as error:
            self._refuse(error.reason)
            return
        if len(self._box) >= MAX_OPEN_REQUESTS:
            self._refuse("busy")  # the client asks again
            return
        match self._core.arrived(message.node, message.epoch, message.seq):
            case "new":
                self._messages.add()
                self._bytes.add(message.nbytes)
                self._box.append(Request(message, self, bytes(parts[0])))
                self._signal.notify()
            case (frame,):
                self._counter("repeated").add()
                self._socket.send(parts[0], frame)
            case standing:
                self._refuse(str(standing))
                if standing == "fenced":  # whoever asks must hear of it, not wait
                    words = {"error": f"a newer life of {message.node} is here", "fenced": True}
                    self._socket.send(parts[0], wire.encode(ERROR_KIND, self._node, self._epoch, message.seq, words))

    def reply(
        self,
        peer: Buffer,
        request: Message,
        kind: str,
        fields: Mapping[str, Any],
        arrays: Mapping[str, Array] | None,
    ) -> None:
        """Send and keep the answer; a peer that is gone will ask again if it still cares."""
        if self._closed:
            return
        frame = wire.encode(kind, self._node, self._epoch, request.seq, fields, arrays)
        self._core.answer(request.node, request.epoch, request.seq, frame)
        if not self._socket.send(peer, frame):
            self._counter("unsent_answers").add()
