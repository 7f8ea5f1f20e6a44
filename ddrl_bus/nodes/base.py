"""What every node is: a life cycle, a heartbeat, a thread for heavy work, and its link ends.

    NEW ─→ STARTING ─→ RUNNING ─→ DRAINING ─→ STOPPED          any of them ─→ FAILED

`Node.live` is a whole life. The event loop never blocks: environments and networks run through `compute`, one thread
per node, so that a network is touched by one thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import numpy as np

from ddrl_bus import __version__, algos
from ddrl_bus.algos.base import Algorithm, Windows
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import RemoteError, UnreachableError, UsageError, first
from ddrl_bus.experience import Unrolls, UnrollSchema
from ddrl_bus.messages import Control, Evaluation, NodeState, Progress, Replica, parse
from ddrl_bus.metrics import shares
from ddrl_bus.nodes import access
from ddrl_bus.nodes.reports import reported
from ddrl_bus.topology.exposure import insecure_links
from ddrl_bus.topology.plan import NodePlan, Plan, Port
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger, read
from ddrl_bus.transport.links import Client, Publisher, Receiver, Sender, Server, Subscriber
from ddrl_bus.transport.memory import MemoryHub
from ddrl_bus.transport.wire import Array

if TYPE_CHECKING:
    from ddrl_bus.envs import EnvConfig

HEARTBEAT_S: Final = 0.5
"""Application heartbeat: it comes from the event loop, so a node whose loop hangs goes silent."""
ANSWER_S: Final = 2.0
"""How long a heartbeat waits for the controller before it is given up; training goes on without one."""
WARN_S: Final = 60.0
GOLDEN: Final = (5**0.5 - 1) / 2
KINDS: Final = {
    "actor": "Actor",
    "learner": "Learner",
    "evaluator": "Evaluator",
    "controller": "Controller",
    "inference": "Inference",
    "param_server": "ParamServer",
    "replay": "Replay",
    "relay": "Relay",
}
"""Kind → class, in the module of that name; it is imported when a node of the kind is made."""
ROLES: Final = ("controller", "learner", "actor", "evaluator", "inference", "param_server", "replay", "relay")
"""Order is part of every seed: append only."""

TRANSITIONS: Final[dict[NodeState, frozenset[NodeState]]] = {
    "new": frozenset({"starting", "failed"}),
    "starting": frozenset({"running", "draining", "failed"}),
    "running": frozenset({"draining", "failed"}),
    "draining": frozenset({"stopped", "failed"}),
    "stopped": frozenset(),
    "failed": frozenset(),
}
T = TypeVar("T")


class Node(ABC):
    """One life of one node. A subclass writes `start` and `run`.

    Args:
        hub: joins nodes of one process over `memory://`.
        inline: `compute` runs in the event loop itself, for breakpoints and for runs that repeat exactly.
    """

    role: ClassVar[str]

    def __init__(
        self, plan: Plan, name: str, run_dir: Path, epoch: int, hub: MemoryHub | None = None, *, inline: bool = False
    ) -> None:
        self.plan = plan
        self.node: NodePlan = plan.node(name)
        self.name = name
        self.run_dir = run_dir
        self.epoch = epoch
        self.log = logging.getLogger(f"ddrl_bus.{name}")
        folder = run_dir / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        self._untold = self._lives_to_tell(folder)
        self.ledger = Ledger(folder / f"{name}@{epoch:016x}.page")
        self.bus = Bus(name, epoch, self.ledger, hub, access.guard(plan, name, self.ledger))
        self.ports: dict[str, Port] = plan.ports(name)
        self.state: NodeState = "new"
        self.control = Control()
        self.control_changed = asyncio.Event()
        self.draining = asyncio.Event()
        self.gauges: dict[str, float] = {}
        self.evaluation: Evaluation | None = None
        self.replica: Replica | None = None
        self.done: str | None = None
        self._report = asyncio.Event()
        self._unanswered = 0
        self._started = time.time()
        self._started_up = False
        self._inline = inline
        self._idle = self.ledger.counter("time", "idle")
        self._idle_since = self._busy = 0
        self._busy_lock = threading.Lock()
        self._thread = ThreadPoolExecutor(self.threads(), thread_name_prefix=f"{name}-compute")

    # ---- what a role writes

    @abstractmethod
    async def start(self) -> None:
        """Open link ends and make what `run` needs."""

    @abstractmethod
    async def run(self) -> None:
        """Work until `draining` is set, then finish what was begun and return."""

    def gauge(self) -> dict[str, float]:
        """Figures of this moment, for people."""
        return {}

    def threads(self) -> int:
        """Pieces of work that may run at a time."""
        return 1

    # ---- what every role has

    def enter(self, state: NodeState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"{self.name}: no way from {self.state} to {state}")
        self.log.info("state=%s was=%s", state, self.state)
        self.state = state
        self._report.set()

    @cached_property
    def algorithm(self) -> type[Algorithm[Any]]:
        return algos.algorithm(self.plan.algo_name)

    @cached_property
    def env(self) -> EnvConfig:
        from ddrl_bus import envs  # gymnasium, which controllers and relays do without

        return envs.EnvConfig(**self.plan.env.model_dump())

    @cached_property
    def spaces(self) -> Spaces:
        from ddrl_bus import envs

        return envs.describe(self.env)

    @cached_property
    def schema(self) -> UnrollSchema:
        """The arrays of an unroll, the same at the actor that writes it and the learner or replay that checks it."""
        return unroll_schema(self.algorithm, self.plan.algo, self.spaces)

    @cached_property
    def windows(self) -> Windows:
        """What a replay node draws, and how.

        Raises:
            UsageError: for an algorithm that learns from unrolls as they come.
        """
        windows = self.algorithm.windows(self.plan.algo)
        if windows is None:
            raise UsageError(f"{self.name}: {self.plan.algo_name} replays nothing, expected an algorithm that does")
        return windows

    @cached_property
    def windows_schema(self) -> UnrollSchema:
        """The arrays of the windows that a replay node draws, the same at the learner that trains on them."""
        return self.schema.windows(self.windows.length)

    def unrolls_of(self, envs: int) -> Unrolls:
        """The unrolls of a new vector of environments."""
        return Unrolls(self.schema, envs, partial(self.algorithm.priorities, self.plan.algo))

    def seeds(self, restart: int = 0, stream: int = 0) -> np.random.SeedSequence:
        """Seeds of this life of this node."""
        index = number_of(self.plan, self.node)
        return node_seeds(self.plan.seed, self.role, index, (self.epoch >> 32) + restart, stream)

    def submit(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Queue `work(*args)` on this node's thread; it runs as soon as what was queued before is done."""
        if self._inline:
            return asyncio.ensure_future(_inline(work, args))
        return asyncio.get_running_loop().run_in_executor(self._thread, self._on_thread, work, args)

    async def compute(self, work: Callable[..., T], *args: Any) -> T:
        """`work(*args)` on this node's thread."""
        return await self.submit(work, *args)

    def _on_thread(self, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        with self._busy_lock:
            self._busy += 1
            if self._busy == 1 and self._idle_since:
                self._idle.add(time.perf_counter_ns() - self._idle_since)
        try:
            return work(*args)
        finally:
            with self._busy_lock:
                self._busy -= 1
                self._idle_since = time.perf_counter_ns()

    async def until(self, waiting: Coroutine[Any, Any, T], *events: asyncio.Event) -> T | None:
        """What `waiting` gives, or None once one of `events` is set. For waits that cancellation does not harm."""
        task = asyncio.ensure_future(waiting)
        others = [asyncio.ensure_future(event.wait()) for event in events]
        try:
            await asyncio.wait((task, *others), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for future in (task, *others):
                future.cancel()

    def report(self) -> None:
        """Send the next heartbeat now."""
        self._report.set()

    # ---- ports by link name

    def _port(self, link: str) -> Port:
        port = self.ports.get(link)
        if port is None:
            raise UsageError(f"{self.name}: the topology gives it no link {link!r}; it has {', '.join(self.ports)}")
        return port

    def open_sender(self, link: str) -> Sender:
        port = self._port(link)
        return self.bus.sender(link, port.peers, port.link.on_loss, port.link.codec, port.link.rate)

    def open_receiver(self, link: str) -> Receiver:
        port = self._port(link)
        return self.bus.receiver(link, port.binds, port.link.window, port.link.on_loss)

    def open_publisher(self, link: str) -> Publisher:
        port = self._port(link)
        return self.bus.publisher(link, port.binds, port.link.codec, port.link.rate)

    def open_subscriber(self, link: str, publisher: str | None = None) -> Subscriber:
        """Towards this publisher; without one, towards the only one there is."""
        peers = self._port(link).peers
        (address,) = peers.values() if publisher is None else (peers[publisher],)
        return self.bus.subscriber(link, address)

    def open_client(self, link: str, server: int = 0) -> Client:
        """Towards the server of this number, counted round where there are fewer."""
        addresses = list(self._port(link).peers.values())
        return self.bus.client(link, addresses[server % len(addresses)])

    def open_server(self, link: str) -> Server:
        return self.bus.server(link, self._port(link).binds)

    # ---- the controller's side of a node's life

    def progress(self, error: str | None = None) -> Progress:
        return Progress(
            role=self.role,
            state=self.state,
            pid=os.getpid(),
            host=platform.node(),
            topology=self.plan.run_id,
            package=__version__,
            started=self._started,
            counters=self.ledger.snapshot(),
            earlier=dict(islice(self._untold.items(), 1)),
            gauges=self.gauges,
            evaluation=self.evaluation,
            replica=self.replica,
            done=self.done,
            error=error,
        )

    async def _follow(self) -> None:
        """Do what the controller wants, as far as it concerns every node alike."""
        control = self.open_subscriber(Control.KIND)
        while True:
            self._obey(parse(Control, await control.next()))

    def _obey(self, control: Control) -> None:
        self.control = control
        self.control_changed.set()
        if self.name in control.draining and not self.draining.is_set():
            self.log.info("drain reason=%s", control.reason)
            self.draining.set()

    async def _heartbeat(self) -> None:
        """Report to the controller until cancelled; it may be away for as long as it likes."""
        before = self.ledger.snapshot()
        while True:
            now = self.ledger.snapshot()
            if self._started_up:
                self.gauges = {**self.gauge(), **shares(now, before)}
            before = now
            self._report.clear()
            await self._beat()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._report.wait()

    async def _beat(self, error: str | None = None) -> None:
        progress = self.progress(error)
        try:
            answer = await self._controller.request(Progress.KIND, *reported(progress), timeout_s=ANSWER_S)
        except UnreachableError:
            self._unanswered += 1
            if self._unanswered.bit_count() == 1:  # the first, and ever more seldom
                self.log.warning("controller unreachable; going on")
        except RemoteError as refused:
            raise UsageError(str(refused)) from None
        else:
            self._unanswered = 0
            self._obey(parse(Control, answer))
            for life in progress.earlier:
                del self._untold[life]
            if self._untold:
                self.report()

    def _lives_to_tell(self, folder: Path) -> dict[str, dict[str, int]]:
        """Life → ledger of this node's earlier lives, where the controller cannot read them: on another host."""
        if all(node.host == self.node.host for node in self.plan.nodes.values() if node.kind == "controller"):
            return {}
        return {page.stem: read(page) for page in sorted(folder.glob(f"{self.name}@*.page"))}

    @cached_property
    def _controller(self) -> Client:
        (address,) = self._port(Progress.KIND).peers.values()
        return self.bus.client(Progress.KIND, address)

    # ---- a life

    def background(self) -> list[Coroutine[Any, Any, None]]:
        """What goes on beside `run`."""
        return [self._heartbeat(), self._follow()]

    async def live(self, stop: asyncio.Event) -> None:
        """Start, run, drain, and say goodbye.

        Raises:
            Exception: the first that anything in this node raised, as it was.
        """
        try:
            self.enter("starting")
            await self._run_beside(stop)
            self.enter("stopped")
            await self.goodbye()
        except Exception as error:
            self.state = "failed"
            self.log.exception("failed")
            with contextlib.suppress(Exception):  # the error that ended us is the one to show
                await self.goodbye(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._thread.shutdown(wait=True)
            self.bus.close()

    async def goodbye(self, error: str | None = None) -> None:
        """The last report, with the final counters."""
        await self._beat(error)

    async def _run_beside(self, stop: asyncio.Event) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                beside = [tasks.create_task(work) for work in (self._drain_on(stop), self._warn(), *self.background())]
                await self.start()
                self._started_up = True
                if not self.draining.is_set():
                    self.enter("running")
                    await self.run()
                for task in beside:
                    task.cancel()
        except ExceptionGroup as group:
            raise first(group) from None
        if self.state != "draining":  # its share of the run was over by itself, or before it began
            self.enter("draining")

    async def _warn(self) -> None:
        """Say again and again what everybody on the network can read and forge."""
        while links := insecure_links(self.plan, self.name):
            self.log.warning("insecure=%s: in plain text, and open to whoever reaches this network", ",".join(links))
            await asyncio.sleep(WARN_S)

    async def _drain_on(self, stop: asyncio.Event) -> None:
        await self.until(stop.wait(), self.draining)
        self.draining.set()
        self.enter("draining")


def unroll_schema(algorithm: type[Algorithm[Any]], config: Any, spaces: Spaces) -> UnrollSchema:
    """The arrays of an unroll that this algorithm learns from."""
    windows = algorithm.windows(config) or Windows(config.unroll, 0, 0, 0)
    return UnrollSchema(
        (spaces.obs_dtype, spaces.obs_shape),
        (spaces.action_dtype, spaces.action_shape),
        algorithm.record(config, spaces),
        windows.rows,
        algorithm.carried(config, spaces),
        windows.overlap,
        windows.starts,
        min(windows.rows, algorithm.least_rows(config)),
    )


def node_seeds(run: int, role: str, index: int, life: int = 1, stream: int = 0) -> np.random.SeedSequence:
    """`SeedSequence([run, role, index, life, stream])`, from which everything random in a node follows."""
    return np.random.SeedSequence([run, ROLES.index(role), index, life, stream])


def number_of(plan: Plan, node: NodePlan) -> int:
    """Of a node among all of its kind, over all groups; those that were added come after those of the plan."""
    kind = [name for name, other in plan.nodes.items() if other.kind == node.kind]
    return kind.index(node.name) if node.name in plan.nodes else len(kind) + node.index - plan.groups[node.group].count


def places(plan: Plan, actor: NodePlan) -> Array:
    """[N] of an actor's environments among all that the run's actors step, from 0 to 1; 0 of a single one.

    Those of an added actor, of whose number nobody knows, follow the golden ratio: however many come, they lie evenly.
    """
    actors = [node for node in plan.nodes.values() if node.kind == actor.kind]
    counts: list[Any] = [node.options for node in actors]
    if actor not in actors:
        own: Any = actor.options
        number = (number_of(plan, actor) - len(actors)) * own.envs + 1 + np.arange(own.envs)
        return np.asarray(number * GOLDEN % 1, np.float32)
    first = sum(options.envs for options in counts[: actors.index(actor)])
    total = sum(options.envs for options in counts)
    mine: Any = actor.options
    found: Array = np.arange(first, first + mine.envs, dtype=np.float32) / np.float32(max(1, total - 1))
    return found


def node_class(plan: Plan, name: str) -> type[Node]:
    """What to make of a node: its kind says, of learners and actors their ports too, and of learners their trainers."""
    module = plan.node(name).kind
    cls = KINDS[module]
    if module == "learner" and "gradients" in plan.ports(name):
        module, cls = "worker", "Worker"
    elif module == "learner" and "sync" in plan.ports(name):
        module, cls = "replica_learner", "ReplicaLearner"
    elif module == "learner" and getattr(plan.node(name).options, "trainers", 1) != 1:
        module, cls = "parallel_learner", "ParallelLearner"
    if module == "actor" and "act" in plan.ports(name):
        module, cls = "env_actor", "EnvActor"
    found: type[Node] = getattr(import_module(f"ddrl_bus.nodes.{module}"), cls)
    return found


async def serve(
    plan: Plan,
    name: str,
    *,
    run_dir: Path,
    epoch: int,
    hub: MemoryHub | None = None,
    inline: bool = False,
    stop: asyncio.Event,
) -> None:
    """Run one node to its end: until it drained, because the run is over or `stop` was set.

    Raises:
        Exception: the first that anything in it raised, as it was.
    """
    await node_class(plan, name)(plan, name, run_dir, epoch, hub, inline=inline).live(stop)


async def _inline(work: Callable[..., T], args: tuple[Any, ...]) -> T:
    await asyncio.sleep(0)
    return work(*args)
