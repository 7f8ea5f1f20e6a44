"""What multiprocessing brings: a pair of queues, and a pipe."""

from __future__ import annotations

import multiprocessing
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from multiprocessing.queues import Queue

from ddrl_bus.bench.talks.talk import WINDOW, Talk, blank, turns


class _Queues:
    def __init__(self, out: Queue[bytes], into: Queue[bytes]) -> None:
        self._out, self._into = out, into

    def send(self, size: int) -> None:
        self._out.put(blank(size))

    def recv(self, _size: int) -> None:
        self._into.get()

    def close(self) -> None:
        self._out.cancel_join_thread()


def queues(_folder: str) -> AbstractContextManager[Talk]:
    spawn = multiprocessing.get_context("spawn")
    there, back = spawn.Queue(WINDOW), spawn.Queue(WINDOW)
    return turns(_Queues, (there, back), (back, there))


class _Pipe:
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self.close = pipe.close

    def send(self, size: int) -> None:
        self._pipe.send_bytes(blank(size))

    def recv(self, _size: int) -> None:
        self._pipe.recv_bytes()


def pipe(_folder: str) -> AbstractContextManager[Talk]:
    here, there = multiprocessing.get_context("spawn").Pipe()
    return turns(_Pipe, (here,), (there,))
