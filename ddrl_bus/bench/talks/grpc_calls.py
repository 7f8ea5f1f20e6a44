"""gRPC over a unix socket, bytes without protobuf: a stream to the server, and one there and back.

Once as most write it, in threads, and once on asyncio. Streams, for a call of its own for each message takes longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, Final

from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.talks.talk import Talk, blank, far, trips
from ddrl_bus.launch import loop

_UNLIMITED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def _handlers(take: Any, echo: Any) -> Any:
    import grpc

    methods = {
        "take": grpc.stream_unary_rpc_method_handler(take),
        "echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    return (grpc.method_handlers_generic_handler("bench", methods),)


# ── in threads


class _Calls:
    def __init__(self, channel: Any) -> None:
        self._take, self._echo = channel.stream_unary("/bench/take"), channel.stream_stream("/bench/echo")

    def stream(self, size: int, count: int) -> float:
        began = time.perf_counter()
        self._take(blank(size) for _ in range(count))
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        up = SimpleQueue[bytes | None]()
        down = self._echo(iter(up.get, None))

        def trip() -> None:
            up.put(blank(size))
            next(down)

        found = trips(count, trip)
        up.put(None)
        return found


@contextmanager
def calls(folder: str) -> Iterator[Talk]:
    import grpc

    with far(_far_side, folder), grpc.insecure_channel(f"unix:{folder}/grpc", _UNLIMITED) as channel:
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        yield _Calls(channel)


def _far_side(_pipe: Connection, folder: str) -> None:
    import grpc

    def take(messages: Iterator[bytes], _context: object) -> bytes:
        for _ in messages:
            pass
        return b""

    server = grpc.server(ThreadPoolExecutor(2), options=_UNLIMITED)
    server.add_generic_rpc_handlers(_handlers(take, lambda messages, _context: messages))
    server.add_insecure_port(f"unix:{folder}/grpc")
    server.start()
    server.wait_for_termination()


# ── on asyncio


class _AioCalls:
    def __init__(self, runner: asyncio.Runner, channel: Any) -> None:
        self._runner = runner
        self._take, self._echo = channel.stream_unary("/bench/take"), channel.stream_stream("/bench/echo")

    def stream(self, size: int, count: int) -> float:
        return self._runner.run(self._stream(size, count))

    async def _stream(self, size: int, count: int) -> float:
        began = time.perf_counter()
        call = self._take()
        for _ in range(count):
            await call.write(blank(size))
        await call.done_writing()
        await call
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        return self._runner.run(self._trips(size, count))

    async def _trips(self, size: int, count: int) -> list[float]:
        found, call = [], self._echo()
        for _ in range(count):
            began = time.perf_counter()
            await call.write(blank(size))
            await call.read()
            found.append(time.perf_counter() - began)
        await call.done_writing()
        return found


@contextmanager
def aio_calls(folder: str) -> Iterator[Talk]:
    from grpc import aio

    async def opened() -> Any:
        channel = aio.insecure_channel(f"unix:{folder}/grpc", _UNLIMITED)
        await asyncio.wait_for(channel.channel_ready(), TIMEOUT_S)
        return channel

    with far(_aio_far_side, folder), loop.runner() as runner:
        channel = runner.run(opened())
        try:
            yield _AioCalls(runner, channel)
        finally:
            runner.run(channel.close())


def _aio_far_side(_pipe: Connection, folder: str) -> None:
    loop.run(_serve(folder))


async def _serve(folder: str) -> None:
    from grpc import aio

    async def take(messages: AsyncIterator[bytes], _context: object) -> bytes:
        async for _ in messages:
            pass
        return b""

    async def echo(messages: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message

    server = aio.server(options=_UNLIMITED)
    server.add_generic_rpc_handlers(_handlers(take, echo))
    server.add_insecure_port(f"unix:{folder}/grpc")
    await server.start()
    await server.wait_for_termination()
