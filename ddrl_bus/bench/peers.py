"""The same bytes through what a user might take instead: `ddrl bench peers`.

Each of them is measured in turn with our links in one run, between two processes of this machine. What is not installed
(`pip install 'ddrl-bus[peers]'` brings gRPC, Ray and Redis' client; its server is a package of the system) is said
to be so.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from statistics import median
from typing import Final, Literal

from ddrl_bus.bench.crew import Member, crew
from ddrl_bus.bench.report import GAIN, MB_PER_S, US, About, Figure, Repeat, Row, row, settled
from ddrl_bus.bench.talks import bare, gloo, grpc_calls, ours, processes, ray_actor, redis_lists
from ddrl_bus.bench.talks.talk import WINDOW, Opener


@dataclass(frozen=True)
class Peer:
    name: str
    talk: Opener
    module: str = "zmq"
    program: str = ""

    @property
    def missing(self) -> str:
        """What must be installed first."""
        if importlib.util.find_spec(self.module) is None:
            return f"the module {self.module}"
        return self.program if self.program and shutil.which(self.program) is None else ""


OURS: Final = Peer("ddrl_bus", ours.links)
PEERS: Final = (
    Peer("bare pyzmq", bare.sockets),
    Peer("gRPC", grpc_calls.calls, "grpc"),
    Peer("gRPC asyncio", grpc_calls.aio_calls, "grpc"),
    Peer("Ray actor", ray_actor.calls, "ray"),
    Peer("multiprocessing queue", processes.queues),
    Peer("multiprocessing pipe", processes.pipe),
    Peer("torch.distributed send/recv", gloo.group, "torch"),
    Peer("redis lists", redis_lists.lists, "redis", redis_lists.SERVER),
)


@dataclass(frozen=True)
class Task:
    """So many messages of so many bytes one way, or there and back one by one."""

    what: Literal["stream", "round trip"]
    size: int
    count: int

    def __str__(self) -> str:
        return f"{self.what} of {_in_words(self.size)}"


def _in_words(size: int) -> str:
    """1 MB is 2²⁰ bytes here."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


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

ddrl_bus: a queue link (with credit, numbers, checks) and a request link, over ipc. Bare pyzmq: a PUSH/PULL pair each
way, over ipc. gRPC: a client's stream, and one both ways, of bytes over a unix socket, without protobuf; with threads,
or on asyncio. Ray: calls of an actor's method. multiprocessing: two queues of bytes, or send_bytes of a pipe.
torch.distributed: send and recv of tensors over gloo. Redis: RPUSH, a call a message, and BLPOP over a unix socket,
nothing on disk.

Under way: WINDOW messages at most with ours, bare pyzmq (on either side, and what the kernel holds besides) and the
multiprocessing queue; the others as they see fit. Ours and bare pyzmq write each message to new memory, as whoever
produces data does; the others are handed the same object again and again. Each is measured in turn with ours, both
open all the while.""".replace("WINDOW", str(WINDOW)),
    reading="Ahead: how many times as long the other takes as ddrl_bus; above 1 ours is faster.",
    baseline="as fast as ddrl_bus",
    libraries=("grpcio", "ray", "torch", "redis", redis_lists.SERVER),
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
        if missing := peer.missing:
            yield from (Row(_SECTION, f"{peer.name}, {task}", note=f"not installed: {missing}") for task in tasks)
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


def _end(pipe: Connection, opener: Opener, folder: str) -> None:
    with opener(folder) as talk:
        pipe.send(None)
        while (order := pipe.recv()) is not None:
            what, size, count = order
            pipe.send(talk.stream(size, count) / count if what == "stream" else median(talk.trips(size, count)))
