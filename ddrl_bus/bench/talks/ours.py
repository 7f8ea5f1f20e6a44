"""Our queue link, and our request link, over ipc."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import numpy as np

from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.talks.talk import WINDOW, Talk, far
from ddrl_bus.launch import loop
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Request
from ddrl_bus.transport.wire import Layout


class _Links:
    def __init__(self, runner: asyncio.Runner, bus: Bus, folder: str) -> None:
        self._runner = runner
        self._sender = bus.sender("stream", {"learner-0": f"ipc://{folder}/queue"}, codec="none")
        self._client = bus.client("echo", f"ipc://{folder}/request")

    def stream(self, size: int, count: int) -> float:
        return self._runner.run(self._stream(Layout("bench", {"x": ("uint8", (size,))}), count))

    async def _stream(self, layout: Layout, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            await self._sender.send(layout.arena(), {})
        if not await self._sender.flush(TIMEOUT_S):
            raise TimeoutError("not all has arrived")
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        return self._runner.run(self._trips(size, count))

    async def _trips(self, size: int, count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            await self._client.request("echo", {}, {"x": np.empty(size, np.uint8)}, timeout_s=TIMEOUT_S)
            found.append(time.perf_counter() - began)
        return found


@contextmanager
def links(folder: str) -> Iterator[Talk]:
    async def opened() -> tuple[Bus, _Links]:
        bus = Bus("actor-0", 1, Ledger())
        return bus, _Links(runner, bus, folder)

    async def closed() -> None:
        bus.close()

    with far(_far_side, folder), loop.runner() as runner:
        bus, talk = runner.run(opened())
        try:
            yield talk
        finally:
            runner.run(closed())


def _far_side(_pipe: Connection, folder: str) -> None:
    loop.run(_swallow_and_echo(folder))


async def _swallow_and_echo(folder: str) -> None:
    bus = Bus("learner-0", 1, Ledger())
    receiver = bus.receiver("stream", [f"ipc://{folder}/queue"], WINDOW)
    server = bus.server("echo", [f"ipc://{folder}/request"])

    def echo(request: Request) -> None:
        request.answer("echo", {}, request.message.arrays)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve(echo))
        while True:
            await receiver.recv()
