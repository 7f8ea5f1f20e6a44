"""One event loop, one hub: a real node among link ends that a test holds in its hands."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ddrl_bus import __version__
from ddrl_bus.experience import Unroll, UnrollSchema
from ddrl_bus.launch.catalog import catalog
from ddrl_bus.messages import Control, Progress, Trajectory, Weights, fields_of, parse
from ddrl_bus.nodes.base import Node, node_class
from ddrl_bus.nodes.reports import report_of
from ddrl_bus.topology import Plan, load
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Client, Publisher, Receiver, Sender, Subscriber
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.wire import Arena, Array, Message

PATIENCE_S = 30.0
"""Against hangs only: nothing here takes long on a quiet machine."""

TOPOLOGY = """
name: rig
seed: 3
env: {id: CartPole-v1}
algo: {name: impala, unroll: 5, batch: 8, hidden: [8]}
nodes:
  actor: {count: 2, envs: 4}
  learner: {device: cpu}
  evaluator: {episodes: 2, every: 50ms}
links:
  trajectories: {kind: queue, from: actor, to: learner, window: 2}
  weights: {kind: latest, from: learner, to: [actor, evaluator]}
grace: 3s
"""
WORKERS = (
    *("nodes.learner.count=2", "nodes.learner.bundle=worker", "nodes.actor.bundle=worker"),
    *("links.trajectories.window=1", "links.trajectories.max_lag=0", "links.weights.to=[actor]", "algo.batch=4"),
    *("nodes.param_server.kind=param_server", "links.gradients.kind=request", "links.parameters.kind=latest"),
    "algo.optimizer=sgd",
)
"""Overrides: two learners that have a parameter server apply their gradients, in whatever order they come."""
REPLAY = (
    *("algo.name=dqn", "algo.n_step=2", "algo.target_every=10", "algo.reward_scale=0.01"),
    *("nodes.replay.kind=replay", "nodes.replay.capacity=400", "nodes.replay.min_size=20"),
    *("links.trajectories.to=[replay]", "links.samples.kind=request"),
)
"""Overrides: a replay node between actors and the learner."""


def make_plan(folder: Path, *overrides: str, in_process: bool = True) -> Plan:
    path = folder / "rig.yaml"
    path.write_text(TOPOLOGY)
    plan = load(path, overrides=overrides, catalog=catalog())
    return replace(plan, in_process=in_process)  # replicas too, on threads of their own


def epoch(life: int) -> int:
    return life << 32 | 7


async def eventually(holds: Callable[[], Any], what: str = "") -> Any:
    """What `holds` returns once that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, f"never: {what or holds}"
        await asyncio.sleep(0.005)
    return found


@dataclass
class Living:
    """A node that runs."""

    node: Any
    task: asyncio.Task[None]
    stop: asyncio.Event

    @property
    def books(self) -> dict[str, int]:
        books: dict[str, int] = self.node.ledger.snapshot()
        return books

    def count(self, *what: str) -> int:
        """Sum of the counters of this link (first) that end so (last); or the counter of one name."""
        if len(what) == 1:
            return self.books.get(what[0], 0)
        return sum(n for name, n in self.books.items() if name.startswith(what[0]) and name.endswith(what[1]))

    async def running(self) -> None:
        """It answers: what is asked of it before waits until it is asked again."""
        await eventually(lambda: self.node.state == "running")

    async def drained(self) -> None:
        self.stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await self.task


@dataclass
class Rig:
    plan: Plan
    folder: Path
    hub: MemoryHub = field(default_factory=MemoryHub)
    living: list[Living] = field(default_factory=list)
    buses: list[Bus] = field(default_factory=list)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    # ── real nodes

    def start(self, name: str, life: int = 1, plan: Plan | None = None, *, inline: bool = True) -> Living:
        plan = plan or self.plan
        return self.run(node_class(plan, name)(plan, name, self.folder, epoch(life), self.hub, inline=inline))

    def run(self, node: Node) -> Living:
        stop = asyncio.Event()
        living = Living(node, asyncio.create_task(node.live(stop), name=node.name), stop)
        self.living.append(living)
        return living

    # ── ends in a test's hands

    def bus(self, name: str, life: int = 1) -> Bus:
        bus = Bus(name, epoch(life), Ledger(), self.hub)
        self.buses.append(bus)
        return bus

    def publisher(self, node: str, link: str, life: int = 1) -> Publisher:
        return self.bus(node, life).publisher(link, self.plan.ports(node)[link].binds)

    def subscriber(self, node: str, link: str) -> Subscriber:
        (address,) = self.plan.ports(node)[link].peers.values()
        return self.bus(node).subscriber(link, address)

    def sender(self, node: str, link: str = "trajectories", life: int = 1) -> Sender:
        return self.bus(node, life).sender(link, self.plan.ports(node)[link].peers)

    def receiver(self, node: str, link: str = "trajectories") -> Receiver:
        port = self.plan.ports(node)[link]
        return self.bus(node).receiver(link, port.binds, port.link.window)

    def client(self, node: str, link: str = "progress", life: int = 1) -> Client:
        (address,) = self.plan.ports(node)[link].peers.values()
        return self.bus(node, life).client(link, address)

    def fake_controller(self) -> FakeController:
        return FakeController(self)

    async def close(self) -> None:
        tasks = [*(living.task for living in self.living), *self.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for bus in self.buses:
            bus.close()


@asynccontextmanager
async def rig_of(folder: Path, *overrides: str) -> AsyncIterator[Rig]:
    rig = Rig(make_plan(folder, *overrides), folder / "run")
    try:
        yield rig
    finally:
        await rig.close()


class FakeController:
    """Answers heartbeats with a control that the test sets, and keeps what was said."""

    def __init__(self, rig: Rig) -> None:
        bus = rig.bus("controller-0")
        ports = rig.plan.ports("controller-0")
        self.heard: dict[str, list[Progress]] = {}
        self.refuses = ""
        self.control = Control()
        self._server = bus.server("progress", ports["progress"].binds)
        self._publisher = bus.publisher("control", ports["control"].binds)
        self._published = 0
        rig.tasks.append(asyncio.create_task(self._serve(), name="fake controller"))
        self.say()

    def say(self, **change: Any) -> None:
        self.control = replace(self.control, **change)
        self._published += 1
        self._publisher.publish(self._published, Arena.of(Control.KIND, {}), fields_of(self.control))

    async def _serve(self) -> None:
        while True:
            request = await self._server.recv()
            if self.refuses:
                request.refuse(self.refuses)
                continue
            self.heard.setdefault(request.message.node, []).append(report_of(request.message))
            request.answer(Control.KIND, fields_of(self.control))

    def last(self, node: str) -> Progress | None:
        return self.heard[node][-1] if node in self.heard else None

    def states(self, node: str) -> list[str]:
        """The states that it reported, each once in a row."""
        states = [progress.state for progress in self.heard.get(node, [])]
        return [state for n, state in enumerate(states) if n == 0 or states[n - 1] != state]


# ── what nodes say ───────────────────────────────────────────────────────────────────────────────────────────────


def net(value: float = 0.0) -> dict[str, Array]:
    """Weights of the rig's network on CartPole: every parameter `value`."""
    shapes = {
        "torso.0.weight": (8, 4),
        "torso.0.bias": (8,),
        "policy.weight": (2, 8),
        "policy.bias": (2,),
        "value.weight": (1, 8),
        "value.bias": (1,),
    }
    return {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}


def publish_weights(publisher: Publisher, number: int, arrays: Mapping[str, Array] | None = None, **more: int) -> None:
    """The weights after `number` updates."""
    fields = fields_of(Weights(**{"env_steps": number * 40, "updates": number, **more}))
    publisher.publish(number + 1, Arena.of(Weights.KIND, arrays or net()), fields)


def unroll_of(plan: Plan, envs: int, version: int = 0, *, learner_epoch: int = 0, **rows: Any) -> tuple[Arena, Any]:
    """An unroll that a learner of `plan` (on CartPole) takes; `rows` replaces arrays."""
    schema = UnrollSchema(("float32", (4,)), ("int64", ()), {"policy": ("float32", (2,))}, plan.algo.unroll)
    unroll = Unroll(schema.layout(envs))
    for array in unroll.rows.values():
        array[...] = 0
    for name, value in {"version": version, **rows}.items():
        unroll.rows[name][...] = value
    return unroll.finish(), fields_of(Trajectory(learner_epoch, [], []))


def replayed(
    schema: UnrollSchema, envs: int = 4, first: int = 0, priority: float | Array = 1.0, **rows: Any
) -> tuple[Arena, Any]:
    """An unroll for a replay node, whose observations count from `first`, column by column; `rows` replaces arrays."""
    unroll = Unroll(schema.layout(envs))
    for array in unroll.rows.values():
        array[...] = 0
    obs = unroll.rows["obs"]
    count = first + np.arange(obs.shape[0] * envs).reshape(envs, -1).T
    obs[...] = count.reshape(*count.shape, *(1,) * (obs.ndim - 2))
    for name, value in {"priority": priority, **rows}.items():
        unroll.rows[name][...] = value
    return unroll.finish(), fields_of(Trajectory(0, [], [], schema.overlap))


def progress_of(plan: Plan, role: str, **change: Any) -> Progress:
    return replace(
        Progress(
            role=role,
            state="running",
            pid=1,
            host="box",
            topology=plan.run_id,
            package=__version__,
            started=time.time(),
        ),
        **change,
    )


async def beat(client: Client, progress: Progress) -> Control:
    answer: Message = await client.request(Progress.KIND, fields_of(progress), timeout_s=PATIENCE_S)
    return parse(Control, answer)


def json_of(answer: Message) -> Any:
    return json.loads(bytes(answer.arrays["json"]))
