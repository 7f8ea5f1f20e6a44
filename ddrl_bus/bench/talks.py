"""Two processes talking through one library or another, each with its own far side: one function each."""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Final, Protocol

import numpy as np
import zmq

from ddrl_bus.algos.lazy import torch
from ddrl_bus.bench.crew import leave_with_parent
from ddrl_bus.bench.ends import TIMEOUT_S
from ddrl_bus.bench.raw_ends import Socket, frame_of, put
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Request
from ddrl_bus.transport.wire import Layout

WINDOW: Final = 64
"""Messages under way, where it can be said."""


class Talk(Protocol):
    def stream(self, size: int, count: int) -> float:
        """Seconds from the first send until all are known to have arrived."""

    def trips(self, size: int, count: int) -> list[float]:
        """Seconds of each message there and back."""


Opener = Callable[[str], AbstractContextManager[Talk]]
"""Takes a folder for sockets and files."""


def in_words(size: int) -> str:
    """1 MB is 2²⁰ bytes here."""
    for unit, name in ((1 << 20, "MB"), (1 << 10, "KB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


@contextmanager
def _far(side: Callable[..., None], *args: Any) -> Iterator[None]:
    """The far side in a process of its own, which goes with this one, however that ends."""
    process = multiprocessing.get_context("spawn").Process(target=_follow, args=(side, *args))
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def _follow(side: Callable[..., None], *args: Any) -> None:
    leave_with_parent()
    keep_freed_memory()
    side(*args)


def _trips(count: int, trip: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        trip()
        found.append(time.perf_counter() - began)
    return found


# ── ours


class _Ours:
    def __init__(self, run: Callable[[Coroutine[Any, Any, Any]], Any], bus: Bus, folder: str) -> None:
        self._run = run
        self._sender = bus.sender("stream", {"learner-0": f"ipc://{folder}/queue"}, codec="none")
        self._client = bus.client("echo", f"ipc://{folder}/request")

    def stream(self, size: int, count: int) -> float:
        seconds: float = self._run(self._stream(Layout("bench", {"x": ("uint8", (size,))}), count))
        return seconds

    async def _stream(self, layout: Layout, count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            await self._sender.send(layout.arena(), {})
        if not await self._sender.flush(TIMEOUT_S):
            raise TimeoutError("not all has arrived")
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        found: list[float] = self._run(self._all_trips(size, count))
        return found

    async def _all_trips(self, size: int, count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = time.perf_counter()
            await self._client.request("echo", {}, {"x": np.empty(size, np.uint8)}, timeout_s=TIMEOUT_S)
            found.append(time.perf_counter() - began)
        return found


@contextmanager
def ours(folder: str) -> Iterator[Talk]:
    with _far(_our_far_side, folder), asyncio.Runner() as runner:

        async def opened() -> tuple[Bus, _Ours]:
            bus = Bus("actor-0", 1, Ledger())
            return bus, _Ours(runner.run, bus, folder)

        bus, talk = runner.run(opened())
        try:
            yield talk
        finally:
            _closed(runner, bus)


def _closed(runner: asyncio.Runner, bus: Bus) -> None:
    async def close() -> None:
        bus.close()

    runner.run(close())


def _our_far_side(folder: str) -> None:
    asyncio.run(_swallow_and_echo(folder))


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


# ── bare sockets


class _Bare:
    def __init__(self, push: Socket, dealer: Socket) -> None:
        self._push, self._dealer = push, dealer

    def stream(self, size: int, count: int) -> float:
        self._dealer.send(str(count).encode())  # the other side says when it has them
        began = time.perf_counter()
        for _ in range(count):
            put(self._push, frame_of(size, 0))
        self._dealer.recv()
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        def trip() -> None:
            put(self._dealer, frame_of(size, 0))
            self._dealer.recv(copy=False)

        return _trips(count, trip)


@contextmanager
def bare(folder: str) -> Iterator[Talk]:
    sockets = zmq.Context()
    with _far(_bare_far_side, folder), sockets, sockets.socket(zmq.PUSH) as push, sockets.socket(zmq.DEALER) as dealer:
        for socket, name in ((push, "push"), (dealer, "dealer")):
            socket.set_hwm(WINDOW)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
            socket.connect(f"ipc://{folder}/{name}")
        yield _Bare(push, dealer)


def _bare_far_side(folder: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull, context.socket(zmq.ROUTER) as router:
        pull.set_hwm(WINDOW)
        pull.bind(f"ipc://{folder}/push")
        router.bind(f"ipc://{folder}/dealer")
        while True:
            peer, body = router.recv_multipart(copy=False)
            if len(body) < 16:  # how many will come by the other socket
                for _ in range(int(body.bytes)):
                    pull.recv(copy=False)
            router.send(peer, zmq.SNDMORE)
            router.send(body, copy=len(body) < 128 << 10)


# ── gRPC


class _Grpc:
    def __init__(self, channel: Any) -> None:
        self._take, self._echo = channel.stream_unary("/bench/take"), channel.stream_stream("/bench/echo")

    def stream(self, size: int, count: int) -> float:
        message = bytes(size)
        began = time.perf_counter()
        self._take(message for _ in range(count))
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        message, up = bytes(size), queue.SimpleQueue[bytes | None]()
        down = self._echo(iter(up.get, None))

        def trip() -> None:
            up.put(message)
            next(down)

        found = _trips(count, trip)
        up.put(None)
        return found


_UNLIMITED: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@contextmanager
def grpc_stream(folder: str) -> Iterator[Talk]:
    import grpc

    with _far(_grpc_far_side, folder), grpc.insecure_channel(f"unix:{folder}/grpc", _UNLIMITED) as channel:
        grpc.channel_ready_future(channel).result(TIMEOUT_S)
        yield _Grpc(channel)


def _grpc_far_side(folder: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def take(messages: Iterator[bytes], _context: object) -> bytes:
        for _ in messages:
            pass
        return b""

    def echo(messages: Iterator[bytes], _context: object) -> Iterator[bytes]:
        yield from messages

    methods = {
        "take": grpc.stream_unary_rpc_method_handler(take),
        "echo": grpc.stream_stream_rpc_method_handler(echo),
    }
    server = grpc.server(ThreadPoolExecutor(2), options=_UNLIMITED)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", methods),))
    server.add_insecure_port(f"unix:{folder}/grpc")
    server.start()
    server.wait_for_termination()


# ── Ray


class _Ray:
    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def stream(self, size: int, count: int) -> float:
        """Calls of one caller are answered in order: the last answer is that of all."""
        message = np.zeros(size, np.uint8)
        began = time.perf_counter()
        answers = [self._actor.take.remote(message) for _ in range(count)]
        self._ray.get(answers[-1], timeout=TIMEOUT_S)
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        message = np.zeros(size, np.uint8)
        return _trips(count, lambda: self._ray.get(self._actor.echo.remote(message), timeout=TIMEOUT_S))


class _RayActor:
    def take(self, message: Any) -> None:
        pass

    def echo(self, message: Any) -> Any:
        return message


@contextmanager
def ray_actor(folder: str) -> Iterator[Talk]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=folder)
    try:
        actor = ray.remote(_RayActor).remote()
        ray.get(actor.take.remote(b""))
        yield _Ray(ray, actor)
    finally:
        ray.shutdown()


# ── multiprocessing


class _Queues:
    def __init__(self, up: Any, down: Any) -> None:
        self._up, self._down = up, down

    def stream(self, size: int, count: int) -> float:
        message = bytes(size)
        self._up.put(count)
        began = time.perf_counter()
        for _ in range(count):
            self._up.put(message)
        self._down.get(timeout=TIMEOUT_S)
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        message = bytes(size)

        def trip() -> None:
            self._up.put(message)
            self._down.get(timeout=TIMEOUT_S)

        return _trips(count, trip)


@contextmanager
def queues(_folder: str) -> Iterator[Talk]:
    spawn = multiprocessing.get_context("spawn")
    up, down = spawn.Queue(WINDOW), spawn.Queue(WINDOW)
    with _far(_queues_far_side, up, down):
        yield _Queues(up, down)
    up.cancel_join_thread()


def _queues_far_side(up: Any, down: Any) -> None:
    while True:
        message = up.get()
        if isinstance(message, int):  # so many will come
            for _ in range(message):
                up.get()
            message = b""
        down.put(message)


# ── torch.distributed


class _Gloo:
    def stream(self, size: int, count: int) -> float:
        self._order(size, count, 0)
        message, done = torch.zeros(size, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
        began = time.perf_counter()
        for _ in range(count):
            torch.distributed.send(message, 1)
        torch.distributed.recv(done, 1)
        return time.perf_counter() - began

    def trips(self, size: int, count: int) -> list[float]:
        self._order(size, count, 1)
        message = torch.zeros(size, dtype=torch.uint8)

        def trip() -> None:
            torch.distributed.send(message, 1)
            torch.distributed.recv(message, 1)

        return _trips(count, trip)

    def _order(self, *numbers: int) -> None:
        torch.distributed.send(torch.tensor(numbers), 1)


@contextmanager
def gloo(folder: str) -> Iterator[Talk]:
    with _far(_gloo_far_side, folder):
        _join(folder, 0)
        try:
            yield _Gloo()
        finally:
            torch.distributed.destroy_process_group()


def _gloo_far_side(folder: str) -> None:
    _join(folder, 1)
    dist, order, done = torch.distributed, torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.uint8)
    while True:
        try:
            dist.recv(order, 0)
        except RuntimeError:  # the other one has left
            return
        size, count, echoes = order.tolist()
        message = torch.zeros(size, dtype=torch.uint8)
        for _ in range(count):
            dist.recv(message, 0)
            if echoes:
                dist.send(message, 0)
        if not echoes:
            dist.send(done, 0)


def _join(folder: str, rank: int) -> None:
    """A group of two."""
    torch.set_num_threads(1)
    dist: Any = torch.distributed
    store, patience = dist.FileStore(f"{folder}/meeting", 2), timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
