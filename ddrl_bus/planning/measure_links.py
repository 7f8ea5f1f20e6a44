"""What messages and sums between processes cost here, in seconds of one core.

Link ends carry what nodes would send between two processes, whose time counts with that of ZeroMQ's threads. The public
functions run in processes of their own, the same in each at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from ddrl_bus.algos.lazy import torch
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.messages import Weights, fields_of
from ddrl_bus.nodes.collective import Collective, Rendezvous
from ddrl_bus.planning.measure import TRIPS, Payload, nothing, resident
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.wire import Arena, Array

SUMS: Final = 50
LOOPBACK: Final = "127.0.0.1"
PATIENCE_S: Final = 60.0
PAIRS: Final = {
    "trajectories": ("trajectories", None),
    "weights": ("weights", None),
    "weights, many": ("weights", None),
    "act": ("act", "actions"),
    "samples": ("sample", "samples"),
    "gradients": ("gradients", "parameters"),
}
"""Link → payloads there and back."""
SUBSCRIBERS: Final = {"weights": 1, "weights, many": 9}
PAUSE_S: Final = 0.004


def of_links(side: int, folder: Path, payloads: Mapping[str, Payload]) -> dict[str, float]:
    """Of each link of which there are payloads: processor time of a message (a round trip) at this side, 0 that sends
    or asks and 1 that receives or answers. Also the memory of a node without torch, as `resident`."""
    keep_freed_memory()
    return asyncio.run((_sending, _receiving)[side](f"ipc://{folder}", payloads))


def _links(payloads: Mapping[str, Payload]) -> list[tuple[str, Payload, Payload | None]]:
    return [
        (link, payloads[up], payloads[down] if down else None) for link, (up, down) in PAIRS.items() if up in payloads
    ]


async def _sending(folder: str, payloads: Mapping[str, Payload]) -> dict[str, float]:
    bus, thread, loop = Bus("calibration-0", 1, Ledger()), ThreadPoolExecutor(1), asyncio.get_running_loop()
    taken = {}
    for link, up, down in _links(payloads):
        send = _sender(bus, f"{folder}/{link}", link, up, down is not None)
        for trip in range(2 * TRIPS):
            if trip == TRIPS:
                began = time.process_time()
            await loop.run_in_executor(thread, nothing)
            await send()
        taken[link] = (time.process_time() - began) / TRIPS
        if link in SUBSCRIBERS:
            taken[link] = max(0.0, taken[link] - await _paused(loop, thread))
        await asyncio.sleep(0.05)
    bus.close()
    return taken


def _sender(bus: Bus, address: str, link: str, payload: Payload, answered: bool) -> Callable[[], Awaitable[Any]]:
    kind, fields, arrays = payload
    if answered:
        return partial(bus.client(link, address).request, kind, fields, arrays, timeout_s=PATIENCE_S)
    if link in SUBSCRIBERS:
        return partial(_published, bus.publisher(link, [address]), arrays, iter(range(1, 2 * TRIPS + 1)))
    sender = bus.sender(link, {"calibration-1": address})
    return lambda: sender.send(Arena.of(kind, arrays), fields)


async def _paused(loop: asyncio.AbstractEventLoop, thread: ThreadPoolExecutor) -> float:
    """Processor time of a turn that publishes nothing."""
    began = time.process_time()
    for _ in range(TRIPS):
        await loop.run_in_executor(thread, nothing)
        await asyncio.sleep(PAUSE_S)
    return (time.process_time() - began) / TRIPS


async def _published(publisher: Any, arrays: Mapping[str, Array], versions: Iterator[int]) -> None:
    """The next version, and time for it to be heard, for the newest wins."""
    version = next(versions)
    publisher.publish(version, Arena.of(Weights.KIND, arrays), fields_of(Weights(0, version)))
    await asyncio.sleep(PAUSE_S)


async def _receiving(folder: str, payloads: Mapping[str, Payload]) -> dict[str, float]:
    bus, thread, loop = Bus("calibration-1", 1, Ledger()), ThreadPoolExecutor(1), asyncio.get_running_loop()
    taken = {}
    ends = {link: _receiver(bus, folder, link, down) for link, _, down in _links(payloads)}
    for link, receive in ends.items():
        trip, began = 0, time.process_time()
        while trip < 2 * TRIPS:
            message = await receive()
            trip = message.fields["updates"] if link in SUBSCRIBERS else trip + 1  # some may have been passed over
            if link not in SUBSCRIBERS:  # weights are taken when an unroll is over
                await loop.run_in_executor(thread, nothing)
            if trip <= TRIPS:
                began = time.process_time()
        taken[link] = (time.process_time() - began) / TRIPS
    await asyncio.sleep(0.2)
    bus.close()
    return taken | {"resident": resident()}


def _receiver(bus: Bus, folder: str, link: str, down: Payload | None) -> Any:
    address = f"{folder}/{link}"
    if down:
        kind, fields, arrays = down
        server = bus.server(link, [address])

        async def answered() -> None:
            (await server.recv()).answer(kind, fields, arrays)

        return answered
    if link in SUBSCRIBERS:
        subscribers = [bus.subscriber(link, address) for _ in range(SUBSCRIBERS[link])]
        return subscribers[0].next
    return bus.receiver(link, [address], 2).recv


def sums(rank: int, ranks: int, size: int, folder: Path) -> tuple[float, float]:
    """Mean processor and least wall time of summing `size` bytes over so many processes, each of which calls this."""
    torch.set_num_threads(1)
    meeting = folder / f"meeting-{ranks}"
    if rank == 0:
        rendezvous = Rendezvous(LOOPBACK, PATIENCE_S)
        meeting.with_suffix(".new").write_text(rendezvous.address)
        meeting.with_suffix(".new").rename(meeting)
    while not meeting.exists():
        time.sleep(0.02)
    among = Collective(meeting.read_text(), 1, rank, ranks, LOOPBACK, torch.device("cpu"), PATIENCE_S)
    flat = torch.zeros(max(1, size // 4))
    for _ in range(2):  # the first is for what is made once
        cpu, walls = time.process_time(), []
        for _ in range(SUMS):
            began = time.perf_counter()
            among.sum(flat)
            walls.append(time.perf_counter() - began)
        taken = (time.process_time() - cpu) / SUMS, min(walls)  # what it takes longer among others, trials say
    among.gather([0])
    time.sleep(0.2)  # the others' store is the first one's
    among.close()
    return taken
