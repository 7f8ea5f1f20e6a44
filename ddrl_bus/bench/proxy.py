"""A TCP proxy that makes a network bad in ways that this machine's own cannot be made: late, narrow, mute, cut."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final

from ddrl_bus.transport.sessions.rate import TokenBucket

Address = tuple[str, int]
CHUNK: Final = 16 << 10
HELD: Final = 64
"""Chunks that are under way in one direction of a connection: whoever sends more waits, as with a router's queue."""
BUFFER: Final = 128 << 10
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


class Proxy:
    """All connections through it share one fate. Attributes may be set at any time.

    `delay_s` is one way; `rate` is bytes a second each way, over all connections; a `mute` proxy keeps every
    connection, takes new ones, and forwards nothing.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._buckets = [TokenBucket(None, 0.0), TokenBucket(None, 0.0)]  # there, and back
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    def narrow(self, rate: float | None) -> None:
        """So many bytes a second from now on; None is as fast as it goes."""
        self._buckets = [TokenBucket(rate, self._loop.time()) for _ in self._buckets]

    def mute(self, muted: bool) -> None:
        (self._speaks.clear if muted else self._speaks.set)()

    def cut(self) -> None:
        """Reset every connection."""
        for writer in list(self._writers):
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()

    async def carry(self, target: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side closes it."""
        try:
            far_reader, far_writer = await asyncio.open_connection(*target)
        except OSError:
            writer.close()
            return
        both = {writer, far_writer}
        self._writers |= both
        for each in both:
            _bound(each.get_extra_info("socket"))
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(reader, far_writer, 0))
                pumps.create_task(self._pump(far_reader, writer, 1))
        except* (OSError, _Ended):
            pass
        finally:
            self._writers -= both
            for each in both:
                each.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(HELD)
        async with asyncio.TaskGroup() as halves:
            halves.create_task(self._write(under_way, writer, way))
            while True:
                chunk = await reader.read(CHUNK)
                await under_way.put((self._loop.time() + self.delay_s, chunk))
                if not chunk:
                    return

    async def _write(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: int
    ) -> None:
        while True:
            due, chunk = await under_way.get()
            await asyncio.sleep(due - self._loop.time())
            await asyncio.sleep(self._buckets[way].wait_s(self._loop.time()))
            await self._speaks.wait()
            if not chunk:
                raise _Ended
            self._buckets[way].spend(len(chunk), self._loop.time())
            writer.write(chunk)
            await writer.drain()


class _Ended(Exception):
    """One side closed the connection."""


def _bound(sock: socket.socket) -> None:
    """Keep the kernel from holding megabytes of what a narrow line has not carried yet."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)


@asynccontextmanager
async def proxy(routes: Mapping[Address, Address]) -> AsyncIterator[Proxy]:
    """A proxy that listens at each key of `routes` and dials its value."""
    through = Proxy()

    async def serve(target: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        through._tasks.add(task)
        with suppress(asyncio.CancelledError):  # at the end; asyncio's streams would report it
            await through.carry(target, reader, writer)
        through._tasks.discard(task)

    servers = []
    try:
        for (host, port), target in routes.items():
            serving = partial(serve, target)
            servers.append(await asyncio.start_server(serving, host, port))
        yield through
    finally:
        for server in servers:
            server.close()
        for task in list(through._tasks):
            task.cancel()
        await asyncio.gather(*through._tasks, return_exceptions=True)
