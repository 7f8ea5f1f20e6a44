"""A small network of link ends in one event loop, over any scheme: lives that open, die and return, and their books."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from ports import free_ports

from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Balance, Ledger, audit
from ddrl_bus.transport.links import Check, Client, Publisher, Receiver, Sender, Server, Subscriber, life
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.security import Guard
from ddrl_bus.transport.sessions.queue import OnLoss
from ddrl_bus.transport.wire import Arena, Codec, Layout, Message

SMALL = Layout("unroll", {"v": ("int64", (4,))})
LARGE = Layout("unroll", {"v": ("int64", (20_000,))})  # 160 KB: leaves the sender without a copy
WAIT_S = 30.0
"""Nothing here takes that long; whatever does has hung."""


def numbered(number: int, layout: Layout = SMALL) -> Arena:
    arena = layout.arena()
    arena.arrays["v"][...] = number
    return arena


def number_of(message: Message) -> int:
    """The number that fills it, after a look at every element."""
    values = message.arrays["v"]
    assert not values.flags.writeable
    assert np.all(values == message.fields["i"])
    return int(values[0])


async def send(sender: Sender, numbers: range, layout: Layout = SMALL) -> None:
    for number in numbers:
        await sender.send(numbered(number, layout), {"i": number})


def fill(sender: Sender, layout: Layout = SMALL, start: int = 0) -> int:
    """Send until there is no credit; returns how many went out."""
    for number in count(start):
        if not sender.try_send(numbered(number, layout), {"i": number}):
            return number - start
    raise AssertionError


async def take(receiver: Receiver, n: int) -> list[int]:
    async with asyncio.timeout(WAIT_S):
        return [number_of(await receiver.recv()) for _ in range(n)]


async def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110  - what it waits for has no event
            await asyncio.sleep(0.002)


async def turns(n: int) -> None:
    """Let everything that is ready run."""
    for _ in range(n):
        await asyncio.sleep(0)


class Net:
    """Opens ends by node name and life; collects ledgers, tasks and whatever reached the loop's exception handler."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.random = random.Random(20_260_521)
        self.unhandled: list[dict[str, Any]] = []
        self.ledgers: dict[str, Ledger] = {}
        self._hub = MemoryHub()
        self._buses: dict[str, Bus] = {}
        self._addresses: dict[str, str] = {}
        self._tasks: list[asyncio.Task[Any]] = []
        self.folder = Path(tempfile.mkdtemp(prefix="ddrl"))
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.unhandled.append(context))

    def address(self, name: str) -> str:
        if name not in self._addresses:
            where = {"memory": name, "ipc": f"{self.folder}/{name}", "tcp": f"127.0.0.1:{free_ports()}"}[self.scheme]
            self._addresses[name] = f"{self.scheme}://{where}"
        return self._addresses[name]

    def bus(self, node: str, epoch: int = 1) -> Bus:
        name = life(node, epoch)
        if name not in self._buses:
            self.ledgers[name] = Ledger()
            guard = self.guard(node, self.ledgers[name])
            self._buses[name] = Bus(node, epoch, self.ledgers[name], self._hub, guard)
        return self._buses[name]

    def guard(self, node: str, ledger: Ledger) -> Guard | None:
        """Nobody's: everybody may come."""
        return None

    def receiver(
        self,
        node: str = "learner",
        epoch: int = 1,
        *,
        window: int,
        on_loss: OnLoss = "count",
        check: Check | None = None,
    ) -> Receiver:
        return self.bus(node, epoch).receiver("data", [self.address(node)], window, on_loss, check)

    def sender(
        self,
        node: str = "actor",
        epoch: int = 1,
        *,
        to: tuple[str, ...] = ("learner",),
        on_loss: OnLoss = "count",
        codec: Codec = "auto",
        rate: float | None = None,
    ) -> Sender:
        return self.bus(node, epoch).sender("data", {name: self.address(name) for name in to}, on_loss, codec, rate)

    def publisher(self, epoch: int = 1, codec: Codec = "auto", rate: float | None = None) -> Publisher:
        return self.bus("publisher", epoch).publisher("weights", [self.address("publisher")], codec, rate)

    def subscriber(self, node: str = "subscriber", epoch: int = 1) -> Subscriber:
        return self.bus(node, epoch).subscriber("weights", self.address("publisher"))

    def server(self, epoch: int = 1) -> Server:
        return self.bus("server", epoch).server("ask", [self.address("server")])

    def client(self, node: str = "client", epoch: int = 1) -> Client:
        return self.bus(node, epoch).client("ask", self.address("server"))

    def count(self, node: str, *path: str, epoch: int = 1) -> int:
        return self.ledgers[life(node, epoch)].snapshot().get("/".join(path), 0)

    def accepted(self, node: str, link: str, epoch: int = 1) -> int:
        """Messages that the node accepted on `link`, over all lanes."""
        return sum(n for name, n in self.counts(node, f"{link}/", epoch).items() if name.endswith("/accepted"))

    def counts(self, node: str, prefix: str, epoch: int = 1) -> Mapping[str, int]:
        """The counters under `prefix`, without it."""
        books = self.ledgers[life(node, epoch)].snapshot()
        return {name.removeprefix(prefix): n for name, n in books.items() if name.startswith(prefix) and n}

    def balance(self) -> Balance:
        """The books of the queue link `data`, with all lives that were not killed alive."""
        return audit([ledger.snapshot() for ledger in self.ledgers.values()], frozenset(self._buses))["data"]

    async def settled(self, *senders: Sender) -> Balance:
        """The books once every message of `senders` is acknowledged; they must close."""
        for sender in senders:
            assert await sender.flush(WAIT_S)
        balance = self.balance()
        assert balance.closed, balance
        return balance

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        self._tasks.append(task := asyncio.get_running_loop().create_task(work))
        return task

    def kill(self, node: str, epoch: int = 1) -> None:
        """End one life: its sockets go, its books stay."""
        self._buses.pop(life(node, epoch)).close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for bus in reversed(self._buses.values()):
            bus.close()
        await turns(3)
        shutil.rmtree(self.folder)
