"""The two ends of a `queue`.

PUSH → PULL     one wire frame a message, or a run of small ones
SUB  ← XPUB     [topic of the sender, msgpack credit]; subscribing to it is the sender's hello
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter_ns, time_ns
from typing import Any, Final

import msgpack

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import Backend, Socket, SocketKind, back_channel, scheme
from ddrl_bus.transport.ledger import Counter
from ddrl_bus.transport.links.end import Check, End, Host, life, subscription, topic
from ddrl_bus.transport.links.runs import SMALL, Run
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
from ddrl_bus.transport.sessions.rate import TokenBucket
from ddrl_bus.transport.wire import Arena, Buffer, Codec, Message

PROBE_KIND: Final = "_probe"
MAX_LANES: Final = 2048
"""Senders of one receiver: a stranger could say hello under any number of names."""
LANE_COUNTERS: Final = 5
SPARE: Final = 1024
"""Counters of the ledger that lanes leave to others. It keeps those of all lives: some 7,000 fit."""


@dataclass(slots=True)
class _Draft:
    """What it takes to encode a message again, for another life of the receiver."""

    arena: Arena
    fields: Mapping[str, Any]
    frame: Buffer | None
    """None: it left in a run."""


class Sender(End):
    """The sending end of a `queue`: one PUSH per receiver, credits back on a SUB.

    Args:
        receivers: node name → data address.
        on_loss: `count` what a broken connection took, or `resend` it.
        codec: how arenas travel; `auto` compresses images and flags unless they stay in this process.
        rate: bytes a second that may leave, to all receivers together; above it a message waits as for credit.
    """

    def __init__(
        self,
        host: Host,
        backend: Backend,
        link: str,
        receivers: Mapping[str, str],
        on_loss: OnLoss = "count",
        codec: Codec = "auto",
        rate: float | None = None,
    ) -> None:
        super().__init__(host, link)
        self._bucket = TokenBucket(rate, self._loop.time())
        self._throttle: asyncio.TimerHandle | None = None
        self._core: QueueSender[_Draft] = QueueSender(self._node, self._epoch, on_loss)
        self._resends = on_loss == "resend"
        self._redo: deque[_Draft] = deque()
        local = all(scheme(address) == "memory" for address in receivers.values())
        self._codec: Codec = "none" if codec == "auto" and local else codec
        self._bytes, self._raw_bytes = self._counter("bytes_out"), self._counter("bytes_raw_out")
        self._encode_ns, self._wait_ns = self._counter("encode_ns"), self._counter("send_wait_ns")
        self._throttled_ns = self._counter("throttled_ns")
        self._data: dict[str, Socket] = {}
        self._produced: dict[tuple[str, int], Counter] = {}
        self._runs: dict[str, Run] = {}
        self._leaving = False
        hello = topic(b"Q", self._node, self._epoch)
        for receiver, address in receivers.items():
            self._data[receiver] = self._open(backend, SocketKind.PUSH, None, connect=[address])
            heard = partial(self._on_credit, receiver)
            credits = self._open(backend, SocketKind.SUB, heard, connect=[back_channel(address)])
            credits.subscribe(hello)

    async def send(self, arena: Arena, fields: Mapping[str, Any]) -> None:
        """Hand one message over, waiting for credit and the rate. Nobody may write to `arena` any more.

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
        """Send now if a receiver has credit and the rate allows it; say whether it went out."""
        self._ensure_open()
        now = self._loop.time()
        lane = self._ready(now) if not self._redo else None
        return lane is not None and self._send_on(lane, arena, fields, now)

    def _ready(self, now: float) -> Lane[_Draft] | None:
        """Where a message may go now. Where only the rate says no, whoever waits is woken as soon as it says yes."""
        lane = self._core.ready(now)
        if lane is None or (wait_s := self._bucket.wait_s(now)) <= 0:
            return lane
        if self._throttle is None:
            self._throttle = self._loop.call_later(wait_s, self._go_on, now)
        return None

    def _go_on(self, since: float) -> None:
        self._throttle = None
        self._throttled_ns.add(round((self._loop.time() - since) * 1e9))
        self._send_again()
        self._signal.notify()

    def _send_on(self, lane: Lane[_Draft], arena: Arena, fields: Mapping[str, Any], now: float) -> bool:
        compress = self._codec == "lz4" or (self._codec == "auto" and arena.layout.compressible)
        if arena.layout.size < SMALL and not compress:
            return self._join(lane, arena, fields, now)
        if not self._leave(lane.receiver):
            return False
        began = perf_counter_ns()
        frame = arena.encode(self._node, self._epoch, lane.sent + 1, fields, lane.epoch, compress=compress)
        self._encode_ns.add(perf_counter_ns() - began)
        produced = self._produced_on(lane)
        produced.add()  # before the bytes leave: a kill in between must not let more arrive than were produced
        if not self._hand_over(lane.receiver, frame, arena.raw_size):
            produced.add(-1)
            return False
        self._core.sent(lane, _Draft(arena, fields, frame) if self._resends else None, now)
        return True

    def _join(self, lane: Lane[_Draft], arena: Arena, fields: Mapping[str, Any], now: float) -> bool:
        """Let a small message leave with others."""
        run = self._runs.get(lane.receiver)
        before = run.nbytes if run is not None else 0
        if run is None or not run.take(lane, arena, fields):
            if not self._leave(lane.receiver):
                return False
            run, before = Run(lane, arena.layout, self._produced_on(lane)), 0
            run.take(lane, arena, fields)
            self._runs[lane.receiver] = run
            self._leave_soon()
        run.produced.add()
        self._bucket.spend(run.nbytes - before, now)
        self._core.sent(lane, _Draft(arena, fields, None) if self._resends else None, now)
        return True

    def _leave_soon(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._loop.call_soon(self._leave_all)

    def _leave_all(self) -> None:
        self._leaving = False
        for receiver in list(self._runs):
            self._leave(receiver)

    def _leave(self, receiver: str) -> bool:
        """Hand the run for `receiver` over; False if there is no room for it, and it goes when there is."""
        run = self._runs.get(receiver)
        if run is None:
            return True
        frame = run.encode(self._node, self._epoch)
        if not self._hand_over(receiver, frame, len(frame), run.nbytes):
            return False
        del self._runs[receiver]
        self._encode_ns.add(run.encode_ns)
        return True

    def _hand_over(self, receiver: str, frame: Buffer, raw_size: int, paid: int = 0) -> bool:
        """`paid`: bytes of it that the rate knows of."""
        socket = self._data[receiver]
        if not socket.send(frame):
            socket.when_writable(self._on_room)
            return False
        self._bucket.spend(len(frame) - paid, self._loop.time())
        self._bytes.add(len(frame))
        self._raw_bytes.add(raw_size)
        return True

    def _on_room(self) -> None:
        if not self._closed:
            self._leave_all()
            self._signal.notify()

    def _produced_on(self, lane: Lane[_Draft]) -> Counter:
        key = (lane.receiver, lane.epoch)
        counter = self._produced.get(key)
        if counter is None:
            ends = f"{life(self._node, self._epoch)}>{life(*key)}"
            counter = self._produced[key] = self._counter(ends, "produced")
        return counter

    def _on_credit(self, receiver: str, parts: list[Buffer]) -> None:
        try:
            credit = _parse_credit(parts)
        except WireError as error:
            self._refuse(error.reason)
            return
        if credit.receiver != receiver:  # it speaks of its own credit only
            self._refuse("unknown_receiver")
            return
        reopened = self._core.credit(credit, self._loop.time())
        if reopened is not None:
            # Into fresh bytes: ZeroMQ may still be reading the old ones.
            self._redo.extend(_Draft(d.arena.extended({}), d.fields, d.frame) for d in reopened.redo)
        self._send_again()
        self._signal.notify()

    def _send_again(self) -> None:
        """What a dead life of a receiver had not settled."""
        now = self._loop.time()
        while self._redo and (lane := self._ready(now)) is not None:
            if not self._send_on(lane, self._redo[0].arena, self._redo[0].fields, now):
                return
            self._redo.popleft()

    def _poll(self, now: float) -> None:
        for action in self._core.poll(now):
            match action:
                case Probe(lane, sent):
                    self._probe(lane, sent)
                case Resend(lane, seq, draft):
                    if self._bucket.wait_s(now) <= 0:  # else in a later turn
                        self._send_anew(lane, seq, draft, now)

    def _send_anew(self, lane: Lane[_Draft], seq: int, draft: _Draft, now: float) -> None:
        """As it was."""
        if draft.frame is None:
            draft.frame = draft.arena.encode(self._node, self._epoch, seq, draft.fields, lane.epoch)
        self._data[lane.receiver].send(draft.frame)
        self._bucket.spend(len(draft.frame), now)
        self._counter("resent").add()

    def _probe(self, lane: Lane[Any], sent: int) -> None:
        self._leave_all()  # it speaks of them
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

    def close(self) -> None:
        if not self._closed:
            self._leave_all()
        super().close()
        if self._throttle is not None:
            self._throttle.cancel()

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
    """The rarer `refused`, `lost` and `duplicates` are made when they are needed: a ledger has room for so many."""

    lane: str
    accepted: Counter
    taken: Counter


class Receiver(End):
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
        self._bytes = self._counter("bytes_in")
        self._decode_ns, self._queue_ns = self._counter("decode_ns"), self._counter("queue_wait_ns")
        self._wire_ns = self._counter("wire_ns")
        self._credits_due = False
        self._data = self._open(backend, SocketKind.PULL, self._on_data, bind=binds)
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
        if self._core.freed(message.node, message.epoch):
            self._credits_soon()
        return message

    @property
    def queued(self) -> int:
        """Messages that wait to be taken."""
        return len(self._box)

    def _on_data(self, parts: list[Buffer]) -> None:
        began = perf_counter_ns()
        if len(parts) != 1:
            self._reject(self._data, "parts")
            return
        try:
            run = wire.decode_run(parts[0])
        except WireError as error:
            self._reject(self._data, error.reason)
            return
        first = run[0]
        if not self._may_speak(self._data, first.node):
            return
        now = self._loop.time()
        if first.kind == PROBE_KIND:
            self._on_probe(first, now)
            return
        if not self._core.next_ones(first.node, first.epoch, first.seq, first.lane, len(run)):
            run = [message for message in run if self._is_new(message, now)]
        if run:
            self._bytes.add(len(parts[0]))
            self._accept(run, began)

    def _on_probe(self, probe: Message, now: float) -> None:
        sent = probe.fields.get("sent")
        if type(sent) is not int or sent < 0:
            self._reject(self._data, "probe")
            return
        self._core.probed(probe.node, probe.epoch, sent, probe.lane, now)
        self._credits_soon()

    def _is_new(self, message: Message, now: float) -> bool:
        verdict = self._core.arrived(message.node, message.epoch, message.seq, message.lane, now)
        if verdict == ACCEPT:
            return True
        if verdict == "duplicate":
            self._rare(message.node, message.epoch, "duplicates").add()
        else:
            self._refuse(verdict)
        return False

    def _accept(self, run: list[Message], began: int) -> None:
        """Take in messages of one frame."""
        first, books = run[0], self._lane_books(run[0].node, run[0].epoch)
        if self.check is not None:
            run = [message for message in run if self._passes(self.check, message)]
        books.accepted.add(len(run))
        self._wire_ns.add(len(run) * max(0, time_ns() - first.sent_at))
        arrived = perf_counter_ns()
        self._decode_ns.add(arrived - began)
        self._box.extend([(message, arrived, books) for message in run])
        self._signal.notify()

    def _passes(self, check: Check, message: Message) -> bool:
        reason = check(message)
        if reason is None:
            return True
        self._rare(message.node, message.epoch, "refused").add()
        self._counter("refused", reason).add()
        self._core.freed(message.node, message.epoch)
        self._credits_soon()
        return False

    def _lane_books(self, sender: str, epoch: int) -> _LaneBooks:
        books = self._books.get((sender, epoch))
        if books is None:
            lane = f"{life(sender, epoch)}>{life(self._node, self._epoch)}"
            counters = self._counter(lane, "accepted"), self._counter(lane, "taken")
            books = self._books[sender, epoch] = _LaneBooks(lane, *counters)
        return books

    def _rare(self, sender: str, epoch: int, what: str) -> Counter:
        return self._counter(self._lane_books(sender, epoch).lane, what)

    def _on_hello(self, parts: list[Buffer]) -> None:
        hello = subscription(parts, b"Q")
        if hello is None:
            if bytes(parts[0][:1]) != b"\x00":
                self._reject(self._credits, "hello")
            return
        if not self._may_speak(self._credits, hello[0]):
            return
        known = self._core.senders.get(hello[0])
        is_new = known is None or known.epoch < hello[1]
        if is_new and not self._has_room(new_name=known is None):
            self._refuse("lanes")
            return
        if is_new and known is not None:  # nothing of its old life is accepted any more; its counters stay
            self._books.pop((known.sender, known.epoch), None)
        if self._core.hello(*hello) is None:
            self._refuse("fenced")
        self._credits_soon()

    def _has_room(self, *, new_name: bool) -> bool:
        """Whether a new life can have books: the ledger must hold all that the lives which are here may yet count."""
        senders = len(self._core.senders) + new_name
        return senders <= MAX_LANES and self._ledger.room >= LANE_COUNTERS * (senders + 1) + SPARE

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
            self._credits.send(topic(b"Q", credit.sender, credit.sender_epoch), msgpack.packb(credit))

    def _poll(self, now: float) -> None:
        for inbound, lost in self._core.poll(now):
            self._rare(inbound.sender, inbound.epoch, "lost").add(lost)
        self._send_credits()

    @property
    def senders(self) -> Mapping[str, Inbound]:
        return self._core.senders
