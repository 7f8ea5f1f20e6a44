"""The same bytes through what a user might take instead: `ddrl bench peers`.

Each of them is measured in turn with our links in one run, between two processes of this machine. What is not installed
(`pip install 'ddrl-bus[peers]'` brings gRPC and Ray) is said to be so.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Final, Literal

from ddrl_bus.bench import talks
from ddrl_bus.bench.crew import Member, crew
from ddrl_bus.bench.report import GAIN, MB_PER_S, US, About, Figure, Repeat, Row, row, settled


@dataclass(frozen=True)
class Peer:
    name: str
    talk: talks.Opener
    needs: str = "zmq"
    """The module that must be installed."""


OURS: Final = Peer("ddrl_bus", talks.ours)
PEERS: Final = (
    Peer("bare pyzmq", talks.bare),
    Peer("gRPC stream", talks.grpc_stream, "grpc"),
    Peer("Ray actor", talks.ray_actor, "ray"),
    Peer("multiprocessing queue", talks.queues),
    Peer("torch.distributed send/recv", talks.gloo, "torch"),
)


@dataclass(frozen=True)
class Task:
    """So many messages of so many bytes one way, or there and back one by one."""

    what: Literal["stream", "round trip"]
    size: int
    count: int

    def __str__(self) -> str:
        return f"{self.what} of {talks.in_words(self.size)}"


TASKS: Final = (
    *(Task("stream", size, count) for size, count in ((16 << 10, 2000), (1 << 20, 100), (8 << 20, 15))),
    *(Task("round trip", size, 300) for size in (64, 64 << 10)),
)
ABOUT: Final = About(
    bench="peers",
    title="The same bytes through what could be used instead",
    method="""Two processes of this machine. A stream: opaque messages one after the other, over the time from the
first send until the last one is known to have arrived. A round trip: a message there and as many bytes back, one at a
time; the median.

ddrl_bus: a queue link (with credit, numbers, checks) and a request link, over ipc. Bare pyzmq: PUSH/PULL and
DEALER/ROUTER. gRPC: one stream of bytes over a unix socket, without protobuf. Ray: calls of an actor's method. A
multiprocessing queue of bytes. torch.distributed: send and recv of tensors over gloo. Ours writes each message to new
memory, as whoever produces data does; the others, bare pyzmq apart, are handed the same object again and again. Each is
measured in turn with ours, both open all the while.""",
    reading="Ahead: how many times as long the other takes as ddrl_bus; above 1 ours is faster.",
    baseline="as fast as ddrl_bus",
)
_SECTION: Final = "microseconds a message, or there and back"
_KINDS: Final = {"peer": US, "ours": US, "peer rate": MB_PER_S, "ours rate": MB_PER_S}


def measure(
    peers: Sequence[Peer] = PEERS, tasks: Sequence[Task] = TASKS, repeats: int = 5, part: float = 1.0
) -> Iterator[Row]:
    """A row for each task and peer; a peer that is not installed has one without figures.

    Args:
        part: of each task's messages.
    """
    for peer in peers:
        if importlib.util.find_spec(peer.needs) is None:
            yield from (Row(_SECTION, f"{peer.name}, {task}", note="not installed") for task in tasks)
            continue
        with crew(2) as members, _talking(OURS, members[0]), _talking(peer, members[1]):
            for task in tasks:
                count = max(5, int(task.count * part))
                for member in members:
                    _seconds(member, task, max(2, count // 10))  # warm-up
                once = partial(_once, members, task, count)
                yield settled(once, partial(_row, task, peer), repeats)


def _row(task: Task, peer: Peer, repeats: Sequence[Repeat]) -> Row:
    made = row(_SECTION, f"{peer.name}, {task}", repeats, _KINDS)
    ahead = Figure(GAIN, tuple(each["peer"] / each["ours"] for each in repeats))
    return Row(made.section, made.name, {**made.figures, "ahead": ahead}, "ahead")


def _once(members: Sequence[Member], task: Task, count: int) -> Repeat:
    ours, peer = (_seconds(member, task, count) for member in members)
    rates = {"ours rate": task.size / ours / 1e6, "peer rate": task.size / peer / 1e6}
    return {"ours": ours * 1e6, "peer": peer * 1e6, **rates}


def _seconds(member: Member, task: Task, count: int) -> float:
    """A message, or the median round trip."""
    member.tell((task.what, task.size, count))
    seconds: float = member.answer()
    return seconds


@contextmanager
def _talking(peer: Peer, member: Member) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        member.start(_end, peer.talk, folder)
        member.answer()
        yield
        member.end()


def _end(pipe: Connection, opener: talks.Opener, folder: str) -> None:
    with opener(folder) as talk:
        pipe.send(None)
        while (order := pipe.recv()) is not None:
            what, size, count = order
            pipe.send(talk.stream(size, count) / count if what == "stream" else median(talk.trips(size, count)))
