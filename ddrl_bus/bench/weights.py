"""What it costs that many processes get the newest weights: `ddrl bench weights`.

On one host, turn by turn in one run: our `latest` link, whose subscribers read the value where it lies, and a bare
PUB/SUB pair of pyzmq with one frame a value. Each subscriber looks at every page of the array and says so; a round ends
when all have. With `--mbit` between two network namespaces, the way from one to the other limited: half-precision
weights, whole and as differences. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from ddrl_bus.errors import UsageError
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
_ACK: Final = struct.Struct("<qd")
"""Number of the value, and the subscriber's processor time so far in seconds."""
MOVES: Final = (1.0, 0.45)
"""How much of the rows of weights an optimiser step moves: all; or as in a convolutional network that learns Pong."""


@dataclass(frozen=True, slots=True)
class Row:
    """Of one way; milliseconds, medians over the rounds."""

    way: str
    subscribers: int
    bytes: int
    """of a value"""
    all_hold_ms: float
    p90_ms: float
    publisher_cpu_ms: float
    cpu_ms: float
    """a value, of all processes"""
    sent_bytes: float
    """a value; between hosts only"""


# ── one host ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(subscribers: int = 16, size: int = SIZE, rounds: int = 50) -> Iterator[Row]:
    """The link, and bare PUB/SUB."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder, ExitStack() as undo:
        sides: dict[str, Callable[..., None]] = {"link": _subscribe, "bare PUB/SUB": _subscribe_bare}
        addresses = {way: f"ipc://{folder}/{n}" for n, way in enumerate(sides)}
        acks = {way: undo.enter_context(_acks(f"{address}.acks")) for way, address in addresses.items()}
        for way, side in sides.items():
            ends = [(side, (n, addresses[way], f"{addresses[way]}.acks")) for n in range(subscribers)]
            undo.enter_context(_running(ends))
        yield from asyncio.run(_on_one_host(addresses, acks, subscribers, size, rounds))


async def _on_one_host(
    addresses: dict[str, str], acks: dict[str, zmq.Socket[bytes]], subscribers: int, size: int, rounds: int
) -> list[Row]:
    keep_freed_memory()  # as every node does
    bus = Bus("learner-0", 1, Ledger())
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    bare = context.socket(zmq.PUB)
    bare.bind(addresses["bare PUB/SUB"])
    publisher = bus.publisher("weights", [addresses["link"]])
    weights = np.random.default_rng(0).standard_normal(size // 4, np.float32)
    send = {
        "link": lambda number, arena: publisher.publish(number, arena, {}),
        "bare PUB/SUB": lambda number, arena: bare.send(arena.encode("learner-0", 1, number, {}), copy=False),
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
    return [_row(way, subscribers, weights.nbytes, of[WARM_UP:]) for way, of in timed.items()]


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


@dataclass(frozen=True, slots=True)
class _Round:
    seconds: float
    publisher_s: float
    others_s: float
    """Processor time of all subscribers so far."""


def _round(
    send: Callable[[int, Arena], object], number: int, arena: Arena, acks: zmq.Socket[bytes], subscribers: int
) -> _Round:
    began, cpu = time.perf_counter(), time.process_time()
    send(number, arena)
    others: dict[bytes, float] = {}
    while len(others) < subscribers:
        if not acks.poll(int(PATIENCE_S * 1e3)):
            raise UsageError(f"{subscribers - len(others)} subscribers did not get a value in {PATIENCE_S:.0f} s")
        who, ack = acks.recv_multipart()
        seen, cpu_s = _ACK.unpack(ack)
        if seen == number:
            others[who] = cpu_s
    return _Round(time.perf_counter() - began, time.process_time() - cpu, sum(others.values()))


def _row(way: str, subscribers: int, size: int, rounds: Sequence[_Round], sent: float = 0.0) -> Row:
    seconds = sorted(each.seconds for each in rounds)
    publisher = statistics.median(each.publisher_s for each in rounds)
    others = (rounds[-1].others_s - rounds[0].others_s) / max(1, len(rounds) - 1)
    p90 = seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))]
    return Row(
        way,
        subscribers,
        size,
        1e3 * statistics.median(seconds),
        1e3 * p90,
        1e3 * publisher,
        1e3 * (publisher + others),
        sent,
    )


# ── subscribers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _subscribe(number: int, address: str, acks: str, namespace: str = "") -> None:
    async def main() -> None:
        told = _told(acks)
        weights = Bus(f"actor-{number}", 1, Ledger()).subscriber("weights", address)
        while True:
            loaded = read(await weights.next(), lambda message: _look(message.arrays["w"]))
            _tell(told, number, loaded)

    _enter(namespace)
    keep_freed_memory()
    asyncio.run(main())


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
        _tell(told, number, message)


def _look(array: Array) -> int:
    """Touch every page."""
    return int(array.view(np.uint8)[::PAGE].sum(dtype=np.int64))


def _told(acks: str) -> zmq.Socket[bytes]:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(acks)
    return socket


def _tell(told: zmq.Socket[bytes], number: int, message: Message) -> None:
    told.send_multipart([b"%d" % number, _ACK.pack(message.seq, time.process_time())])


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


def measure_between_hosts(mbit: float, size: int = SIZE, rounds: int = 10) -> Iterator[Row]:
    """Half-precision weights over a cable of so many megabit a second, from publishing until the other host holds them.

    Raises:
        UsageError: we may not make network namespaces.
    """
    if os.geteuid() != 0:
        raise UsageError("--mbit needs two network namespaces, which only root may make")
    with _cable(mbit) as (here, there), tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        for moves in MOVES:
            for codec in ("none", "delta"):
                spawn = multiprocessing.get_context("spawn")
                ours, theirs = spawn.Pipe()
                acks = f"ipc://{folder}/acks"  # past the cable
                args = (codec, moves, size, rounds, acks, here, theirs)
                address = f"tcp://{_ADDRESSES[0]}:{_PORT}"
                ends: list[_End] = [(_publish_far, args), (_subscribe, (0, address, acks, there))]
                with _running(ends):
                    if not ours.poll(PATIENCE_S + rounds * size * 16 / (mbit * 1e6)):
                        raise UsageError("nothing came over the cable")
                    yield ours.recv()


_ADDRESSES: Final = ("10.78.0.1", "10.78.0.2")
_PORT: Final = 5555


def _publish_far(codec: Codec, moves: float, size: int, rounds: int, acks: str, namespace: str, result: Any) -> None:
    async def main() -> Row:
        ledger = Ledger()
        publisher = Bus("learner-0", 1, ledger).publisher("weights", [f"tcp://{_ADDRESSES[0]}:{_PORT}"], codec)
        rng = np.random.default_rng(0)
        weights = rng.standard_normal((size // 1024, 512), np.float32) * 0.03
        timed = []
        with _acks(acks) as heard:
            for number in range(1, rounds + 2):
                began, cpu = time.perf_counter(), time.process_time()
                publisher.publish(number, Arena.of("weights", {"w": weights.astype(np.float16)}), {})
                while not heard.poll(0):  # noqa: ASYNC110  - it is not of this loop
                    await asyncio.sleep(0.0005)
                _, ack = heard.recv_multipart()
                timed.append(_Round(time.perf_counter() - began, time.process_time() - cpu, _ACK.unpack(ack)[1]))
                if number == 1:
                    before = ledger.snapshot()["weights/bytes_out"]
                moved = rng.random((len(weights), 1)) < moves
                weights += 2.5e-4 * 0.1 * rng.standard_normal(weights.shape, np.float32) * moved
        sent = (ledger.snapshot()["weights/bytes_out"] - before) / rounds
        way = f"{'whole' if codec == 'none' else codec}, {moves:.0%} moves"
        return _row(way, 1, weights.size * 2, timed[1:], sent)

    _enter(namespace)
    keep_freed_memory()
    result.send(asyncio.run(main()))
    time.sleep(PATIENCE_S)  # until we are killed


def _enter(namespace: str) -> None:
    """Have this process, which has no threads yet, in another network namespace."""
    if namespace:
        with Path(f"/run/netns/{namespace}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


@contextmanager
def _cable(mbit: float) -> Iterator[tuple[str, str]]:
    """Two network namespaces and the cable between them, that lets so much through each way."""
    names = [f"ddrl-bench-{os.getpid()}-{n}" for n in range(2)]
    ends = [f"db{os.getpid()}{n}" for n in range(2)]
    with ExitStack() as undo:
        for name in names:
            _ip("netns", "add", name)
            undo.callback(_ip, "netns", "del", name)
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, _ADDRESSES, strict=True):
            _ip("link", "set", end, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
            limit = ("tbf", "rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
            _call("tc", "-n", name, "qdisc", "add", "dev", end, "root", *limit)
        yield names[0], names[1]


def _ip(*words: str) -> None:
    _call("ip", *words)


def _call(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(f"{' '.join(words)}: {getattr(error, 'stderr', '') or error}") from None


def rows_as_text(rows: Iterator[Row]) -> Iterator[str]:
    """A table, a line at a time as the figures come."""
    head = f"{'way':<22}{'subscribers':>12}{'bytes':>12}{'all hold ms':>13}{'p90 ms':>9}"
    yield f"{head}{'publisher CPU ms':>18}{'CPU ms':>9}{'sent bytes':>13}"
    for row in rows:
        sent = f"{row.sent_bytes:>13,.0f}" if row.sent_bytes else f"{'-':>13}"
        yield (
            f"{row.way:<22}{row.subscribers:>12}{row.bytes:>12,}{row.all_hold_ms:>13.2f}{row.p90_ms:>9.2f}"
            f"{row.publisher_cpu_ms:>18.2f}{row.cpu_ms:>9.2f}{sent}"
        )
