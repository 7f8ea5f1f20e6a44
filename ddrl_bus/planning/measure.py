"""What the parts of a topology's nodes cost here, in seconds of one core.

Nodes are made as a run makes them, and what they do on their compute threads is called in turn. It is processor time
that is counted, so that others on the machine disturb it little. `of_nodes` runs in a process of its own.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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
        precision = self.plan.links["weights"].precision
        weights = {name: array.astype(precision) for name, array in learner.algo.weights().items()}
        told = Weights.KIND, fields_of(Weights(0, 0)), weights
        self.weights = [self.message("weights", told) for _ in range(2)]
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
            await loop.run_in_executor(thread, nothing)
            await sender.send(Arena.of(kind, arrays), fields)
            await receiver.recv()
            await loop.run_in_executor(thread, nothing)
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
        """Stepping groups, and inference for them; returns an unroll."""
        inference: Any = self.first("inference")
        await inference.start()
        self.note("load", lambda: inference.predictors[0].policy.load(self.weights[0].arrays))
        sent = self._asked(node, inference, node.envs)
        self._asked(node, inference, WIDER * node.envs)
        for name in ("act", "actions"):
            self.message(name, sent[name])
        return self.message("trajectories", sent["trajectories"])

    def _asked(self, node: Any, inference: Any, envs: int) -> dict[str, Payload]:
        """A group's questions and their answers, over three unrolls; returns what goes over the links meanwhile."""
        node.envs, faults, clock = envs, EnvFaults(node.env_faults, node.log), time.process_time
        group = node._new_group(0, None)
        assembler = None if node.trajectories else inference._new_group(("x", 0), 1, 0, np.zeros(envs)).assembler
        initial = partial(memory.initial, self.plan.algo, node.spaces, envs)
        asked = Group(1, 0, initial, np.zeros(envs, np.float32), assembler)
        played: Any = None
        taken: dict[str, list[float]] = {"asked": [], "infer": [], "step": []}
        for _ in range(3 * node.schema.unroll):
            told = "act", fields_of(group.act), group.arrays
            times = [clock()]
            assembled, _ = asked.asks(group.act, group.arrays)
            times.append(clock())
            inference.predictors[0].answer([asked], self.weights[0])
            times.append(clock())
            assert asked.actions is not None
            said = Actions.KIND, fields_of(asked.actions), asked.arrays
            answer = decode(bytes(encode(said[0], "inference-0", 1, 1, *said[1:])))
            began = clock()
            ended = node._step(group, answer, faults) or assembled
            steps = clock() - began
            for what, seconds in zip(taken, (times[1] - times[0], times[2] - times[1], steps), strict=True):
                taken[what].append(seconds)
            played = ended or played
        for what, all_of_it in taken.items():
            self.points.setdefault(what, []).append((envs, statistics.median(all_of_it)))
        arena, fields = played
        return {"act": told, "actions": said, "trajectories": (Trajectory.KIND, fields, dict(arena.arrays))}

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
            self.note("adopt", lambda: node.algo.load({n: a.copy() for n, a in node.algo.weights().items()}, 0))
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


def nothing() -> None:
    """As long as it takes to get to a node's thread and back."""
