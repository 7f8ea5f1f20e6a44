"""The ends of our links, as ends.py orders them about; in processes of their own, or all in one over `memory://`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

import numpy as np
import zmq

from ddrl_bus import keys
from ddrl_bus.bench.ends import HUB, LINK, SHARED, TIMEOUT_S, Answer, Order, Setup, spoke
from ddrl_bus.bench.raw_socket import RawSocket
from ddrl_bus.bench.schedule import Schedule
from ddrl_bus.launch import loop
from ddrl_bus.transport import shared
from ddrl_bus.transport.base import back_channel
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.security import Access, Guard, Peer
from ddrl_bus.transport.wire import Layout, Message

HUB_HOST: Final = Peer("gpu0", "learner")
SPOKE_HOST: Final = Peer("cpu1", "actor")


class Orders(Protocol):
    """Where an end hears what to do."""

    def open(self) -> None: ...

    async def next(self) -> Order | None: ...

    def answer(self, answer: Answer) -> None: ...


class Piped:
    """From another process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def open(self) -> None:
        self._pipe.send(None)

    async def next(self) -> Order | None:
        order: Order | None = await asyncio.to_thread(self._pipe.recv)
        return order

    def answer(self, answer: Answer) -> None:
        self._pipe.send(answer)


class Queued:
    """From the same event loop."""

    def __init__(self) -> None:
        self.orders: asyncio.Queue[Order | None] = asyncio.Queue()
        self.answers: asyncio.Queue[Answer] = asyncio.Queue()

    def open(self) -> None:
        pass

    async def next(self) -> Order | None:
        return await self.orders.get()

    def answer(self, answer: Answer) -> None:
        self.answers.put_nowait(answer)


# ── what a process is started with


def one_end(pipe: Connection, setup: Setup, index: int | None) -> None:
    """The hub, or the spoke of that index."""
    loop.run(_carry_out(Piped(pipe), setup, index))


def all_ends(pipe: Connection, setup: Setup) -> None:
    """Hub and spokes in this one process; an order is for all of them."""
    loop.run(_together(pipe, setup))


async def _together(pipe: Connection, setup: Setup) -> None:
    pipe.send(None)
    outside, memory, members = Piped(pipe), MemoryHub(), [Queued() for _ in range(setup.peers + 1)]
    async with asyncio.TaskGroup() as tasks:
        for index, member in zip((None, *range(setup.peers)), members, strict=True):
            tasks.create_task(_carry_out(member, setup, index, memory))
        running = True
        while running:
            orders: tuple[Order, ...] | None = await outside.next()  # type: ignore[assignment]
            running = orders is not None
            for member, order in zip(members, orders or [None] * len(members), strict=True):
                member.orders.put_nowait(order)
            if running:
                pipe.send([await member.answers.get() for member in members])


# ── ends


async def _carry_out(orders: Orders, setup: Setup, index: int | None, memory: MemoryHub | None = None) -> None:
    bus = Bus(HUB if index is None else spoke(index), 1, Ledger(), memory, _guard(setup, index))
    ends = {"queue": (_receive, _send), "latest": (_publish, _subscribe), "request": (_serve, _ask)}
    try:
        await ends[setup.payload.link][index is not None](bus, orders, setup)
    finally:
        bus.close()


async def _all(orders: Orders) -> AsyncIterator[Order]:
    """Until the last one; whoever asks for the first is open."""
    orders.open()
    while (order := await orders.next()) is not None:
        yield order


async def _moments(order: Order) -> AsyncIterator[int]:
    """When each message is due, once that moment has come; without a rate they are due at once."""
    if order.rate is None:
        for _ in range(order.total):
            yield 0
        return
    schedule, come = Schedule(order.rate, order.total, order.phase), asyncio.Event()
    asyncio.get_running_loop().add_reader(schedule.fileno(), come.set)
    try:
        while not schedule.over:
            await come.wait()
            come.clear()
            for due in schedule.due():
                yield due
    finally:
        asyncio.get_running_loop().remove_reader(schedule.fileno())
        schedule.close()


def _late(due: int) -> float:
    """By how many seconds."""
    return (time.monotonic_ns() - due) / 1e9


async def _receive(bus: Bus, orders: Orders, setup: Setup) -> None:
    receiver = bus.receiver(LINK, [setup.address], setup.payload.window)
    async for order in _all(orders):
        latencies: list[float] = []
        for _ in range(order.warm_up * setup.peers):
            await receiver.recv()
        began = time.perf_counter()
        for _ in range(order.messages * setup.peers):
            message = await receiver.recv()
            if order.rate:
                latencies.append(_late(message.fields["due"]))
        orders.answer(Answer(time.perf_counter() - began, latencies))


async def _send(bus: Bus, orders: Orders, setup: Setup) -> None:
    sender = bus.sender(LINK, {HUB: setup.address}, codec="none")
    layout = Layout("bench", setup.payload.specs)
    async for order in _all(orders):
        async for due in _moments(order):
            await sender.send(layout.arena(), {"due": due})
        await sender.flush(TIMEOUT_S)
        orders.answer(Answer())


async def _publish(bus: Bus, orders: Orders, setup: Setup) -> None:
    share_from = 0 if setup.transport == SHARED else sys.maxsize
    publisher = bus.publisher(LINK, [setup.address], share_from=share_from)
    layout = Layout("bench", setup.payload.specs)
    held, version = asyncio.Queue[None](), 0
    acks = RawSocket(zmq.PULL, lambda _parts: held.put_nowait(None))
    acks.socket.bind(setup.acks)
    try:
        async for order in _all(orders):
            began = sent = 0.0
            async for due in _moments(order):
                version, sent = version + 1, sent + 1
                if sent == order.warm_up + 1:
                    began = time.perf_counter()
                publisher.publish(version, layout.arena(), {"due": due})
                for _ in range(setup.peers if order.rate is None else 0):
                    await asyncio.wait_for(held.get(), TIMEOUT_S)
            orders.answer(Answer(time.perf_counter() - began))
    finally:
        acks.close()


async def _subscribe(bus: Bus, orders: Orders, setup: Setup) -> None:
    """A value that is superseded before it is taken is not waited for: the last one ends the order."""
    subscriber, held = bus.subscriber(LINK, setup.address), 0
    own = {name: np.empty(shape, dtype) for name, (dtype, shape) in setup.payload.specs.items()}

    def load(message: Message) -> None:
        for name, array in own.items():
            np.copyto(array, message.arrays[name])

    acks = RawSocket(zmq.PUSH, lambda _parts: None)
    acks.socket.connect(setup.acks)
    try:
        async for order in _all(orders):
            last, latencies = held + order.total, []
            while held < last:
                loaded = shared.read(await asyncio.wait_for(subscriber.next(), TIMEOUT_S), load)
                if not order.rate:
                    acks.send(b"")
                elif loaded.seq > held:
                    latencies.append(_late(loaded.fields["due"]))
                held = loaded.seq
            orders.answer(Answer(latencies=latencies))
    finally:
        acks.close()


async def _serve(bus: Bus, orders: Orders, setup: Setup) -> None:
    server = bus.server(LINK, [setup.address])
    action = Layout("answer", {"action": ("int64", (16,))})
    serving = asyncio.create_task(server.serve(lambda request: request.answer("answer", {}, action.arena())))
    async for _ in _all(orders):
        orders.answer(Answer())
    serving.cancel()


async def _ask(bus: Bus, orders: Orders, setup: Setup) -> None:
    client, layout = bus.client(LINK, setup.address), Layout("bench", setup.payload.specs)

    def asked() -> asyncio.Future[Any]:
        return client.ask("bench", {}, layout.arena().arrays, timeout_s=TIMEOUT_S)

    async for order in _all(orders):
        latencies: list[float] = []
        if order.rate is None:
            for _ in range(order.warm_up):
                await asked()
            began = time.perf_counter()
            for _ in range(order.messages):
                await asked()
            orders.answer(Answer(time.perf_counter() - began))
            continue
        answers = []
        async for due in _moments(order):
            answers.append(asked())
            answers[-1].add_done_callback(_noting(latencies, due))
        await asyncio.gather(*answers)
        await asyncio.sleep(0)
        orders.answer(Answer(latencies=latencies))


def _noting(latencies: list[float], due: int) -> Callable[[object], None]:
    return lambda _answer: latencies.append(_late(due))


# ── keys


def _guard(setup: Setup, index: int | None) -> Guard | None:
    if setup.transport != "tcp+CURVE":
        return None
    addresses = setup.address, back_channel(setup.address)
    if index is None:
        guests = {LINK: {spoke(each): SPOKE_HOST for each in range(setup.peers)}}
        node, own, access = HUB, HUB_HOST, Access(binds=frozenset(addresses), guests=guests)
    else:
        node, own, access = spoke(index), SPOKE_HOST, Access(servers=dict.fromkeys(addresses, HUB_HOST))
    return Guard(node, access, keys.own(own.host), keys.AllowList(), Ledger())
