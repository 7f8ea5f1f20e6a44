"""The two ends of a `request`.

DEALER ⇄ ROUTER     one wire frame each way; `seq` is the request's number, `lane` the oldest one still waited for
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns, time_ns
from typing import Any, Final

from ddrl_bus.errors import FencedError, LinkClosedError, RemoteError, UnreachableError, VersionError, WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import Backend, SocketKind
from ddrl_bus.transport.ledger import Counter
from ddrl_bus.transport.links.end import End, Host
from ddrl_bus.transport.sessions.request import RequestClient, RequestServer
from ddrl_bus.transport.wire import Arena, Array, Buffer, Message

ERROR_KIND: Final = "_error"
MAX_OPEN_REQUESTS: Final = 1024


class _Toll:
    """What an end's messages cost, in ns of both ways together.

    The ledger hears of it ten times a second: to tell it of each message would cost as much as packing one.
    """

    def __init__(self, counter: Callable[[str], Counter]) -> None:
        self._counters = [counter(name) for name in ("encode_ns", "decode_ns", "wire_ns")]
        self._encode_ns = self._decode_ns = self._wire_ns = 0

    def encoded(self, began: int) -> None:
        self._encode_ns += perf_counter_ns() - began

    def decoded(self, frame: Buffer) -> Message:
        began, arrived = perf_counter_ns(), time_ns()
        message = wire.decode(frame)
        self._wire_ns += max(0, arrived - message.sent_at)
        self._decode_ns += perf_counter_ns() - began
        return message

    def settle(self) -> None:
        spent = self._encode_ns, self._decode_ns, self._wire_ns
        self._encode_ns = self._decode_ns = self._wire_ns = 0
        for counter, more in zip(self._counters, spent, strict=True):
            counter.add(more)


class Client(End):
    """The asking end of a `request`, towards one server."""

    def __init__(self, host: Host, backend: Backend, link: str, address: str) -> None:
        super().__init__(host, link)
        self._core: RequestClient[memoryview] = RequestClient()
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._messages, self._bytes = self._counter("messages_out"), self._counter("bytes_in")
        self._toll = _Toll(self._counter)
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
            VersionError: it speaks another major version of the protocol.
            FencedError: the server knows a newer life of this node.
            LinkClosedError: this end was closed.
        """
        return await self.ask(kind, fields, arrays, timeout_s=timeout_s)

    def ask(
        self,
        kind: str,
        fields: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Array] | None = None,
        *,
        timeout_s: float,
    ) -> asyncio.Future[Message]:
        """Send a request now; the answer comes as of `request`. A cancelled future is not repeated any more.

        Raises:
            LinkClosedError: this end was closed.
        """
        self._ensure_open()
        began, number = perf_counter_ns(), self._core.next_id()
        frame = wire.encode(kind, self._node, self._epoch, number, fields or {}, arrays, self._core.oldest)
        self._toll.encoded(began)
        self._socket.send(frame)  # before the books, which need not wait for it; with no room now the timer repeats it
        self._core.open(number, frame, self._loop.time(), timeout_s)
        answer = self._waiting[number] = self._loop.create_future()
        self._messages.add()
        return answer

    def _on_answer(self, parts: list[Buffer]) -> None:
        if len(parts) != 1:
            self._refuse("parts")
            return
        try:
            message = self._toll.decoded(parts[0])
        except WireError as error:
            self._refuse(error.reason)
            if error.reason == "version":  # the whole server speaks it: no request will ever be answered
                self._fail(VersionError(f"{self._address}: {error}; install the same ddrl_bus on both hosts"))
            return
        future = self._waiting.pop(message.seq, None)
        if not self._core.answered(message.seq, self._loop.time()) or future is None or future.done():
            self._counter("late").add()
            return
        self._bytes.add(message.nbytes)
        if message.kind == ERROR_KIND:
            refusal = FencedError if message.fields.get("fenced") is True else RemoteError
            future.set_exception(refusal(f"{self.link}: {message.node}: {message.fields.get('error')}"))
        else:
            future.set_result(message)

    def _poll(self, now: float) -> None:
        self._toll.settle()
        for number in [number for number, future in self._waiting.items() if future.done()]:  # cancelled
            self._core.abandon(number)
            del self._waiting[number]
        due = self._core.poll(now)
        for frame in due.again:
            self._socket.send(frame)
            self._counter("repeated").add()
        for number in due.expired:
            future = self._waiting.pop(number)
            if not future.done():
                future.set_exception(UnreachableError(f"{self.link}: no answer from {self._address} in time"))

    def _fail(self, error: Exception) -> None:
        """Of everything that is waited for."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    def close(self) -> None:
        if not self._closed:
            self._toll.settle()
        super().close()
        self._fail(LinkClosedError(f"{self.link}: this end of {self._node} closed"))


@dataclass(slots=True)
class Request:
    """One question; `answer` or `refuse` it once."""

    message: Message
    _server: Server
    _peer: Buffer
    speakers: frozenset[str] | None = None
    """Whom the asker's key speaks for; None where none was needed."""

    def answer(
        self, kind: str, fields: Mapping[str, Any] | None = None, arrays: Mapping[str, Array] | Arena | None = None
    ) -> None:
        """`arrays` are copied; an arena travels as it is, and nobody may write to it any more."""
        self._server.reply(self._peer, self.message, kind, fields or {}, arrays)

    def refuse(self, error: str) -> None:
        """The client gets RemoteError with these words."""
        self.answer(ERROR_KIND, {"error": error})


class Server(End):
    """The answering end of a `request`: binds a ROUTER; runs each request once, repeats kept answers."""

    def __init__(self, host: Host, backend: Backend, link: str, binds: Sequence[str]) -> None:
        super().__init__(host, link)
        self._core: RequestServer[memoryview] = RequestServer()
        self._box: deque[Request] = deque()
        self._handle: Callable[[Request], None] | None = None
        self._messages, self._bytes = self._counter("messages_in"), self._counter("bytes_in")
        self._toll = _Toll(self._counter)
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

    async def serve(self, handle: Callable[[Request], None]) -> None:
        """Hand requests to `handle` the moment they come, until cancelled.

        Raises:
            Exception: what `handle` raised.
            LinkClosedError: this end was closed.
        """
        self._handle = handle
        try:
            while True:
                while self._box:
                    handle(self._box.popleft())
                self._ensure_open()
                await self._signal.wait()
        finally:
            self._handle = None

    def try_recv(self) -> Request | None:
        """The next request if there is one."""
        return self._box.popleft() if self._box else None

    def _on_request(self, parts: list[Buffer]) -> None:
        if len(parts) != 2:
            self._reject(self._socket, "parts")
            return
        try:
            message = self._toll.decoded(parts[1])
        except WireError as error:
            self._reject(self._socket, error.reason)
            if error.reason == "version":  # what we say in our version tells whoever asks that there are two
                self._socket.send(parts[0], wire.encode(ERROR_KIND, self._node, self._epoch, 0, {"error": str(error)}))
            return
        if not self._may_speak(self._socket, message.node):
            return
        if len(self._box) >= MAX_OPEN_REQUESTS:
            self._refuse("busy")  # the client asks again
            return
        match self._core.arrived(message.node, message.epoch, message.seq, message.lane):
            case "new":
                self._arrived(Request(message, self, bytes(parts[0]), self._socket.speakers))
                self._messages.add()
                self._bytes.add(message.nbytes)
            case (frame,):
                self._counter("repeated").add()
                self._socket.send(parts[0], frame)
            case standing:
                self._refuse(str(standing))
                if standing == "fenced":  # whoever asks must hear of it, not wait
                    words = {"error": f"a newer life of {message.node} is here", "fenced": True}
                    self._socket.send(parts[0], wire.encode(ERROR_KIND, self._node, self._epoch, message.seq, words))

    def _arrived(self, request: Request) -> None:
        if self._handle is None:
            self._box.append(request)
            self._signal.notify()
            return
        try:
            self._handle(request)
        except Exception as error:  # for whoever awaits `serve`
            self._signal.notify(error)

    def reply(
        self,
        peer: Buffer,
        request: Message,
        kind: str,
        fields: Mapping[str, Any],
        arrays: Mapping[str, Array] | Arena | None,
    ) -> None:
        """Send and keep the answer; a peer that is gone will ask again if it still cares."""
        if self._closed:
            return
        began = perf_counter_ns()
        if isinstance(arrays, Arena):
            frame = arrays.encode(self._node, self._epoch, request.seq, fields)
        else:
            frame = wire.encode(kind, self._node, self._epoch, request.seq, fields, arrays)
        self._toll.encoded(began)
        if not self._socket.send(peer, frame):
            self._counter("unsent_answers").add()
        self._core.answer(request.node, request.epoch, request.seq, frame)

    def _poll(self, now: float) -> None:
        self._toll.settle()

    def close(self) -> None:
        if not self._closed:
            self._toll.settle()
        super().close()
