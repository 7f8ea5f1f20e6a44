"""What the link ends cost over the sockets under them: `ddrl bench links`.

Each row moves the same bytes twice between two processes in one run, turn by turn: through our `queue` link and through
a bare blocking PUSH/PULL pair of pyzmq with one frame a message. Quote the ratios and differences; absolute figures
follow the machine's mood.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import zmq

from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.security import Guard
from ddrl_bus.transport.wire import Layout, Spec
from ddrl_bus.transport.zeromq import COPY_BELOW

PAYLOADS: Final[dict[str, dict[str, Spec]]] = {
    "small unroll, 320 B": {"obs": ("float32", (20, 4))},
    "pixel unroll, 567 KB": {
        "obs": ("uint8", (20, 84, 84, 4)),
        "action": ("int64", (20,)),
        "reward": ("float32", (20,)),
        "terminated": ("bool", (20,)),
        "truncated": ("bool", (20,)),
        "logits": ("float32", (20, 6)),
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    payload: str
    window: int
    messages: int


CASES: Final = (
    Case("small unroll, 320 B", 64, 40_000),
    Case("small unroll, 320 B", 16, 10_000),
    Case("small unroll, 320 B", 2, 2_000),
    Case("pixel unroll, 567 KB", 16, 3_000),
    Case("pixel unroll, 567 KB", 2, 1_500),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds a message, medians over the repeats; `ratio` is the median of the paired ratios."""

    payload: str
    window: int
    link_us: float
    raw_us: float
    ratio: float
    spread: tuple[float, float]


def measure(repeats: int = 5) -> Iterator[Row]:
    """One row per case, each pair of figures taken turn by turn."""
    for case in CASES:
        pairs = [(timed(case, link_pull, link_push), timed(case, _raw_pull, _raw_push)) for _ in range(repeats)]
        ratios = sorted(link / raw for link, raw in pairs)
        yield Row(
            case.payload,
            case.window,
            statistics.median(link for link, _ in pairs),
            statistics.median(raw for _, raw in pairs),
            statistics.median(ratios),
            (ratios[0], ratios[-1]),
        )


Side = Callable[[Case, str, Connection], None]


def timed(case: Case, pull: Side, push: Side, address: str | None = None) -> float:
    """Microseconds a message between two fresh processes, as the receiver sees it; over ipc without an `address`."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        args = (case, address or f"ipc://{folder}/bench", theirs)
        ends = [spawn.Process(target=_side, args=(side, *args)) for side in (pull, push)]
        for end in ends:
            end.start()
        elapsed: float = ours.recv() if ours.poll(60) else float("nan")
        for end in ends:
            end.kill()
            end.join()
    return elapsed / case.messages * 1e6


def _side(side: Side, case: Case, address: str, result: Connection) -> None:
    keep_freed_memory()  # as every node does; the bare pair gets the same
    side(case, address, result)


def _warm_up(case: Case) -> int:
    return max(100, case.messages // 10)


def link_push(case: Case, address: str, _result: Connection, guard: Guard | None = None) -> None:
    async def main() -> None:
        bus = Bus("actor-0", 1, Ledger(), guard=guard)
        sender = bus.sender("trajectories", {"learner-0": address})
        layout = Layout("trajectory", PAYLOADS[case.payload])
        for number in range(case.messages + _warm_up(case)):
            await sender.send(layout.arena(), {"version": number})
        await asyncio.sleep(60)  # until we are killed

    asyncio.run(main())


def link_pull(case: Case, address: str, result: Connection, guard: Guard | None = None) -> None:
    async def main() -> None:
        bus = Bus("learner-0", 1, Ledger(), guard=guard)
        receiver = bus.receiver("trajectories", [address], case.window)
        for _ in range(_warm_up(case)):
            await receiver.recv()
        began = time.perf_counter()
        for _ in range(case.messages):
            await receiver.recv()
        result.send(time.perf_counter() - began)

    asyncio.run(main())


def _raw_push(case: Case, address: str, _result: Connection) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, case.window)
        socket.setsockopt(zmq.LINGER, 5_000)
        socket.connect(address)
        size = len(Layout("trajectory", PAYLOADS[case.payload]).arena().encode("actor-0", 1, 0, {}))
        for _ in range(case.messages + _warm_up(case)):
            frame = np.empty(size, np.uint8).data  # a new one each time, as whoever produces data has
            if size < COPY_BELOW:
                socket.send(frame)
            else:
                socket.send(frame, copy=False)
        time.sleep(60)  # until we are killed: an ipc sender that leaves takes the tail with it


def _raw_pull(case: Case, address: str, result: Connection) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.setsockopt(zmq.RCVHWM, case.window)
        socket.bind(address)
        for _ in range(_warm_up(case)):
            socket.recv(copy=False)
        began = time.perf_counter()
        for _ in range(case.messages):
            socket.recv(copy=False)
        result.send(time.perf_counter() - began)


def rows_as_text(rows: Iterator[Row]) -> Iterator[str]:
    """A table, a line at a time as the figures come."""
    yield f"{'payload':<22}{'window':>7}{'link µs':>10}{'raw µs':>10}{'more µs':>10}{'ratio':>8}   spread of ratio"
    for row in rows:
        yield (
            f"{row.payload:<22}{row.window:>7}{row.link_us:>10.1f}{row.raw_us:>10.1f}"
            f"{row.link_us - row.raw_us:>10.1f}{row.ratio:>8.2f}   {row.spread[0]:.2f} to {row.spread[1]:.2f}"
        )
