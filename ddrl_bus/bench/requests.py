"""What a round trip of the `request` link costs over the sockets under it: `ddrl bench requests`.

Each row sends as many bytes up and down between the same two processes in two ways, turn by turn: arrays through our
client and server, which pack and unpack them, and an opaque frame through a bare DEALER/ROUTER pair of pyzmq, driven by
asyncio over the sockets' file descriptors as ours is. What goes up was copied to fresh memory before the clock started,
as an environment step leaves it; what comes down is copied to fresh memory by the server in either way. Packing is part
of our time. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import zmq

from ddrl_bus.bench.raw_socket import RawSocket
from ddrl_bus.bench.report import US, About, Repeat, Row, row, settled
from ddrl_bus.launch import loop
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport import wire
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.wire import Array

TIMEOUT_S: Final = 10.0
BLOCK: Final = 50
"""Round trips through one, then as many through the other, so that both meet the same moods of the machine."""
WARM_UP: Final = 4
"""Blocks."""


@dataclass(frozen=True)
class Case:
    """What goes up and what comes down."""

    payload: str
    up: Mapping[str, Array]
    down: Mapping[str, Array]
    blocks: int = 60


def _group(obs: Array) -> dict[str, Array]:
    """What an actor sends of a group of environments."""
    n = len(obs)
    return {
        "obs": obs,
        "reward": np.zeros(n, np.float32),
        "terminated": np.zeros(n, bool),
        "truncated": np.zeros(n, bool),
    }


CASES: Final = (
    Case("64 B", {"x": np.zeros(64, np.uint8)}, {"x": np.zeros(64, np.uint8)}),
    Case("16 × 4 floats", _group(np.zeros((16, 4), np.float32)), {"action": np.zeros(16, np.int64)}),
    Case("64 × 4 floats", _group(np.zeros((64, 4), np.float32)), {"action": np.zeros(64, np.int64)}),
    Case("16 × 84 × 84 bytes", _group(np.zeros((16, 84, 84), np.uint8)), {"action": np.zeros(16, np.int64)}, 30),
)
FIELDS: Final = {"group": 0, "step": 0, "begins": False, "returns": [], "lengths": []}
SAID: Final = {"version": 0, "learner_epoch": 0}


ABOUT: Final = About(
    bench="requests",
    title="What a round trip of the request link costs over the sockets under it",
    method="""An actor asks, an inference node answers: arrays through our client and server, which pack and unpack
them, and as many opaque bytes through a bare DEALER/ROUTER pair of pyzmq, driven by asyncio as ours is. Two
processes over ipc, fifty round trips through one and fifty through the other in turn.""",
    reading="Microseconds from question to answer: the median of the trips, and what one in a hundred exceeds.",
    baseline="the bare socket pair",
)
KINDS: Final = dict.fromkeys(("link", "raw", "link p99", "raw p99"), US)
RATIOS: Final = {"ratio": ("link", "raw"), "p99 ratio": ("link p99", "raw p99")}


def measure(repeats: int = 5) -> Iterator[Row]:
    """One row per case."""
    for number, case in enumerate(CASES):
        make = partial(row, "round trips", case.payload, kinds=KINDS, ratios=RATIOS)
        yield settled(partial(_once, number), make, repeats)


def _once(number: int) -> Repeat:
    (link, link_p99), (raw, raw_p99) = ((np.percentile(way, (50, 99)) * 1e6).tolist() for way in _trips(number))
    return {"link": link, "raw": raw, "link p99": link_p99, "raw p99": raw_p99}


def _trips(number: int) -> tuple[list[float], list[float]]:
    """Seconds of each round trip between two fresh processes, through our link and through the bare pair."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        sides = [spawn.Process(target=side, args=(number, f"ipc://{folder}", theirs)) for side in (_serve, _ask)]
        for side in sides:
            side.start()
        trips: tuple[list[float], list[float]] = ours.recv() if ours.poll(120) else ([float("nan")], [float("nan")])
        for side in sides:
            side.kill()
            side.join()
    return trips


def _serve(number: int, folder: str, _result: Connection) -> None:
    keep_freed_memory()  # as every node does
    loop.run(_answers(CASES[number], folder))


async def _answers(case: Case, folder: str) -> None:
    server = Bus("inference-0", 1, Ledger()).server("act", [f"{folder}/link"])
    frame = np.frombuffer(wire.encode("actions", "inference-0", 1, 1, SAID, case.down), np.uint8)
    raw = RawSocket(zmq.ROUTER, lambda parts: raw.send(parts[0].bytes, frame.copy().data))
    raw.socket.bind(f"{folder}/raw")
    await server.serve(lambda request: request.answer("actions", SAID, _anew(case.down)))


def _anew(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}


def _ask(number: int, folder: str, result: Connection) -> None:
    keep_freed_memory()
    result.send(loop.run(_both(CASES[number], folder)))


async def _both(case: Case, folder: str) -> tuple[list[float], list[float]]:
    client = Bus("actor-0", 1, Ledger()).client("act", f"{folder}/link")
    frame = np.frombuffer(wire.encode("act", "actor-0", 1, 1, FIELDS, case.up), np.uint8)
    answer: asyncio.Future[None]
    raw = RawSocket(zmq.DEALER, lambda _parts: answer.set_result(None))
    raw.socket.connect(f"{folder}/raw")

    async def through_link() -> float:
        arrays = _anew(case.up)
        began = time.perf_counter()
        await client.request("act", FIELDS, arrays, timeout_s=TIMEOUT_S)
        return time.perf_counter() - began

    async def through_raw() -> float:
        nonlocal answer
        anew = frame.copy()
        began = time.perf_counter()
        answer = asyncio.get_running_loop().create_future()
        raw.send(anew.data)
        await answer
        return time.perf_counter() - began

    trips: tuple[list[float], list[float]] = [], []
    for block in range(-WARM_UP, case.blocks):
        for trip, times in zip((through_link, through_raw), trips, strict=True):
            times += [await trip() for _ in range(BLOCK)]
        if block < 0:
            trips = ([], [])
    return trips
