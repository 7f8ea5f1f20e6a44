"""Blocking sockets of pyzmq over ipc: a PUSH/PULL pair each way, every message in new memory."""

from __future__ import annotations

from contextlib import AbstractContextManager

import zmq

from ddrl_bus.bench.raw_ends import frame_of, put
from ddrl_bus.bench.talks.talk import WINDOW, Talk, turns


class _Sockets:
    def __init__(self, out: str, into: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._push, self._pull = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket in (self._push, self._pull):
            socket.set_hwm(WINDOW)
        self._push.connect(out)
        self._pull.bind(into)

    def send(self, size: int) -> None:
        put(self._push, frame_of(size, 0))

    def recv(self, _size: int) -> None:
        self._pull.recv(copy=False)

    def close(self) -> None:
        self._context.destroy(linger=0)


def sockets(folder: str) -> AbstractContextManager[Talk]:
    there, back = f"ipc://{folder}/there", f"ipc://{folder}/back"
    return turns(_Sockets, (there, back), (back, there))
