"""What the parts of a topology's nodes cost here, in seconds of one core.

Nodes are made as a run makes them, and what they do on their compute threads is called in turn (`of_nodes`); link ends
carry what those nodes would send between two processes, whose time counts with that of ZeroMQ's threads (`of_links`).
It is processor time that is counted, so that others on the machine disturb it little. Every function here runs in a
process of its own.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from ddrl_bus.algos import memory
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.policy import Explore
from ddrl_bus.envs import VectorEnv
from ddrl_bus.experience import BatchSlots, Slot
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.messages import Actions, Gradient, Parameters, Sampled, Trajectory, Weights, fields_of
from ddrl_bus.nodes.base import Node, node_class
from ddrl_bus.nodes.batches import allocator, check
from ddrl_bus.nodes.collective import Collective, Rendezvous
from ddrl_bus.nodes.env_faults import EnvFaults
from ddrl_bus.nodes.groups import Group
from ddrl_bus.nodes.trainer import make_algorithm
from ddrl_bus.topology.plan import Plan
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.wire import Arena, Array, Message, decode, encode

Points = list[tuple[float, float]]
"""(size, seconds), by size."""
Payload = tuple[str, dict[str, Any], dict[str, Array]]
"""Kind, fields and arrays of a message."""

WIDER: Final = 4
"""Costs that depend on a size are measured at the topology's and at so many times it."""
TRIPS: Final = 75
SUMS: Final = 50
LOOPBACK: Final = "127.0.0.1"
PATIENCE_S: Final = 60.0


def seconds_of(work: Callable[[], object], budget: float, least: int = 3) -> float:
    """Median processor time of a call, over at least so many, for about `budget` seconds."""
    work()
    times: list[float] = []
    while len(times) < least or sum(times) < budget:
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return statistics.median(times)


# ---- nodes


class Nodes:
    """One node of each kind that the plan has, and what they cost."""

    def __init__(self, plan: Plan, folder: Path, budget: float) -> None:
        self.plan = replace(plan, ipc_dir=folder)
        self.folder, self.budget = folder, budget
        self.hub = MemoryHub()
        self.points: dict[str, Points] = {}
        self.payloads: dict[str, Payload] = {}
        self.sizes: dict[str, float] = {}

    def first(self, kind: str) -> Node | None:
        """The first node of the kind, not yet living."""
        name = next((name for name, node in self.plan.nodes.items() if node.kind == kind), None)
        if name is None:
            return None
        return node_class(self.plan, name)(self.plan, name, self.folder, 1, self.hub)

    def note(self, what: str, work: Callable[[], object], size: float = 1) -> None:
        self.points.setdefault(what, []).append((size, seconds_of(work, self.budget)))

    def message(self, name: str, payload: Payload) -> Message:
        """As it arrives; what others send in this way is measured as `name`."""
        kind, fields, arrays = self.payloads.setdefault(name, payload)
        arena = Arena.of(kind, arrays)
        frame = bytes(arena.encode("calibration-0", 1, 1, fields, compress=arena.compressible))
        self.sizes[name] = len(frame)
        return decode(frame)

    async def measure(self) -> None:
        learner: Any = self.first("learner")
        assert learner is not None
        await learner.start()
        self.sizes["learner"] = resident()
        weights = fields_of(Weights(0, 0)), {name: array.copy() for name, array in learner.algo.weights().items()}
        self.weights = [self.message("weights", (Weights.KIND, *weights)) for _ in range(2)]
        unroll = await self.actor()
        await self.evaluator()
        batch: int = self.plan.algo.batch
        if "samples" in learner.ports:
            drawn = await self.replay(unroll)
            full = [self.filled(learner, drawn, batch)]
        else:
            full = [self.filled(learner, unroll, batch * times) for times in (1, WIDER)]
        self.learner(learner, full)
        if any(options.bundle for options in self.plan.groups.values()):
            await self.inside()

    async def inside(self) -> None:
        """A message between two nodes of one process, both ends and the ways to their threads together."""
        kind, fields, arrays = self.payloads["trajectories"]
        bus, thread = Bus("calibration-0", 1, Ledger(), self.hub), ThreadPoolExecutor(1)
        loop = asyncio.get_running_loop()
        receiver = bus.receiver("trajectories", ["memory://calibration"], 2)
        sender = bus.sender("trajectories", {"calibration-0": "memory://calibration"})
        for trip in range(2 * TRIPS):
            if trip == TRIPS:
                began = time.process_time()
            await loop.run_in_executor(thread, _nothing)
            await sender.send(Arena.of(kind, arrays), fields)
            await receiver.recv()
            await loop.run_in_executor(thread, _nothing)
        self.points["inside"] = [(1, (time.process_time() - began) / TRIPS)]

    async def actor(self) -> Message:
        """Playing; returns an unroll."""
        node: Any = self.first("actor")
        await node.start()
        if "act" in node.ports:
            return await self.env_actor(node)
        node.newest = self.weights[0]
        envs = node.envs
        for number in (envs, WIDER * envs):
            node.envs, node.explore = number, Explore(np.zeros(number, np.float32))
            node._new_env(0)
            self.note("play", node._play, number)
            if number == envs:
                arena, fields = node._play()
                unroll = self.message("trajectories", (Trajectory.KIND, fields, dict(arena.arrays)))
        self.note("load", partial(self._load, node))
        return unroll

    def _load(self, node: Any) -> None:
        node.newest = self.weights[node.newest is self.weights[0]]
        node._load()

    async def env_actor(self, node: Any) -> Message:
        """Stepping groups, and inference for them."""
        inference: Any = self.first("inference")
        await inference.start()
        envs, faults = node.envs, EnvFaults(node.env_faults, node.log)
        predictor, newest = inference.predictors[0], self.weights[0]
        self.note("load", lambda: predictor.policy.load(newest.arrays))
        unroll: Message | None = None
        played: Any = None
        for number in (envs, WIDER * envs):
            node.envs = number
            group = node._new_group(0, None)
            assembler = None if node.trajectories else inference._new_group(("x", 0), 1, 0, np.zeros(number)).assembler
            initial = partial(memory.initial, self.plan.algo, node.spaces, number)
            asked = Group(1, 0, initial, np.zeros(number, np.float32), assembler)
            asks, infers, steps = [], [], []
            for _ in range(3 * node.schema.unroll):
                times = [time.process_time()]
                ended, _ = asked.asks(group.act, group.arrays)
                times.append(time.process_time())
                predictor.answer([asked], newest)
                times.append(time.process_time())
                assert asked.actions is not None
                told = fields_of(group.act), group.arrays
                said = fields_of(asked.actions), asked.arrays
                answer = decode(bytes(encode(Actions.KIND, "inference-0", 1, 1, *said)))
                began = time.process_time()
                ended = node._step(group, answer, faults) or ended
                steps.append(time.process_time() - began)
                asks.append(times[1] - times[0])
                infers.append(times[2] - times[1])
                if ended is not None and number == envs:
                    played = ended
            for what, taken in (("asked", asks), ("infer", infers), ("step", steps)):
                self.points.setdefault(what, []).append((number, statistics.median(taken)))
            if number == envs:
                self.message("act", ("act", *told))
                self.message("actions", (Actions.KIND, *said))
                arena, fields = played
                unroll = self.message("trajectories", (Trajectory.KIND, fields, dict(arena.arrays)))
        assert unroll is not None
        return unroll

    async def evaluator(self) -> None:
        """A step of all its episodes."""
        node: Any = self.first("evaluator")
        if node is None:
            return
        await node.start()
        episodes = node.options.episodes
        group = VectorEnv(node.env, episodes, np.random.SeedSequence(1))
        node.policy.load(self.weights[0].arrays)
        obs, carried = group.reset(), node.policy.initial_state(episodes)
        self.note("evaluate", lambda: group.step(node.policy.act(obs, carried, None).action), episodes)
        group.close()

    async def replay(self, unroll: Message) -> Message:
        """Storing and drawing; returns what was drawn."""
        node: Any = self.first("replay")
        await node.start()
        batch: int = self.plan.algo.batch
        while node.buffer.items < min(node.buffer.capacity, 8 * batch):
            node._store(unroll)
        self.note("insert", lambda: (node.fits(unroll), node._store(unroll)))
        self.note("draw", partial(node._draw, batch), batch)
        arena = node._draw(batch)
        drawn = self.message("samples", (Sampled.KIND, fields_of(Sampled(1, 1.0, 0)), dict(arena.arrays)))
        ids, priorities = drawn.arrays["id"].copy(), np.ones(batch, np.float32)
        self.note("prioritise", lambda: node.buffer.update(ids, priorities), batch)
        self.message("sample", ("sample", {"count": batch, "life": 1}, {"id": ids, "priority": priorities}))
        node._draw(max(1, batch // WIDER))
        self.note("draw", partial(node._draw, max(1, batch // WIDER)), max(1, batch // WIDER))
        self.sizes["items"] = float(node.windows.starts * unroll.arrays["obs"].shape[1])
        return drawn

    def filled(self, learner: Any, message: Message, width: int) -> Slot:
        """A batch of that many columns, made of copies of the message."""
        schema = learner.windows_schema if "samples" in learner.ports else learner.schema
        batches = BatchSlots(schema, width, 1, allocator(learner.algo.device))
        slot = batches.free[0]
        refuses, columns = check(schema), message.arrays["obs"].shape[1]

        def copied() -> None:
            slot.clear()
            refuses(message)
            batches.copy(slot, message, 0)

        self.note("copy", copied, min(columns, width))
        slot.clear()
        while not slot.full:
            batches.copy(slot, message, 0)
        slot.env_steps = slot.columns * schema.unroll
        if schema is not learner.schema:
            slot.weight = np.ones(width, np.float32)
        return slot

    def learner(self, node: Any, slots: Sequence[Slot]) -> None:
        sums = 0

        def counted(_: torch.Tensor) -> None:
            nonlocal sums
            sums += 1

        if "gradients" in node.ports:
            node.slot = slots[0]
            self.note("update", node._gradient, slots[0].width)
            self.server(node._gradient()[0], slots[0])
            self.note("load", lambda: node.algo.load({n: a.copy() for n, a in node.algo.weights().items()}, 0))
            return
        for slot in slots:
            self.note("update", partial(node._update, slot), slot.width)
        node.algo.all_reduce = counted
        node._update(slots[0])
        self.sizes["sums"] = sums

    def server(self, gradient: Mapping[str, Array], slot: Slot) -> None:
        """Applying a gradient's part, and telling the newest parameters."""
        node: Any = self.first("param_server")
        algo = make_algorithm(node, "cpu")
        servers = len(list(self.plan.members(node.ports["gradients"].link.targets)))
        part = dict(list(gradient.items())[::servers])

        def applied() -> None:
            algo.apply(part, slot.env_steps)
            Arena.of(Parameters.KIND, {name: algo.weights()[name] for name in part})

        self.note("apply", applied)
        told = fields_of(Gradient(1, 0, slot.env_steps, {}))
        self.message("gradients", (Gradient.KIND, told, {name: array.copy() for name, array in part.items()}))
        fields = fields_of(Parameters(0, 0, "applied"))
        self.message("parameters", (Parameters.KIND, fields, {name: array.copy() for name, array in part.items()}))


def resident() -> float:
    """Bytes of this process's memory, what it shares counted in part."""
    return float(psutil.Process().memory_full_info().pss)


def of_nodes(plan: Plan, folder: Path, budget: float) -> tuple[dict[str, Points], dict[str, float], dict[str, Payload]]:
    """Costs of the nodes' own work, sizes in bytes and the like, and what they send."""
    keep_freed_memory()
    torch.set_num_threads(1)
    nodes = Nodes(plan, folder, budget)
    asyncio.run(nodes.measure())
    return {name: sorted(points) for name, points in nodes.points.items()}, nodes.sizes, nodes.payloads


# ---- links

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
            await loop.run_in_executor(thread, _nothing)
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
        await loop.run_in_executor(thread, _nothing)
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
                await loop.run_in_executor(thread, _nothing)
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


def _nothing() -> None:
    """As long as it takes to get to a node's thread and back."""


# ---- cores, and sums


def kernel(seconds: float = 0.4) -> float:
    """Processor time of a piece of work that is half numpy, half Python."""
    a, b = np.ones((32, 64), np.float32), np.ones((64, 64), np.float32)

    def work() -> None:
        for _ in range(300):
            np.tanh(a @ b, out=a)
            sum(range(60))

    return seconds_of(work, seconds)


def sums(rank: int, ranks: int, size: int, folder: Path) -> tuple[float, float]:
    """Mean processor and median wall time of summing `size` bytes over so many processes, each of which calls this."""
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
        taken = (time.process_time() - cpu) / SUMS, statistics.median(walls)
    among.gather([0])
    time.sleep(0.2)  # the others' store is the first one's
    among.close()
    return taken
