"""What it costs that many processes get the newest weights: `ddrl bench weights`.

On one host, turn by turn in one run: our `latest` link, whose subscribers read the value where it lies, and a bare
PUB/SUB pair of pyzmq with one frame a value. Each subscriber looks at every page of the array and notes when. With
`--mbit` between two network namespaces, the way from one to the other limited: half-precision weights, whole and as
differences. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import zmq

from ddrl_bus.bench.cable import ADDRESSES, MISSING, Cable, plugged_in
from ddrl_bus.bench.report import BYTES, MS, About, Repeat, Row, row
from ddrl_bus.errors import UsageError
from ddrl_bus.launch import loop
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Publisher
from ddrl_bus.transport.shared import read
from ddrl_bus.transport.wire import Arena, Array, Codec, Message

SIZE: Final = 6_700_000
"""Bytes of DQN's network for Atari games in single precision."""
WARM_UP: Final = 5
PATIENCE_S: Final = 120.0
"""Against hangs only."""
PAGE: Final = 4096
_End = tuple[Callable[..., None], tuple[Any, ...]]
_ACK: Final = struct.Struct("<qdd")
"""Number of the value, when the subscriber held it, and its processor time so far, in seconds; processes of one machine
share the clock."""
TELL_AFTER_S: Final = 0.1
"""So that who is done does not take the processor, by saying so, from those who are not."""
MOVES: Final = (1.0, 0.45)
"""How much of the rows of weights an optimiser step moves: all; or as in a convolutional network that learns Pong."""


ABOUT: Final = About(
    bench="weights",
    title="How soon many processes hold the newest weights",
    method="""On one host, turn by turn in one run: our link, whose subscribers read the value where it lies, and a
bare PUB/SUB pair of pyzmq with one frame a value. Each subscriber looks at every page of the array, notes when, and
says so a tenth of a second later; a round, which is a repeat, ends when all have. Between two hosts, which are network
namespaces joined by a narrow cable: half-precision weights, whole and as differences, after optimiser steps that moved
all rows of weights, or 45 % of them.""",
    reading="""Until all hold it: from publishing until the last has looked at the last page. Between hosts the ratios
are of differences to whole values, first of the time and then of the bytes.""",
    baseline="bare PUB/SUB, or whole values",
)
WHAT: Final = ("until all hold it", "processor time of the publisher", "processor time of all")


# ── one host ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(subscribers: int = 16, size: int = SIZE, rounds: int = 50) -> Iterator[Row]:
    """The link, and bare PUB/SUB."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder, ExitStack() as undo:
        sides: dict[str, Callable[..., None]] = {"link": _subscribe, "bare": _subscribe_bare}
        addresses = {way: f"ipc://{folder}/{n}" for n, way in enumerate(sides)}
        acks = {way: undo.enter_context(_acks(f"{address}.acks")) for way, address in addresses.items()}
        for way, side in sides.items():
            ends = [(side, (n, addresses[way], f"{addresses[way]}.acks")) for n in range(subscribers)]
            undo.enter_context(_running(ends))
        timed = loop.run(_on_one_host(addresses, acks, subscribers, size, rounds))
    figures = {way: _figures(of[WARM_UP - 1 :]) for way, of in timed.items()}
    for n, what in enumerate(WHAT):
        found = [
            dict(zip(figures, each, strict=True)) for each in zip(*(of[n] for of in figures.values()), strict=True)
        ]
        section = f"{subscribers} processes of this host, {size:,} bytes"
        yield row(section, what, found, dict.fromkeys(figures, MS), {"ratio": ("link", "bare")})


async def _on_one_host(
    addresses: dict[str, str], acks: dict[str, zmq.Socket[bytes]], subscribers: int, size: int, rounds: int
) -> dict[str, list[_Round]]:
    keep_freed_memory()  # as every node does
    bus = Bus("learner-0", 1, Ledger())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bare = context.socket(zmq.PUB)
    bare.bind(addresses["bare"])
    publisher = bus.publisher("weights", [addresses["link"]])
    weights = np.random.default_rng(0).standard_normal(size // 4, np.float32)
    send = {
        "link": lambda number, arena: publisher.publish(number, arena, {}),
        "bare": lambda number, arena: bare.send(arena.encode("learner-0", 1, number, {}), copy=False),
    }
    timed: dict[str, list[_Round]] = {way: [] for way in send}
    try:
        number = await _until_all_are_there(publisher, bare, acks, subscribers, weights)
        for _ in range(WARM_UP + rounds):
            for way in send:
                number += 1
                weights += 1e-3
                arena = Arena.of("weights", {"w": weights})
                timed[way].append(_round(send[way], number, arena, acks[way], subscribers))
                await asyncio.sleep(0.002)  # our end looks after its timers
    finally:
        bus.close()
        context.destroy(linger=0)
    return timed


async def _until_all_are_there(
    publisher: Publisher, bare: Any, acks: dict[str, zmq.Socket[bytes]], subscribers: int, weights: Array
) -> int:
    """Publish until everybody has heard something."""
    heard: dict[str, set[bytes]] = {way: set() for way in acks}
    deadline = time.monotonic() + PATIENCE_S
    number = 0
    while any(len(who) < subscribers for who in heard.values()):
        if time.monotonic() > deadline:
            raise UsageError(f"not all of {subscribers} subscribers have started within {PATIENCE_S:.0f} s")
        number += 1
        publisher.publish(number, Arena.of("weights", {"w": weights}), {})
        bare.send(Arena.of("weights", {"w": weights}).encode("learner-0", 1, number, {}))
        await asyncio.sleep(0.2)
        for way, socket in acks.items():
            while socket.poll(0):
                heard[way].add(socket.recv_multipart()[0])
    return number


class _Round(NamedTuple):
    seconds: float
    publisher_s: float
    others_s: float
    """Processor time of all subscribers so far."""


def _round(
    send: Callable[[int, Arena], object], number: int, arena: Arena, acks: zmq.Socket[bytes], subscribers: int
) -> _Round:
    began, cpu = time.perf_counter(), time.process_time()
    send(number, arena)
    held = began
    others: dict[bytes, float] = {}
    while len(others) < subscribers:
        if not acks.poll(int(PATIENCE_S * 1e3)):
            raise UsageError(f"{subscribers - len(others)} subscribers did not get a value in {PATIENCE_S:.0f} s")
        who, ack = acks.recv_multipart()
        seen, then, cpu_s = _ACK.unpack(ack)
        if seen == number:
            others[who], held = cpu_s, max(held, then)
    return _Round(held - began, time.process_time() - cpu, sum(others.values()))


def _figures(rounds: Sequence[_Round]) -> list[list[float]]:
    """Milliseconds, [WHAT, rounds - 1]: the first one tells what the others have used before."""
    seconds, publisher, others = 1e3 * np.array(rounds).T
    figures: list[list[float]] = np.stack([seconds[1:], publisher[1:], publisher[1:] + np.diff(others)]).tolist()
    return figures


# ── subscribers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _subscribe(number: int, address: str, acks: str, namespace: str = "") -> None:
    async def main() -> None:
        told = _told(acks)
        weights = Bus(f"actor-{number}", 1, Ledger()).subscriber("weights", address)
        while True:
            loaded = read(await weights.next(), lambda message: _look(message.arrays["w"]))
            held = time.perf_counter()
            await asyncio.sleep(TELL_AFTER_S)
            _tell(told, number, loaded, held)

    _enter(namespace)
    keep_freed_memory()
    loop.run(main())


def _subscribe_bare(number: int, address: str, acks: str) -> None:
    keep_freed_memory()
    socket = zmq.Context().socket(zmq.SUB)
    socket.subscribe(b"")
    socket.connect(address)
    told = _told(acks)
    from ddrl_bus.transport import wire

    while True:
        message = wire.decode(socket.recv(copy=False).buffer)
        _look(message.arrays["w"])
        held = time.perf_counter()
        time.sleep(TELL_AFTER_S)
        _tell(told, number, message, held)


def _look(array: Array) -> int:
    """Touch every page."""
    return int(array.view(np.uint8)[::PAGE].sum(dtype=np.int64))


def _told(acks: str) -> zmq.Socket[bytes]:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(acks)
    return socket


def _tell(told: zmq.Socket[bytes], number: int, message: Message, held: float) -> None:
    told.send_multipart([b"%d" % number, _ACK.pack(message.seq, held, time.process_time())])


@contextmanager
def _acks(address: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        yield socket


@contextmanager
def _running(ends: Sequence[_End]) -> Iterator[None]:
    spawn = multiprocessing.get_context("spawn")
    processes: list[SpawnProcess] = [spawn.Process(target=side, args=args, daemon=True) for side, args in ends]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


# ── between hosts ────────────────────────────────────────────────────────────────────────────────────────────────────


PORT: Final = 5555
_FAR: Final = {"": MS, " CPU": MS, " sent": BYTES}
"""Of each way; CPU is the publisher's."""


def measure_between_hosts(mbit: float, size: int = SIZE, rounds: int = 10) -> Iterator[Row]:
    """Half-precision weights over a cable of so many megabit a second, from publishing until the other host holds them.

    Raises:
        UsageError: this machine cannot make namespaces.
    """
    if MISSING:
        raise UsageError(f"bench weights --mbit: {MISSING}")
    kinds = {way + what: kind for what, kind in _FAR.items() for way in ("whole", "delta")}
    ratios = {"ratio": ("delta", "whole"), "bytes ratio": ("delta sent", "whole sent")}
    patience_s = PATIENCE_S + rounds * size * 16 / (mbit * 1e6)
    with plugged_in() as cable, cable.narrow(mbit * 1e6 / 8):
        for moves in MOVES:
            whole, delta = (_far(cable, codec, moves, size, rounds, patience_s) for codec in ("none", "delta"))
            found = [
                {f"{way}{what}": value for way, each in zip(("whole", "delta"), pair, strict=True)
                 for what, value in each.items()}
                for pair in zip(whole, delta, strict=True)
            ]  # fmt: skip
            yield row(f"another host, {mbit:g} Mbit/s, {size:,} bytes", f"{moves:.0%} moves", found, kinds, ratios)


def _far(cable: Cable, codec: str, moves: float, size: int, rounds: int, patience_s: float) -> list[Repeat]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    here, there = (cable.namespaces[host] for host in ("gpu0", "cpu1"))
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        acks = f"ipc://{folder}/acks"  # past the cable
        address = f"tcp://{ADDRESSES['gpu0']}:{PORT}"
        publish = (_publish_far, (codec, moves, size, rounds, address, acks, here, theirs))
        with _running([publish, (_subscribe, (0, address, acks, there))]):
            if not ours.poll(patience_s):
                raise UsageError("nothing came over the cable")
            found: list[Repeat] = ours.recv()
    return found


def _publish_far(
    codec: Codec, moves: float, size: int, rounds: int, address: str, acks: str, namespace: str, result: Any
) -> None:
    async def main() -> list[Repeat]:
        ledger = Ledger()
        publisher = Bus("learner-0", 1, ledger).publisher("weights", [address], codec)
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((size // 1024, 512), np.float32) * 0.03
        found: list[Repeat] = []
        sent = 0
        with _acks(acks) as heard:
            for number in range(1, rounds + 2):
                began, cpu = time.perf_counter(), time.process_time()
                publisher.publish(number, Arena.of("weights", {"w": weights.astype(np.float16)}), {})
                while not heard.poll(0):  # noqa: ASYNC110  - it is not of this loop
                    await asyncio.sleep(0.0005)
                heard.recv_multipart()
                before, sent = sent, ledger.snapshot()["weights/bytes_out"]
                took, used = time.perf_counter() - began, time.process_time() - cpu
                found.append({"": 1e3 * took, " CPU": 1e3 * used, " sent": sent - before})
                moved = rng.random((len(weights), 1)) < moves
                weights += 2.5e-4 * 0.1 * rng.standard_normal(weights.shape, np.float32) * moved
        return found[1:]  # without the connecting

    _enter(namespace)
    keep_freed_memory()
    result.send(loop.run(main()))
    time.sleep(PATIENCE_S)  # until we are killed


def _enter(namespace: str) -> None:
    """Have this process, which has no threads yet, in another network namespace."""
    if namespace:
        with Path(f"/run/netns/{namespace}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
