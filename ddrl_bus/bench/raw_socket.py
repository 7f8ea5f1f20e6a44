"""A bare socket of pyzmq in an event loop, driven as ours are: called back when its descriptor says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq


class RawSocket:
    """Bind or connect its `socket`."""

    def __init__(self, kind: int, on_message: Callable[[list[zmq.Frame]], None]) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._receives = kind != zmq.PUSH
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._fd = int(self.socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)

    def send(self, *parts: bytes | memoryview) -> None:
        self.socket.send_multipart(parts, zmq.NOBLOCK)
        self._loop.call_soon(self._drain)  # a send can swallow the descriptor's edge

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self.socket.close(linger=0)

    def _drain(self) -> None:
        if not self._receives:
            self.socket.getsockopt(zmq.EVENTS)  # else the descriptor stays readable
            return
        while not self.socket.closed:
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._on_message(parts)
