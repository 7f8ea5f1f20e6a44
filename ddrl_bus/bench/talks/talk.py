"""What a talk is, and how one begins: a far side in its own process, and turns over whatever sends and receives."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Final, Protocol

from ddrl_bus.bench.crew import leave_with_parent
from ddrl_bus.launch.malloc import keep_freed_memory

WINDOW: Final = 64
"""Messages under way, where it can be said."""


class Talk(Protocol):
    def stream(self, size: int, count: int) -> float:
        """Seconds from the first send until all are known to have arrived."""

    def trips(self, size: int, count: int) -> list[float]:
        """Seconds of each message there and back."""


Opener = Callable[[str], AbstractContextManager[Talk]]
"""Takes a folder for sockets and files."""


@contextmanager
def far(side: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """The far side in a process of its own, which goes with this one, however that ends; the pipe to it.

    Args:
        side: takes its end of the pipe, then `args`.
    """
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    process = spawn.Process(target=_follow, args=(side, theirs, *args))
    process.start()
    try:
        yield pipe
    finally:
        process.kill()
        process.join()


def _follow(side: Callable[..., None], *args: Any) -> None:
    leave_with_parent()
    keep_freed_memory()
    side(*args)


def trips(count: int, trip: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        trip()
        found.append(time.perf_counter() - began)
    return found


# ── over whatever sends and receives


class Way(Protocol):
    """One end of a way there and back."""

    def send(self, size: int) -> object:
        """A message of so many bytes."""

    def recv(self, size: int) -> object:
        """The next message, which has so many bytes."""

    def close(self) -> object: ...


@contextmanager
def turns(way: Callable[..., Way], near: tuple[Any, ...], there: tuple[Any, ...]) -> Iterator[Talk]:
    """A talk over a way, whose two ends are made of these arguments."""
    with far(_obey, way, there) as pipe, closing(way(*near)) as here:
        yield _Turns(pipe, here)


class _Turns:
    def __init__(self, pipe: Connection, way: Way) -> None:
        self._pipe, self._way = pipe, way

    def stream(self, size: int, count: int) -> float:
        self._pipe.send((size, count, False))
        began = time.perf_counter()
        for _ in range(count):
            self._way.send(size)
        self._pipe.recv()
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        self._pipe.send((size, count, True))

        def trip() -> None:
            self._way.send(size)
            self._way.recv(size)

        found = trips(count, trip)
        self._pipe.recv()
        return found


def _obey(pipe: Connection, way: Callable[..., Way], args: tuple[Any, ...]) -> None:
    """Take what is said to come, and if asked to, send as much back."""
    end = way(*args)
    while True:
        size, count, back = pipe.recv()
        for _ in range(count):
            end.recv(size)
            if back:
                end.send(size)
        pipe.send(None)


@lru_cache(1)
def blank(size: int) -> bytes:
    """The same object again and again."""
    return bytes(size)
