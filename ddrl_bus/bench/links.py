"""What the link ends cost over the sockets under them: `ddrl bench links`.

Every payload that nodes exchange, over every transport, between one process and several: through our links and through
bare blocking sockets of pyzmq, repeat by repeat in turn, both connected all the while. Quote the ratios; absolute
figures follow the machine's mood.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple, cast, get_args

import numpy as np
import zmq

from ddrl_bus import keys
from ddrl_bus.bench import link_ends, raw_ends
from ddrl_bus.bench.crew import End, Member, crew
from ddrl_bus.bench.ends import PAYLOADS, SHARED, Answer, Order, Payload, Setup, Transport
from ddrl_bus.bench.report import MB_PER_S, US, About, Kind, Repeat, Row, row, settled
from ddrl_bus.errors import UsageError
from ddrl_bus.transport import shared

TRANSPORTS: Final[tuple[Transport, ...]] = get_args(Transport)
PEERS: Final = (1, 4, 16)


class Ends(NamedTuple):
    """What processes are started with."""

    one: End
    """With None it is the hub, with an index that spoke."""
    all: End
    """Of a cell over memory."""


OURS: Final = Ends(link_ends.one_end, link_ends.all_ends)
RAW: Final = Ends(raw_ends.one_end, raw_ends.all_ends)


@dataclass(frozen=True)
class Cell:
    payload: Payload
    transport: Transport
    peers: int

    def __str__(self) -> str:
        return f"{self.payload.name}, {self.transport}, {self.peers} peer{'s' * (self.peers > 1)}"


@dataclass(frozen=True)
class Scope:
    """What is measured, and for how long."""

    payloads: Sequence[str] = tuple(PAYLOADS)
    transports: Sequence[Transport] = TRANSPORTS
    peers: Sequence[int] = PEERS
    repeats: int = 5
    seconds: float = 1.0
    """Of each repeat at a fixed rate."""
    part: float = 1.0
    """Of the messages that are sent as fast as may be."""
    rates: int = 2
    """At most so many of a payload's."""

    def cells(self) -> list[Cell]:
        payloads = [
            replace(payload, flood=max(10, int(payload.flood * self.part)), rates=payload.rates[: self.rates])
            for payload in map(PAYLOADS.__getitem__, self.payloads)
        ]
        return [
            Cell(payload, transport, peers)
            for payload in payloads
            for transport in self.transports
            for peers in self.peers
            if transport != SHARED or (payload.link == "latest" and shared.SHARES)
        ]


QUICK: Final = Scope(
    ("small unroll, 320 B", "pixel unroll, 567 KB", "weights, 6.7 MB", "request, 64 B"),
    ("ipc", SHARED, "tcp"),
    (1,),
    repeats=3,
    seconds=0.4,
    part=0.3,
    rates=1,
)


def scope_of(
    quick: bool = False,
    payloads: Sequence[str] = (),
    transports: Sequence[str] = (),
    peers: Sequence[int] | None = None,
    repeats: int | None = None,
) -> Scope:
    """What a user asked for.

    Args:
        payloads: words of payloads' names.
    Raises:
        UsageError: there is no such payload or transport.
    """
    scope = QUICK if quick else Scope()
    if unknown := [name for name in transports if name not in TRANSPORTS]:
        raise UsageError(f"--transport {unknown[0]!r}: expected one of {', '.join(TRANSPORTS)}")
    named = [name for name in PAYLOADS if any(words in name for words in payloads)]
    if missing := [words for words in payloads if not any(words in name for name in PAYLOADS)]:
        raise UsageError(f"--payload {missing[0]!r}: expected words of one of: {'; '.join(PAYLOADS)}")
    chosen = cast("tuple[Transport, ...]", transports)
    scope = replace(
        scope,
        payloads=named or scope.payloads,
        transports=chosen or scope.transports,
        peers=peers or scope.peers,
        repeats=repeats or scope.repeats,
    )
    if not scope.cells():
        raise UsageError(f"--transport {SHARED}: only weights are shared, and only on x86; nothing is left to measure")
    return scope


PERCENTILES: Final = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
ABOUT: Final = About(
    bench="links",
    title="What moving experience, weights and questions costs over bare ZeroMQ sockets",
    method="""The processes of a distributed training run exchange three kinds of message: unrolls of experience,
from many actors to one learner (queue); weights, from one learner to many actors (latest); and questions with
answers (request). Each is measured twice in turn: through the links of ddrl_bus, which number messages, hand out
credit, check what arrives and keep books, and through bare blocking sockets of pyzmq (PUSH/PULL, PUB/SUB,
DEALER/ROUTER), which move as many opaque bytes and promise nothing. A peer is a process. Nothing is compressed.
Repeats alternate between the two ways, whose processes stay connected; each phase has its warm-up.

Transports: over memory all ends share one event loop, and one thread takes turns on the bare side; ipc is a unix
socket; tcp is the loopback device; tcp+CURVE encrypts, ours with keys that are checked at each message. On ipc+shared
weights lie in memory that all processes of the host read, which is what links over ipc do with values of 64 KiB and
more, and bare sockets send them as on ipc; rows of weights on ipc are of values that are sent.

As fast as may be: microseconds a message as its receiver sees it. A sender has at most 64 small unrolls or 16 of
pixels unread at the receiver, by our credit or the bare sockets' high-water marks (which leave out what the kernel
holds). Of weights it is the time until all peers have said that they hold a version, copied to memory of their own;
of requests the time of all trips over their number, each peer asking one question at a time. CPU is processor time of
all processes together, their I/O threads included, a message (of weights: a version), as the kernel accounts it.

At a fixed rate: when a message is sent was set in advance, and its latency counts from that moment, not from when a
sender that was held up came to send it (there is no coordinated omission). Until the receiver has it; of requests
until the answer is there. The rate is that of all peers together. With fewer than 1,000 messages in a repeat, p99.9
is the slowest of them.

How often each byte is copied on the way, `ddrl bench copies` counts; the time that takes is in CPU.""",
    reading="""Ratios are our links over bare sockets, taken within each repeat. Large messages should cost what
ZeroMQ costs; for small ones the difference in microseconds says more than the ratio, for an unroll stands for
hundreds of steps.""",
    baseline="bare pyzmq",
    spans={way: tuple(f"{way} {name}" for name in PERCENTILES) for way in ("link", "raw")},
)
FLOOD: Final = {"link": US, "raw": US, "link rate": MB_PER_S, "link CPU": US, "raw CPU": US}

FLOOD_RATIOS: Final = {"ratio": ("link", "raw"), "CPU ratio": ("link CPU", "raw CPU")}


def measure(scope: Scope) -> Iterator[Row]:
    """A row for each cell as fast as may be, then one for each of its rates."""
    cells = scope.cells()
    processes = 2 * (1 + max(cell.peers for cell in cells))
    with fresh_keys(), crew(processes) as members:
        ours, raw = members[: processes // 2], members[processes // 2 :]
        for cell in cells:
            with together(cell, {"link": (OURS, ours), "raw": (RAW, raw)}) as ways:
                yield flood_row(cell, ways, scope.repeats, FLOOD, FLOOD_RATIOS)
        for cell in cells:
            with together(cell, {"link": (OURS, ours), "raw": (RAW, raw)}) as ways:
                for rate in cell.payload.rates:
                    yield paced_row(cell, ways, rate, scope)


def flood_row(
    cell: Cell,
    ways: Mapping[str, Group],
    repeats: int,
    kinds: Mapping[str, Kind],
    ratios: Mapping[str, tuple[str, str]],
) -> Row:
    """As fast as may be, each way in turn."""

    def once() -> Repeat:
        return {name: value for way, group in ways.items() for name, value in group.flood(way).items()}

    return settled(
        once, partial(row, f"{cell.payload.link}: as fast as may be", str(cell), kinds=kinds, ratios=ratios), repeats
    )


def paced_row(cell: Cell, ways: Mapping[str, Group], rate: int, scope: Scope) -> Row:
    def once() -> Repeat:
        return {
            name: value for way, group in ways.items() for name, value in group.paced(way, rate, scope.seconds).items()
        }

    kinds = {f"{way} {name}": US for way in ways for name in PERCENTILES}
    ratios = {"ratio": ("link p50", "raw p50"), "p99 ratio": ("link p99", "raw p99")}
    section = f"{cell.payload.link}: latency at a fixed rate"
    return settled(once, partial(row, section, f"{cell}, {rate:,}/s", kinds=kinds, ratios=ratios), scope.repeats)


# ── processes


class Group:
    """The ends of one cell, one way."""

    def __init__(self, ends: Ends, members: Sequence[Member], setup: Setup) -> None:
        self._ends, self._setup = ends, setup
        self._members = members[:1] if setup.transport == "memory" else members[: 1 + setup.peers]

    def start(self) -> None:
        if self._setup.transport == "memory":
            self._members[0].start(self._ends.all, self._setup)
        else:
            for index, member in zip((None, *range(self._setup.peers)), self._members, strict=True):
                member.start(self._ends.one, self._setup, index)
        for member in self._members:
            member.answer()

    def end(self) -> None:
        for member in self._members:
            member.end()

    def flood(self, way: str) -> Repeat:
        """Microseconds and CPU a message, megabytes a second."""
        payload, peers, order = self._setup.payload, self._setup.peers, self.flood_order
        together = 1 if payload.link == "latest" else peers
        cpu = self._cpu_s()
        answers = self._carry_out([order] * (1 + peers))
        cpu = self._cpu_s() - cpu
        seconds = max(answer.seconds for answer in answers)
        return {
            way: seconds / (order.messages * together) * 1e6,
            f"{way} rate": payload.nbytes * order.messages * peers / seconds / 1e6,
            f"{way} CPU": cpu / (order.total * together) * 1e6,
        }

    @property
    def flood_order(self) -> Order:
        """What each end is told to move as fast as may be."""
        payload, peers = self._setup.payload, self._setup.peers
        messages = max(1, payload.flood // (1 if payload.link == "latest" else peers))
        return Order(messages, max(3, messages // 10))

    def paced(self, way: str, rate: float, seconds: float) -> Repeat:
        """Percentiles of the latency from the moment that each message was due, in microseconds."""
        peers = self._setup.peers
        each = rate if self._setup.payload.link == "latest" else rate / peers
        order = Order(max(1, round(each * seconds)), rate=each)
        answers = self._carry_out([order, *(replace(order, phase=index / peers) for index in range(peers))])
        latencies = np.concatenate([np.asarray(answer.latencies, float) for answer in answers])
        found = np.percentile(latencies, list(PERCENTILES.values())) * 1e6
        return {f"{way} {name}": value for name, value in zip(PERCENTILES, found.tolist(), strict=True)}

    def _carry_out(self, orders: Sequence[Order]) -> list[Answer]:
        """The hub's answer, then the spokes'."""
        if self._setup.transport == "memory":
            self._members[0].tell(tuple(orders))
            answers: list[Answer] = self._members[0].answer()
            return answers
        for member, order in zip(self._members, orders, strict=True):
            member.tell(order)
        return [member.answer() for member in self._members]

    def _cpu_s(self) -> float:
        return sum(member.cpu_s for member in self._members)


@contextmanager
def together(
    cell: Cell, ways: Mapping[str, tuple[Ends, Sequence[Member]]], transports: Mapping[str, Transport] | None = None
) -> Iterator[dict[str, Group]]:
    """A cell's ends, for each way its own; over the cell's transport if no other is named."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        groups = {}
        for way, (ends, members) in ways.items():
            at = replace(cell, transport=(transports or {}).get(way, cell.transport))
            groups[way] = Group(ends, members, _setup(at, f"{folder}/{way}"))
            groups[way].start()
        yield groups
        for group in groups.values():
            group.end()


def _setup(cell: Cell, path: str) -> Setup:
    near = {"memory": "memory://bench", "ipc": f"ipc://{path}", SHARED: f"ipc://{path}"}
    address = near.get(cell.transport) or free_address()
    return Setup(cell.payload, cell.transport, cell.peers, address, f"ipc://{path}.acks", zmq.curve_keypair())


def free_address() -> str:
    """Of a link over tcp, which takes two ports in a row."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return f"tcp://127.0.0.1:{port}"


@contextmanager
def fresh_keys(hosts: Sequence[str] = (link_ends.HUB_HOST.host, link_ends.SPOKE_HOST.host)) -> Iterator[None]:
    """Keys of these hosts, where the processes that are started meanwhile find them."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder, patched({keys.ENVIRONMENT: folder}):
        for host in hosts:
            keys.new(host)
        yield


@contextmanager
def patched(variables: Mapping[str, str]) -> Iterator[None]:
    """An environment in which these are set meanwhile."""
    before = {name: os.environ.pop(name, None) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
