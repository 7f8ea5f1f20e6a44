"""Large messages over lines that carry little, with the heartbeats that every node has: a proxy between two ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic

import numpy as np
import pytest
from harness import Net, number_of, numbered
from ports import free_ports

from ddrl_bus.bench.proxy import proxy
from ddrl_bus.transport.sessions.latest import CHUNK
from ddrl_bus.transport.sessions.rate import BURST_S
from ddrl_bus.transport.wire import Layout

SLOW_S = 40.0
"""Against hangs only."""
WEIGHTS = Layout("weights", {"w": ("int64", (4 << 17,))})  # 4 MiB
UNROLL = Layout("unroll", {"v": ("int64", (64 << 10,))})  # 512 KiB


@pytest.fixture
def scheme() -> str:
    return "tcp"


@asynccontextmanager
async def narrow(address: str, rate: float) -> AsyncIterator[str]:
    """An address from which so many bytes a second come and go."""
    port, far = int(address.rpartition(":")[2]), free_ports()
    async with proxy({("127.0.0.1", far + n): ("127.0.0.1", port + n) for n in (0, 1)}) as line:
        line.narrow(rate)
        yield f"tcp://127.0.0.1:{far}"


async def the_newest_weights(net: Net) -> None:
    """Four seconds for each version: whatever comes is whole, and newer than what came before."""
    publisher, held = net.publisher(), [0]
    async with narrow(net.address("publisher"), 1 << 20) as address:
        subscriber = net.bus("subscriber").subscriber("weights", address)
        for version in (1, 2):
            arena = WEIGHTS.arena()
            arena.arrays["w"][...] = version
            publisher.publish(version, arena, {})
            await asyncio.sleep(1)  # a quarter of it
        while held[-1] < 2:
            message = await subscriber.next()
            assert np.all(message.arrays["w"] == message.seq)
            assert message.seq > held[-1]
            held.append(message.seq)


async def a_long_message(net: Net) -> None:
    """Over six seconds for one frame, which is longer than a host that is gone is waited for."""
    receiver = net.receiver(window=1)
    async with narrow(net.address("learner"), 80 << 10) as address:
        sender = net.bus("actor").sender("data", {"learner": address})
        await sender.send(numbered(7, UNROLL), {"i": 7})
        assert number_of(await receiver.recv()) == 7
        await net.settled(sender)


async def test_what_is_large_comes_over_narrow_lines(net: Net) -> None:
    async with asyncio.timeout(SLOW_S), asyncio.TaskGroup() as both:
        both.create_task(the_newest_weights(net))
        both.create_task(a_long_message(net))


async def test_a_rate_bounds_what_is_fetched(net: Net) -> None:
    """A second for a value of 16 chunks, to two who share the rate."""
    rate, began = 8 << 20, monotonic()
    publisher = net.publisher(rate=rate)
    publisher.publish(1, arena := WEIGHTS.arena(), {})
    subscribers = [net.subscriber(f"actor-{n}") for n in range(2)]
    messages = await asyncio.wait_for(asyncio.gather(*(each.next() for each in subscribers)), SLOW_S)
    assert {message.arrays["w"].nbytes for message in messages} == {arena.arrays["w"].nbytes}
    sent = net.count("publisher", "weights", "bytes_out")
    assert sent >= 2 * WEIGHTS.size
    assert monotonic() - began >= (sent - CHUNK) / rate - BURST_S
    assert net.count("publisher", "weights", "throttled_ns") > 0
