"""What encryption costs: `ddrl bench curve`.

Each row moves the same unrolls through our `queue` link over tcp on one machine, in plain text and by key, turn by turn
in one run. Quote the ratios; absolute figures follow the machine's mood.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from typing import Final

import numpy as np

from ddrl_bus import keys
from ddrl_bus.bench.links import PAYLOADS, Case, link_pull, link_push, timed
from ddrl_bus.transport.base import back_channel
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.security import Access, Guard, Peer

CASES: Final = (
    Case("small unroll, 320 B", 64, 20_000),
    Case("pixel unroll, 567 KB", 16, 1_500),
)
LEARNER: Final = Peer("gpu0", "learner")
ACTOR: Final = Peer("cpu1", "actor")


@dataclass(frozen=True, slots=True)
class Row:
    """Microseconds a message, medians over the repeats; `ratio` is the median of the paired ratios."""

    payload: str
    window: int
    plain_us: float
    curve_us: float
    curve_mb_s: float
    ratio: float
    spread: tuple[float, float]


def measure(repeats: int = 5) -> Iterator[Row]:
    """One row per case, each pair of figures taken turn by turn."""
    for case in CASES:
        with _keys():
            pairs = [
                (timed(case, link_pull, link_push, _address()), timed(case, _guarded_pull, _guarded_push, _address()))
                for _ in range(repeats)
            ]
        ratios = sorted(curve / plain for plain, curve in pairs)
        size = sum(np.dtype(dtype).itemsize * prod(shape) for dtype, shape in PAYLOADS[case.payload].values())
        curve_us = statistics.median(curve for _, curve in pairs)
        yield Row(
            case.payload,
            case.window,
            statistics.median(plain for plain, _ in pairs),
            curve_us,
            size / curve_us,
            statistics.median(ratios),
            (ratios[0], ratios[-1]),
        )


@contextmanager
def _keys() -> Iterator[None]:
    """Keys of two hosts, where the processes that are started meanwhile find them."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        before = os.environ.get(keys.ENVIRONMENT)
        os.environ[keys.ENVIRONMENT] = folder
        try:
            for peer in (LEARNER, ACTOR):
                keys.new(peer.host)
            yield
        finally:
            del os.environ[keys.ENVIRONMENT]
            if before is not None:
                os.environ[keys.ENVIRONMENT] = before


def _address() -> str:
    """Of a link, which takes two ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return f"tcp://127.0.0.1:{port}"


def _guarded_push(case: Case, address: str, result: Connection) -> None:
    access = Access(servers=dict.fromkeys((address, back_channel(address)), LEARNER))
    link_push(case, address, result, _guard("actor-0", ACTOR, access))


def _guarded_pull(case: Case, address: str, result: Connection) -> None:
    access = Access(
        binds=frozenset((address, back_channel(address))),
        guests={"trajectories": {"actor-0": ACTOR}},
    )
    link_pull(case, address, result, _guard("learner-0", LEARNER, access))


def _guard(node: str, peer: Peer, access: Access) -> Guard:
    return Guard(node, access, keys.own(peer.host), keys.AllowList(), Ledger())


def rows_as_text(rows: Iterator[Row]) -> Iterator[str]:
    """A table, a line at a time as the figures come."""
    yield f"{'payload':<22}{'window':>7}{'plain µs':>10}{'CURVE µs':>10}{'MB/s':>8}{'ratio':>8}   spread of ratio"
    for row in rows:
        yield (
            f"{row.payload:<22}{row.window:>7}{row.plain_us:>10.1f}{row.curve_us:>10.1f}{row.curve_mb_s:>8.0f}"
            f"{row.ratio:>8.2f}   {row.spread[0]:.2f} to {row.spread[1]:.2f}"
        )
