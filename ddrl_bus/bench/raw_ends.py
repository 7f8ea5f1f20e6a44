"""The same through bare blocking sockets of pyzmq, one opaque frame a message: what whoever needs no more would write.

PUSH → PULL, XPUB → SUB, DEALER ⇄ ROUTER. A frame begins with the moment that it was due, and is new memory each time,
as whoever produces data has. Over tcp+CURVE they are encrypted, and let everybody in.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import zmq

from ddrl_bus.bench.ends import TIMEOUT_S, Answer, LinkKind, Order, Setup
from ddrl_bus.bench.schedule import Schedule
from ddrl_bus.transport.wire import Array
from ddrl_bus.transport.zeromq import COPY_BELOW

ANSWER_BYTES: Final = 320
"""As long as ours: a header, and sixteen actions."""
Socket = zmq.Socket[bytes]
_DUE: Final = struct.Struct("<q")


def one_end(pipe: Connection, setup: Setup, index: int | None) -> None:
    """The hub, or the spoke of that index."""
    kind, carry_out = _ENDS[setup.payload.link][index is not None]
    with zmq.Context() as context, _socket(context, kind, setup) as socket, _acks(context, kind, setup) as acks:
        pipe.send(None)
        _know(socket, setup)
        while (order := pipe.recv()) is not None:
            pipe.send(carry_out(setup, order, socket, acks))


def all_ends(pipe: Connection, setup: Setup) -> None:
    """Hub and spokes take turns in this one thread, and nothing wakes anybody: what there is to beat for memory://."""
    setup = replace(setup, address="inproc://bench")
    hub_kind, spoke_kind = (kind for kind, _ in _ENDS[setup.payload.link])
    with zmq.Context() as context, ExitStack() as opened:
        hub = opened.enter_context(_socket(context, hub_kind, setup))
        spokes = [opened.enter_context(_socket(context, spoke_kind, setup)) for _ in range(setup.peers)]
        _know(hub, setup)
        pipe.send(None)
        while (orders := pipe.recv()) is not None:
            pipe.send(_turns(setup, orders[0], hub, spokes))


def _know(socket: Socket, setup: Setup) -> None:
    """All subscribers: an XPUB drops what nobody has asked for yet."""
    if socket.type == zmq.XPUB:
        for _ in range(setup.peers):
            socket.recv()


@contextmanager
def _socket(context: zmq.Context[Socket], kind: int, setup: Setup) -> Iterator[Socket]:
    binds = kind in (zmq.PULL, zmq.XPUB, zmq.ROUTER)
    with context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        for option in (zmq.RCVTIMEO, zmq.SNDTIMEO):
            socket.setsockopt(option, int(TIMEOUT_S * 1000))
        if setup.payload.link == "queue":
            socket.set_hwm(setup.payload.window)
        if kind == zmq.XPUB:
            socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        if setup.transport == "tcp+CURVE":
            _encrypt(socket, setup, binds)
        if kind == zmq.SUB:
            socket.setsockopt(zmq.SUBSCRIBE, b"")
        (socket.bind if binds else socket.connect)(setup.address)
        yield socket


def _encrypt(socket: Socket, setup: Setup, binds: bool) -> None:
    public, secret = setup.curve
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(*((zmq.CURVE_SERVER, 1) if binds else (zmq.CURVE_SERVERKEY, public)))


@contextmanager
def _acks(context: zmq.Context[Socket], kind: int, setup: Setup) -> Iterator[Socket]:
    with context.socket(zmq.PULL if kind == zmq.XPUB else zmq.PUSH) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        if kind == zmq.XPUB:
            socket.bind(setup.acks)
        elif kind == zmq.SUB:
            socket.connect(setup.acks)
        yield socket


# ── messages


def frame_of(size: int, due: int) -> memoryview:
    """Of so many bytes, in fresh memory."""
    frame = np.empty(size, np.uint8).data
    _DUE.pack_into(frame, 0, due)
    return frame


def put(socket: Socket, frame: memoryview, flags: int = 0) -> None:
    socket.send(frame, flags, copy=len(frame) < COPY_BELOW)


def late(frame: zmq.Frame) -> float:
    """By how many seconds."""
    due: int = _DUE.unpack_from(frame.buffer)[0]
    return (time.monotonic_ns() - due) / 1e9


def moments(order: Order) -> Iterator[int]:
    """When each message is due, once that moment has come; without a rate they are due at once."""
    if order.rate is None:
        yield from (0 for _ in range(order.total))
        return
    with closing(Schedule(order.rate, order.total, order.phase)) as schedule:
        while not schedule.over:
            schedule.wait()
            yield from schedule.due()


# ── orders


def _receive(setup: Setup, order: Order, socket: Socket, _acks: Socket) -> Answer:
    latencies: list[float] = []
    for _ in range(order.warm_up * setup.peers):
        socket.recv(copy=False)
    began = time.perf_counter()
    for _ in range(order.messages * setup.peers):
        frame = socket.recv(copy=False)
        if order.rate:
            latencies.append(late(frame))
    return Answer(time.perf_counter() - began, latencies)


def _send(setup: Setup, order: Order, socket: Socket, _acks: Socket) -> Answer:
    size = setup.payload.frame_bytes
    for due in moments(order):
        put(socket, frame_of(size, due))
    return Answer()


def _publish(setup: Setup, order: Order, socket: Socket, acks: Socket) -> Answer:
    size, began = setup.payload.frame_bytes, 0.0
    for number, due in enumerate(moments(order)):
        if number == order.warm_up:
            began = time.perf_counter()
        put(socket, frame_of(size, due))
        for _ in range(setup.peers if order.rate is None else 0):
            acks.recv()
    return Answer(time.perf_counter() - began)


def _subscribe(setup: Setup, order: Order, socket: Socket, acks: Socket) -> Answer:
    own, latencies = np.empty(setup.payload.frame_bytes, np.uint8), list[float]()
    for _ in range(order.total):
        frame = socket.recv(copy=False)
        _hold(own, frame)
        if order.rate:
            latencies.append(late(frame))
        else:
            acks.send(b"")
    return Answer(latencies=latencies)


def _ask(setup: Setup, order: Order, socket: Socket, _acks: Socket) -> Answer:
    size = setup.payload.frame_bytes
    if order.rate is not None:
        return _ask_at(size, order, socket)
    began = 0.0
    for number in range(order.total):
        if number == order.warm_up:
            began = time.perf_counter()
        put(socket, frame_of(size, 0))
        socket.recv(copy=False)
    return Answer(time.perf_counter() - began)


def _ask_at(size: int, order: Order, socket: Socket) -> Answer:
    latencies: list[float] = []
    poller, asked = zmq.Poller(), deque[int]()
    with closing(Schedule(order.rate or 1.0, order.total, order.phase)) as schedule:
        poller.register(schedule.fileno(), zmq.POLLIN)
        poller.register(socket, zmq.POLLIN)
        while not schedule.over or asked:
            ready = dict(poller.poll())
            if not schedule.over and schedule.fileno() in ready:
                for due in schedule.due():
                    put(socket, frame_of(size, due))
                    asked.append(due)
            if socket in ready:
                socket.recv(copy=False)
                latencies.append((time.monotonic_ns() - asked.popleft()) / 1e9)
    return Answer(latencies=latencies)


def _serve(setup: Setup, order: Order, socket: Socket, _acks: Socket) -> Answer:
    for _ in range(order.total * setup.peers):
        _answer(socket)
    return Answer()


def _answer(socket: Socket) -> None:
    peer, _question = socket.recv_multipart(copy=False)
    socket.send(peer, zmq.SNDMORE)
    put(socket, frame_of(ANSWER_BYTES, 0))


def _hold(own: Array, frame: zmq.Frame) -> None:
    np.copyto(own, np.frombuffer(frame.buffer, np.uint8))


_CarryOut = Callable[[Setup, Order, Socket, Socket], Answer]
_ENDS: Final[dict[LinkKind, tuple[tuple[int, _CarryOut], tuple[int, _CarryOut]]]] = {
    "queue": ((zmq.PULL, _receive), (zmq.PUSH, _send)),
    "latest": ((zmq.XPUB, _publish), (zmq.SUB, _subscribe)),
    "request": ((zmq.ROUTER, _serve), (zmq.DEALER, _ask)),
}
"""What the hub and the spokes of a link are."""


# ── all in one thread


def _turns(setup: Setup, order: Order, hub: Socket, spokes: list[Socket]) -> list[Answer]:
    size, link, latencies, began = setup.payload.frame_bytes, setup.payload.link, list[float](), 0.0
    own = np.empty(size, np.uint8)
    # At a rate one schedule for all, which comes to each of them in turn.
    every = 1 if link == "latest" else len(spokes)
    rate = order.rate * every if order.rate else None
    for number, due in enumerate(moments(Order(order.messages * every, order.warm_up * every, rate))):
        if number == order.warm_up * every:
            began = time.perf_counter()
        each = spokes[number % len(spokes)]
        if link == "latest":
            put(hub, frame_of(size, due))
            for each in spokes:
                frame = each.recv(copy=False)
                _hold(own, frame)
                latencies.append(late(frame))
            continue
        put(each, frame_of(size, due))
        if link == "queue":
            latencies.append(late(hub.recv(copy=False)))
        else:
            _answer(hub)
            each.recv(copy=False)
            latencies.append((time.monotonic_ns() - due) / 1e9)
    return [Answer(time.perf_counter() - began, latencies if order.rate else ())]
