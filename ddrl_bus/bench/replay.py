"""What a replay node costs over the buffer that it keeps and the sockets under it: `ddrl bench replay`.

Three ways, turn by turn in one run: a process that sends unrolls, a replay node, and a process that draws batches and
writes their priorities back, over ipc (`node`); the same calls on a buffer in one process (`bare`); frames of the same
sizes between processes through blocking PUSH/PULL and DEALER/ROUTER of pyzmq (`raw`). What is sent was written to fresh
memory just before, on either way, and nothing is compressed. Quote the ratios; absolute figures follow the machine's
mood.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import tempfile
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.bench.report import MB_PER_S, PER_S, About, Row, row
from ddrl_bus.launch import loop
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.launch.start import plan_of
from ddrl_bus.messages import Sample, Trajectory, fields_of
from ddrl_bus.nodes.base import node_class
from ddrl_bus.replay_buffer import ReplayBuffer
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Arena, Array, Message, Spec
from ddrl_bus.transport.zeromq import COPY_BELOW

PATIENCE_S: Final = 60.0
"""Against hangs only."""
ENVS, UNROLL, N_STEP, BATCH, WINDOW = 16, 16, 1, 512, 4
UNDER_WAY: Final = 2
"""Questions open before the next is asked: a learner's `prefetch`."""
ITEMS: Final = ENVS * UNROLL
"""Of an unroll."""


@dataclass(frozen=True)
class Case:
    """What is seen of an environment, and how many transitions are kept."""

    payload: str
    spaces: Spaces
    capacity: int


CASES: Final = (
    Case("4 floats", Spaces((4,), "float32", "discrete", 2), 1 << 17),
    Case("84 × 84, stack 4", Spaces((84, 84), "uint8", "discrete", 6, stack=4), 1 << 15),
)
WAYS: Final = ("bare", "node", "raw")
TURNS: Final = (("inserts",), ("samples",), ("priorities",), ("inserts", "samples"))
"""What goes on at a time; bare, a buffer each."""
BUSY: Final = {"inserts": "actor-0", "samples": "learner-0", "priorities": "learner-0"}
"""Who does it."""
Step = Callable[[], Awaitable[int]]
"""Moves something, and says how many items."""


ABOUT: Final = About(
    bench="replay",
    title="What a replay node costs over its buffer and the sockets under it",
    method="""Three ways, turn by turn: a process that sends unrolls, a replay node, and a process that draws
batches and writes their priorities back, over ipc (node); the same calls on a buffer in one process (bare); frames
of the same sizes between processes through PUSH/PULL and DEALER/ROUTER of pyzmq, which store and draw nothing
(raw). Nothing is compressed.""",
    reading="Items a second, and the megabytes a second that they are through the node. Of ratios more is better.",
    baseline="bare sockets, which store nothing",
)
KINDS: Final = {**dict.fromkeys(WAYS, PER_S), "node rate": MB_PER_S}
RATIOS: Final = {"of raw": ("node", "raw"), "of bare": ("node", "bare")}


def measure(repeats: int = 3, seconds: float = 0.4) -> Iterator[Row]:
    """The rows of each case, each figure over so many seconds."""
    for number, case in enumerate(CASES):
        with _sides(number) as pipes:
            sizes: dict[str, float] = {}
            for pipe in pipes.values():
                sizes |= _heard(pipe)
            turns = [(turn, way) for turn in TURNS for way in WAYS]
            rounds = [{turn: _turn(pipes, *turn, seconds) for turn in turns} for _ in range(repeats)]
        for turn in TURNS:
            for place, what in enumerate(turn):
                words = " beside ".join((what, *(other for other in turn if other != what)))
                found = [{way: rates[turn, way][place] for way in WAYS} for rates in rounds]
                found = [each | {"node rate": each["node"] * sizes[what] / 1e6} for each in found]
                yield row(f"items a second, {case.payload}", words, found, KINDS, RATIOS)


def _turn(pipes: Mapping[str, Connection], whats: tuple[str, ...], way: str, seconds: float) -> list[float]:
    """Items a second of each of `whats`, at the same time."""
    for what in whats:
        pipes[BUSY[what]].send((what, way, seconds))
    return [_heard(pipes[BUSY[what]]) for what in whats]


def _heard(pipe: Connection) -> Any:
    if not pipe.poll(PATIENCE_S):
        raise TimeoutError(f"no figures after {PATIENCE_S:.0f} s")
    return pipe.recv()


# ---- processes


@contextlib.contextmanager
def _sides(number: int) -> Iterator[dict[str, Connection]]:
    """The processes of a case; yields pipes to those that take orders, by their nodes' names."""
    spawn = multiprocessing.get_context("spawn")
    pipes = {name: spawn.Pipe() for name in ("actor-0", "learner-0")}
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as folder:
        sides = [spawn.Process(target=_replay, args=(number, folder)), spawn.Process(target=_raw_ends, args=(folder,))]
        sides += [spawn.Process(target=_ordered, args=(name, number, folder, pipes[name][1])) for name in pipes]
        for side in sides:
            side.start()
        try:
            yield {name: ours for name, (ours, _) in pipes.items()}
        finally:
            for side in sides:
                side.kill()
                side.join()


def _node(name: str, number: int, folder: str) -> Any:
    """The node of this name, not yet living: by its ports it opens link ends."""
    overrides = (
        *("nodes.actor.count=1", f"nodes.actor.envs={ENVS}", f"algo.unroll={UNROLL}", f"algo.n_step={N_STEP}"),
        *("nodes.replay.count=1", f"nodes.replay.capacity={CASES[number].capacity}", "nodes.replay.min_size=1"),
        *("nodes.replay.samples_per_insert=null", "nodes.replay.save=false", f"algo.batch={BATCH}"),
        *(f"links.trajectories.window={WINDOW}", "links.trajectories.codec=none"),
    )
    plan = replace(plan_of("apex", overrides, probe=False), ipc_dir=Path(folder))
    node: Any = node_class(plan, name)(plan, name, Path(folder), epoch=1)
    node.spaces = CASES[number].spaces
    return node


def _replay(number: int, folder: str) -> None:
    keep_freed_memory()  # as every node does; the others get the same
    logging.disable()  # it misses its controller
    loop.run(_node("replay-0", number, folder).live(asyncio.Event()))


def _ordered(name: str, number: int, folder: str, orders: Connection) -> None:
    keep_freed_memory()
    loop.run(_obey(name, number, folder, orders))


async def _obey(name: str, number: int, folder: str, orders: Connection) -> None:
    """Say how large items are, then measure what is asked for until killed."""
    node = _node(name, number, folder)
    sizes, steps = await (_inserts if name == "actor-0" else _draws)(node, folder)
    orders.send(sizes)
    while True:
        what, way, seconds = await asyncio.to_thread(orders.recv)
        orders.send(await _rate(steps[what, way], seconds))


async def _rate(step: Step, seconds: float) -> float:
    """Items a second, once it has got going."""
    began = time.perf_counter()
    while time.perf_counter() < began + seconds / 4:
        await step()
    began, items = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + seconds:
        items += await step()
    return items / (now - began)


def _unroll(node: Any) -> dict[str, Array]:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in node.schema.unroll_specs(ENVS).items()}
    arrays["priority"][...] = np.random.default_rng(1).random(arrays["priority"].shape)
    return arrays


def _full_buffer(node: Any, unroll: Mapping[str, Array]) -> ReplayBuffer:
    windows, capacity = node.windows, node.plan.groups["replay"].capacity
    buffer = ReplayBuffer(node.windows_schema, windows.rows, windows.starts, capacity, windows.alpha)
    while buffer.items < buffer.capacity:
        buffer.add(unroll)
    return buffer


Measured = tuple[dict[str, float], dict[tuple[str, str], Step]]
"""Bytes that an item takes on its way, and what to do for (what, way)."""


async def _inserts(node: Any, folder: str) -> Measured:
    sender, unroll = node.open_sender("trajectories"), _unroll(node)
    buffer = _full_buffer(node, unroll)
    fields = fields_of(Trajectory(0, [], [], node.schema.overlap))
    size = len(Arena.of(Trajectory.KIND, unroll).encode(node.name, node.epoch, 1, fields))
    push = _raw(zmq.PUSH, f"{folder}/inserts")

    async def bare() -> int:
        buffer.add(unroll)
        return ITEMS

    async def through_node() -> int:
        await sender.send(Arena.of(Trajectory.KIND, unroll), fields)
        return ITEMS

    async def raw() -> int:
        _send(push, size)
        return ITEMS

    for _ in range(buffer.capacity // ITEMS + 1):
        await through_node()  # until that one is full too
    steps = zip(WAYS, (bare, through_node, raw), strict=True)
    return {"inserts": size / ITEMS}, {("inserts", way): step for way, step in steps}


async def _draws(node: Any, folder: str) -> Measured:
    client, buffer = node.open_client("samples"), _full_buffer(node, _unroll(node))
    priority = np.random.default_rng(2).random(BATCH, np.float32)
    mine = buffer.sample(BATCH, _allocate)["id"]
    drawn = {"id": mine, "priority": priority}
    asked: deque[asyncio.Future[Message]] = deque()

    async def ask(count: int) -> Message | None:
        """The answer to the question before the last, whose items the next one is about."""
        asked.append(client.ask(Sample.KIND, fields_of(Sample(count, node.epoch)), drawn, timeout_s=PATIENCE_S))
        if len(asked) <= UNDER_WAY:
            return None
        answer = await asked.popleft()
        drawn["id"] = answer.arrays.get("id", drawn["id"])
        return answer

    async def samples() -> int:
        answer = await ask(BATCH)
        return len(answer.arrays.get("id", ())) if answer else 0

    async def priorities() -> int:
        return BATCH if await ask(0) else 0

    async def bare_samples() -> int:
        buffer.update(buffer.sample(BATCH, _allocate)["id"], priority)
        return BATCH

    async def bare_priorities() -> int:
        buffer.update(mine, priority)
        return BATCH

    while not await samples():
        pass
    question = len(wire.encode(Sample.KIND, node.name, node.epoch, 1, fields_of(Sample(BATCH, node.epoch)), drawn))
    answers = {"samples": (await asked[-1]).nbytes, "priorities": wire.ALIGN}
    steps: dict[tuple[str, str], Step] = {("samples", "bare"): bare_samples, ("priorities", "bare"): bare_priorities}
    steps |= {("samples", "node"): samples, ("priorities", "node"): priorities}
    steps |= {(what, "raw"): _raw_question(f"{folder}/samples", question, size) for what, size in answers.items()}
    return {"samples": answers["samples"] / BATCH, "priorities": question / BATCH}, steps


def _allocate(specs: Mapping[str, Spec]) -> dict[str, Array]:
    return {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}


# ---- bare sockets


def _raw_question(address: str, question: int, answer: int) -> Step:
    """Asks in so many bytes for so many."""
    socket = _raw(zmq.DEALER, address)
    text, wanted = bytes(question), str(answer).encode()
    for _ in range(UNDER_WAY):
        socket.send_multipart((wanted, text))

    async def ask() -> int:
        socket.send_multipart((wanted, text))
        socket.recv(copy=False)
        return BATCH

    return ask


def _raw_ends(folder: str) -> None:
    """What the others' bare sockets are connected to."""
    keep_freed_memory()
    threading.Thread(target=_swallow, args=(_raw(zmq.PULL, f"{folder}/inserts", bind=True),), daemon=True).start()
    router = _raw(zmq.ROUTER, f"{folder}/samples", bind=True)
    while True:
        peer, wanted, _ = router.recv_multipart(copy=False)
        router.send(peer, zmq.SNDMORE)
        _send(router, int(wanted.bytes))


def _swallow(socket: zmq.Socket[bytes]) -> None:
    while True:
        socket.recv(copy=False)


def _send(socket: zmq.Socket[bytes], size: int) -> None:
    socket.send(np.ones(size, np.uint8).data, 0, copy=size < COPY_BELOW)


def _raw(kind: int, path: str, *, bind: bool = False) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    if kind in (zmq.PUSH, zmq.PULL):
        socket.set_hwm(WINDOW)
    (socket.bind if bind else socket.connect)(f"ipc://{path}.raw")
    return socket
