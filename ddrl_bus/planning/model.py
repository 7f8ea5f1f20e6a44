"""A topology as activities on simulated threads, cores, links and wires: what its nodes do, in which order, and where
they wait. Each activity here follows the node of its name in nodes/.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from ddrl_bus.algos import algorithm
from ddrl_bus.errors import UsageError
from ddrl_bus.nodes.batching import Batcher
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.simulate import (
    Activity,
    Barrier,
    Carry,
    Cpu,
    Latest,
    Mailbox,
    QueueIn,
    QueueOut,
    Resume,
    Signal,
    Simulation,
    Thread,
    Wire,
)
from ddrl_bus.rate_limiter import RateLimiter
from ddrl_bus.topology.plan import Plan

SPARE: Final = 2
"""Batches that a learner holds besides those it is handed ahead: one that fills, one that is trained on."""
NOISE: Final = 0.1
"""Every piece of work takes up to so much more or less: what is exactly alike would march in step."""
EPISODE: Final = 500
"""Steps of an evaluation's episodes where the topology sets no limit."""


@dataclass(frozen=True)
class Setting:
    """Where a topology is to run, as far as its file does not say.

    Args:
        hosts: machines like this one: the first takes everything but actors, the others take these; None: as the
            topology says.
        cores: of each; None: as many as here.
        latency, bandwidth: of the network between them, in seconds and bytes a second.
        counts: group → nodes, in place of the topology's; the groups of its bundle, and in lock-step the batch, follow.
        others: threads of other programs that are busy on each machine.
    """

    hosts: int | None = None
    cores: int | None = None
    latency: float = 100e-6
    bandwidth: float = 1.25e9
    counts: Mapping[str, int] = field(default_factory=dict)
    others: float = 0.0
    seed: int = 1


@dataclass
class Machine:
    cpu: Cpu
    wire: Wire


@dataclass(frozen=True)
class Place:
    """A simulated node."""

    name: str
    kind: str
    index: int
    host: str
    process: str
    options: Any
    bundle: str | None


class Model:
    """A topology, ready to run.

    Raises:
        UsageError: a count of a group that it does not have.
    """

    def __init__(self, plan: Plan, costs: Costs, setting: Setting) -> None:
        self.plan, self.costs, self.setting = plan, costs, setting
        self.sim = Simulation()
        self._random = random.Random(setting.seed).random
        self.nodes = list(self._placed())
        self._kinds: dict[str, list[Place]] = defaultdict(list)
        for node in self.nodes:
            self._kinds[node.kind].append(node)
        self._audiences: dict[str, tuple[float, dict[str, int]]] = {}
        self.machines = {host: self._machine() for host in dict.fromkeys(node.host for node in self.nodes)}
        self.threads: dict[str, Thread] = {}
        self.trainers: dict[str, Thread] = {}
        self.bytes: dict[str, float] = defaultdict(float)
        self.env_steps = self.updates = 0
        self.lag = self.lagged = 0.0
        """Sum of the versions that rows were behind when they were trained on, and how many."""
        algo: Any = plan.algo
        windows = algorithm(plan.algo_name).windows(algo)
        self.rows = windows.rows - windows.overlap if windows else algo.unroll
        """New ones of an unroll."""
        actors = [node for node in self.nodes if node.kind == "actor"]
        self.batch: int = algo.batch
        trajectories = plan.links["trajectories"]
        self.lockstep, self.max_lag = trajectories.max_lag == 0, trajectories.max_lag
        if self.lockstep and setting.counts:  # a round of all is a batch
            self.batch = sum(node.options.envs for node in actors) // len(self.owners())
        self._build()

    # ---- who is where

    def _placed(self) -> Iterator[Place]:
        counts = dict(self.setting.counts)
        if unknown := counts.keys() - self.plan.groups.keys():
            raise UsageError(f"{unknown.pop()}.count: {self.plan.name} has {', '.join(self.plan.groups)}")
        bundles = {options.bundle: counts[name] for name, options in self.plan.groups.items() if name in counts}
        playing = {options.bundle or name for name, options in self.plan.groups.items() if options.kind == "actor"}
        for name, options in self.plan.groups.items():
            count = bundles[options.bundle] if options.bundle in bundles and options.bundle else options.count
            for index in range(counts.get(name, count)):
                host = self._host(options, index, plays=(options.bundle or name) in playing)
                process = f"{options.bundle}-{index}" if options.bundle else f"{name}-{index}"
                yield Place(f"{name}-{index}", options.kind, index, host, process, options, options.bundle)

    def _host(self, options: Any, index: int, *, plays: bool) -> str:
        hosts = self.setting.hosts
        if hosts is None:
            names = options.host or (next(iter(self.plan.hosts)),)
            return str(names[index % len(names)])
        return f"host-{1 + index % (hosts - 1)}" if plays and hosts > 1 else "host-0"

    def _machine(self) -> Machine:
        speeds = list(self.costs.speeds)
        if cores := self.setting.cores:
            each = speeds[-1] / len(speeds)
            speeds = [speeds[k] if k < len(speeds) else each * (k + 1) for k in range(cores)]
        wire = Wire(self.sim, self.setting.latency, self.setting.bandwidth)
        return Machine(Cpu(self.sim, speeds, self.setting.others), wire)

    def of(self, kind: str) -> list[Place]:
        return self._kinds[kind]

    def owners(self) -> list[Place]:
        """Whoever takes in unrolls of actors of its own, or of all."""
        kind = "replay" if "samples" in self.plan.links else "learner"
        return self.of(kind)

    def mine(self, node: Place, others: Sequence[Place]) -> list[Place]:
        """Those of the others that a link joins it to: in a bundle the one of its index."""
        return [
            other for other in others if not node.bundle or node.bundle != other.bundle or node.index == other.index
        ]

    # ---- work, and ways

    def thread(self, node: Place) -> Thread:
        """Of its process: Python's lock lets one of them go on at a time."""
        if node.process not in self.threads:
            self.threads[node.process] = Thread(self.sim, self.machines[node.host].cpu)
        return self.threads[node.process]

    def noisy(self, seconds: float) -> float:
        return seconds * (1 + NOISE * (2 * self._random() - 1))

    def carry(self, link: str, a: Place, b: Place) -> Carry:
        """The way from a to b, on which bytes are counted."""

        def near(size: float, arrived: Resume, value: Any) -> None:
            self.bytes[link] += size
            self.sim.at(self.sim.now, arrived, value)

        def far(size: float, arrived: Resume, value: Any) -> None:
            self.bytes[link] += size
            self.machines[a.host].wire.send(size, arrived, value)

        return near if a.host == b.host else far

    def back(self, a: Place, b: Place) -> float:
        return 0.0 if a.host == b.host else self.setting.latency

    def ends(self, link: str, a: Place, b: Place) -> tuple[float, float, float]:
        """Seconds of a message at both ends, and of a round trip besides."""
        if a.process == b.process:
            half = self.costs.at("inside") / 2
            return half, half, 0.0
        return self.costs.links.get(link, (0.0, 0.0, 0.0))

    def _size(self, what: str, columns: float = 1.0, measured: float = 1.0) -> float:
        return self.costs.sizes.get(what, 0.0) * columns / measured

    # ---- all of it

    def _build(self) -> None:
        self.heard: dict[tuple[str, str], Latest] = {}
        self.published: dict[str, int] = {}
        self._under_way: set[tuple[str, str]] = set()
        queues = {node.name: QueueIn(self.sim) for node in self.owners()}
        self.queues = queues
        learners, servers = self.of("learner"), self.of("param_server")
        replicas = len(learners) > 1 and not servers
        self.barrier = Barrier(self.sim, len(learners)) if replicas else None
        self.questions = {node.name: Mailbox(self.sim) for node in [*self.of("replay"), *servers]}
        self.limiters: dict[str, tuple[RateLimiter, Signal]] = {}
        self.applied: dict[str, int] = dict.fromkeys((node.name for node in servers), 0)
        self.predictors = {node.name: Predictor(self, node) for node in self.of("inference")}
        for node in self.nodes:
            for activity in self._activities(node):
                self.sim.start(activity)

    def _activities(self, node: Place) -> Iterator[Activity]:
        match node.kind:
            case "actor" if "act" in self.plan.links:
                for group in range(node.options.groups):
                    yield self.env_group(node, group)
            case "actor":
                yield self.actor(node)
            case "learner":
                yield from self._learner(node)
            case "inference":
                yield self.predictors[node.name].predict()
            case "replay":
                largest = max(a.options.envs for a in self.of("actor"))
                items = self._items(largest)
                options = node.options
                limits = options.min_size, options.samples_per_insert, options.slack
                limiter = RateLimiter(*limits, insert=items, batch=self.batch)
                limiter.inserted(options.min_size)  # the beginning is left out
                self.limiters[node.name] = limiter, Signal()
                yield self.inserts(node)
                yield self.draws(node)
            case "param_server":
                yield self.param_server(node)
            case "evaluator":
                yield self.evaluator(node)

    def _items(self, envs: int) -> int:
        windows = algorithm(self.plan.algo_name).windows(self.plan.algo)
        return int(windows.starts * envs) if windows else 0

    # ---- weights

    def weights(self, learner: Place, host: str) -> Latest:
        """What is heard on this host of the weights of a learner."""
        key = learner.name if "gradients" in self.plan.links or learner.bundle else "", host
        if key not in self.heard:
            self.heard[key] = Latest(self.sim)
        return self.heard[key]

    def publish(self, node: Place, version: int, thread: Thread) -> Activity:
        """To all that listen, a copy for each."""
        if node.name not in self._audiences:
            self._audiences[node.name] = self._audience(node)
        cost, listeners = self._audiences[node.name]
        yield thread.work(self.noisy(cost))
        self.published[node.name] = version
        for host, number in listeners.items():
            if host == node.host:
                self.bytes["weights"] += self._size("weights") * number
                self.weights(node, host).heard(version)
            elif (node.name, host) not in self._under_way:
                self._ship(node, host, number)

    def _ship(self, node: Place, host: str, number: int) -> None:
        """Send the newest weights to all listeners of another host; newer ones wait until these have left."""
        size, version = self._size("weights") * number, self.published[node.name]
        self._under_way.add((node.name, host))
        self.bytes["weights"] += size

        def arrived(_: Any) -> None:
            self._under_way.discard((node.name, host))
            self.weights(node, host).heard(version)
            if self.published[node.name] > version:
                self._ship(node, host, number)

        self.machines[node.host].wire.send(size, arrived)

    def _audience(self, node: Place) -> tuple[float, dict[str, int]]:
        """Seconds that it takes to publish, and host → who listens there."""
        targets = self.plan.links["weights"].targets
        listening = self.mine(node, [other for other in self.nodes if other.name.rsplit("-", 1)[0] in targets])
        outside = sum(other.process != node.process for other in listening)
        cost = self.costs.at("inside") / 2 if outside < len(listening) else 0.0
        if outside:
            cost += self.costs.links["weights"][0] + self.costs.at("subscriber") * (outside - 1)
        return cost, Counter(other.host for other in listening)

    def trainer_of(self, node: Place) -> Place:
        """The learner whose weights it plays."""
        return self.mine(node, self.of("learner"))[0]

    # ---- nodes/actor.py

    def actor(self, node: Place) -> Activity:
        costs, envs = self.costs, node.options.envs
        learner, thread = self.trainer_of(node), self.thread(node)
        weights, owners = self.weights(learner, node.host), self.mine(node, self.owners())
        send = self.ends("trajectories", node, owners[0])[0]
        hears = self.ends("weights", learner, node)[1]
        queue = QueueOut(self.sim, self.ways("trajectories", node, owners), self.plan.links["trajectories"].window)
        plays, loads, size = costs.at("play", envs), costs.at("load"), self.unroll_size(node)
        version = known = yield weights.newer(-1)
        yield thread.work(plays * self._random())
        while True:
            newest = weights.value if self.lockstep or not queue.credit else known
            known = weights.value  # with credit, one unroll is begun before the weights are looked at again
            work = self.noisy(plays) + (loads if newest > version else 0.0) + hears * max(0, newest - version)
            version = newest
            yield thread.work(work)
            yield thread.work(self.noisy(send))
            self.env_steps += self.rows * envs
            yield from queue.send((version, envs, node), size)
            if self.lockstep:
                yield weights.newer(version)

    def unroll_size(self, node: Place) -> float:
        groups = node.options.groups if "act" in self.plan.links else 1
        measured: Any = next(node.options for node in self.plan.nodes.values() if node.kind == "actor")
        return self._size("trajectories", node.options.envs // groups, measured.envs // groups)

    def ways(self, link: str, node: Place, receivers: Sequence[Place]) -> list[tuple[QueueIn, Carry, float]]:
        return [(self.queues[r.name], self.carry(link, node, r), self.back(r, node)) for r in receivers]

    # ---- nodes/env_actor.py

    def env_group(self, node: Place, number: int) -> Activity:
        costs, thread, groups = self.costs, self.thread(node), node.options.groups
        envs = node.options.envs // groups
        servers = self.of("inference")
        server = servers[(node.index * groups + number) % len(servers)]
        predictor, (ask, _, trip) = self.predictors[server.name], self.ends("act", node, server)
        there, back = self.carry("act", node, server), self.carry("act", server, node)
        steps, mine = costs.at("step", envs), "trajectories" in self.ports(node)
        owners = self.mine(node, self.owners())
        window = self.plan.links["trajectories"].window
        queue = QueueOut(self.sim, self.ways("trajectories", node, owners), window) if mine else None
        send = self.ends("trajectories", node, owners[0])[0]
        size = (
            self._size("act", envs, self._measured_envs(node)),
            self._size("actions", envs, self._measured_envs(node)),
        )
        unroll, row, oldest = self.unroll_size(node), 0, 0

        def ask_for(question: Callable[[Resume], None], answered: Resume) -> None:
            there(size[0], question, partial(back, size[1], answered))

        yield thread.work(steps * self._random())
        while True:
            yield thread.work(self.noisy(ask))
            version = yield partial(ask_for, partial(predictor.asked, (node, number, envs)))
            if trip:
                yield self.sim.sleep(self.noisy(trip))
            oldest = version if row == 0 else oldest
            yield thread.work(self.noisy(steps))
            self.env_steps += envs
            row = (row + 1) % self.rows
            if queue and row == 0:
                yield thread.work(self.noisy(send))
                yield from queue.send(((oldest + version) / 2, envs, node), unroll)

    def _measured_envs(self, node: Place) -> float:
        return float(node.options.envs // node.options.groups)

    def ports(self, node: Place) -> set[str]:
        group = node.name.rsplit("-", 1)[0]
        return {name for name, link in self.plan.links.items() if group in link.sources + link.targets}

    # ---- nodes/learner.py, replica_learner.py, worker.py

    def _learner(self, node: Place) -> Iterator[Activity]:
        self.trainers[node.name] = Thread(self.sim, self.machines[node.host].cpu)
        slots, ready = Mailbox(self.sim), Mailbox(self.sim)
        replayed = "samples" in self.plan.links
        worker = "gradients" in self.plan.links
        for _ in range(1 if worker else SPARE + (node.options.prefetch if replayed else 1)):
            slots.put(None)
        state = {"version": 0, "filled": 0}
        yield self.samples(node, slots, ready) if replayed else self.intake(node, slots, ready, state)
        yield self.worker(node, slots, ready, state) if worker else self.train(node, slots, ready, state)

    def intake(self, node: Place, slots: Mailbox, ready: Mailbox, state: dict[str, int]) -> Activity:
        """nodes/batches.py"""
        thread, queue, columns = self.thread(node), self.queues[node.name], 0
        takes = self.ends("trajectories", self.mine(node, self.of("actor"))[0], node)[1]
        copies = self.costs.at("copy")
        versions: list[tuple[float, int]] = []
        yield slots.take()
        while True:
            version, envs, _ = yield from queue.take()
            yield thread.work(self.noisy(takes + copies))
            if self.max_lag is not None and state["version"] + state["filled"] - version > self.max_lag:
                continue
            columns += envs
            versions.append((version, envs))
            while columns >= self.batch:
                columns -= self.batch
                state["filled"] += 1
                ready.put((versions, self.batch))
                versions = [(version, columns)] if columns else []
                yield slots.take()

    def samples(self, node: Place, slots: Mailbox, ready: Mailbox) -> Activity:
        """nodes/samples.py"""
        thread, shards = self.thread(node), self.mine(node, self.of("replay"))
        count = self.batch / len(shards)
        copies = self.costs.at("copy") * len(shards)
        answers = Mailbox(self.sim)
        size = self._size("sample", count, self.batch), self._size("samples", count, self.batch)
        while True:
            yield slots.take()
            slowest = 0.0
            for shard in shards:
                ask, _, trip = self.ends("samples", node, shard)
                slowest = max(slowest, trip)
                yield thread.work(self.noisy(ask))
                back = partial(self.carry("samples", shard, node), size[1], answers.put)
                there = self.carry("samples", node, shard)
                there(size[0], self.questions[shard.name].put, (count, back))
            for _ in shards:
                yield answers.take()
            if slowest:
                yield self.sim.sleep(self.noisy(slowest))
            yield thread.work(self.noisy(copies))
            ready.put(([], self.batch))

    def _trained_on(self, versions: Sequence[tuple[float, int]], version: int) -> None:
        self.updates += 1
        self.lag += sum((version - played) * columns for played, columns in versions)
        self.lagged += sum(columns for _, columns in versions)

    def train(self, node: Place, slots: Mailbox, ready: Mailbox, state: dict[str, int]) -> Activity:
        trainer, thread = self.trainers[node.name], self.thread(node)
        learners = len(self.of("learner"))
        sums, (cpu, wall) = self.costs.sizes.get("sums", 0), self.costs.sum_of(learners)
        cores = len(self.costs.speeds)
        works = self.costs.at("update", self.batch) + sums * cpu
        waits = sums * max(0.0, wall - cpu * learners / min(cores, learners))
        votes = 2 * (learners - 1) * self.costs.links["weights"][1] if learners > 1 else 0.0
        first = learners == 1 or node.index == 0 or node.bundle is not None
        if first:
            yield from self.publish(node, 0, thread)
        while True:
            versions, _ = yield ready.take()
            if self.barrier:
                yield thread.work(self.noisy(votes))
                yield self.barrier.meet
            self._trained_on(versions, state["version"])
            state["filled"] -= 1
            yield trainer.work(self.noisy(works))
            if waits:
                yield self.sim.sleep(self.noisy(waits))
                yield self.barrier.meet if self.barrier else self.sim.sleep(0.0)
            state["version"] += 1
            slots.put(None)
            if first and state["version"] % node.options.publish_every == 0:
                self.sim.start(self.publish(node, state["version"], thread))

    def worker(self, node: Place, slots: Mailbox, ready: Mailbox, state: dict[str, int]) -> Activity:
        trainer, thread = self.trainers[node.name], self.thread(node)
        servers, answers = self.of("param_server"), Mailbox(self.sim)
        part = self.costs.sizes.get("gradients", 0.0), self.costs.sizes.get("parameters", 0.0)
        asked, version = 0, 0
        while True:
            for server in servers:
                ask, _, trip = self.ends("gradients", node, server)
                yield thread.work(self.noisy(ask))
                back = partial(self.carry("gradients", server, node), part[1], answers.put)
                there = self.carry("gradients", node, server)
                there(part[0], self.questions[server.name].put, (bool(asked), version, back))
            for _ in servers:
                version = max(version, (yield answers.take()))
            yield self.sim.sleep(trip)
            asked = 1
            state["version"] = version
            self.sim.start(self.publish(node, version, thread))
            yield trainer.work(self.noisy(self.costs.at("load")))
            yield ready.take()
            yield trainer.work(self.noisy(self.costs.at("update", self.batch)))
            state["filled"] -= 1
            slots.put(None)
            self.updates += 1

    # ---- nodes/param_server.py

    def param_server(self, node: Place) -> Activity:
        thread, box = self.thread(node), self.questions[node.name]
        serves, applies, first = self.costs.links["gradients"][1], self.costs.at("apply"), node.index == 0
        while True:
            gradient, version, back = yield box.take()
            yield thread.work(self.noisy(serves + applies * gradient))
            if gradient:
                if first:
                    self.lag += self.applied[node.name] - version
                    self.lagged += 1
                self.applied[node.name] += 1
            back(self.applied[node.name])

    # ---- nodes/replay.py

    def inserts(self, node: Place) -> Activity:
        thread, queue = self.thread(node), self.queues[node.name]
        senders = self.of("inference") if "act" in self.plan.links else self.of("actor")
        takes = self.ends("trajectories", self.mine(node, senders)[0], node)[1] + self.costs.at("insert")
        limiter, changed = self.limiters[node.name]
        largest = self._items(max(a.options.envs for a in self.of("actor")))
        while True:
            while limiter.insert_waits(largest):
                yield changed.wait
            _, envs, _ = yield from queue.take()
            limiter.inserted(self._items(envs))
            yield thread.work(self.noisy(takes))
            changed.notify()

    def draws(self, node: Place) -> Activity:
        thread, box = self.thread(node), self.questions[node.name]
        limiter, changed = self.limiters[node.name]
        serves = self.ends("samples", self.mine(node, self.of("learner"))[0], node)[1]
        while True:
            count, back = yield box.take()
            while limiter.sample_waits(max(1, round(count))):
                yield changed.wait
            limiter.sampled(round(count))
            yield thread.work(self.noisy(serves + self.costs.at("draw", count) + self.costs.at("prioritise", count)))
            changed.notify()
            back(None)

    # ---- nodes/evaluator.py

    def evaluator(self, node: Place) -> Activity:
        """Episodes as long as may be, as those of a policy that has learnt."""
        thread = self.thread(node)
        steps = self.plan.env.max_episode_steps or EPISODE
        while True:
            yield self.sim.sleep(node.options.every)
            yield thread.work(self.noisy(steps * self.costs.at("evaluate")))


class Predictor:
    """nodes/inference.py: takes questions, and answers many at a time."""

    def __init__(self, model: Model, node: Place) -> None:
        self.model, self.node, self.thread = model, node, model.thread(node)
        self.batcher: Batcher[Any] = Batcher(node.options.batch, node.options.wait)
        self.changed = Signal()
        self.waiting: dict[Any, Callable[[Any], None]] = {}
        self.played: dict[Any, tuple[int, float]] = {}
        self.version = 0
        if "trajectories" in model.ports(node):
            window, owners = model.plan.links["trajectories"].window, model.mine(node, model.owners())
            self.queue: QueueOut | None = QueueOut(model.sim, model.ways("trajectories", node, owners), window)
        else:
            self.queue = None

    def asked(self, who: tuple[Place, int, int], reply: Callable[[Any], None]) -> None:
        self.waiting[who[0].name, who[1]] = reply
        self.model.sim.start(self._arrive(*who))

    def _arrive(self, actor: Place, number: int, envs: int) -> Activity:
        model, key = self.model, (actor.name, number)
        serves = model.ends("act", actor, self.node)[1]
        yield self.thread.work(model.noisy(serves + model.costs.at("asked", envs)))
        if self.queue:
            rows, versions = self.played.get(key, (0, 0.0))
            if rows == model.rows:
                self.played[key] = (0, 0.0)
                owner = model.owners()[0]
                yield self.thread.work(model.noisy(model.ends("trajectories", self.node, owner)[0]))
                yield from self.queue.send((versions / rows, envs, actor), model.unroll_size(actor))
        self.batcher.add(key, envs, model.sim.now)
        self.changed.notify()

    def predict(self) -> Activity:
        model, sim, costs = self.model, self.model.sim, self.model.costs
        learner = model.trainer_of(self.node)
        weights, hears = model.weights(learner, self.node.host), model.ends("weights", learner, self.node)[1]
        version = yield weights.newer(-1)
        envs = {actor.name: actor.options.envs // actor.options.groups for actor in model.of("actor")}
        while True:
            keys = self.batcher.take(sim.now)
            if not keys:
                if (due := self.batcher.due_at) is not None:
                    sim.at(due, self.changed.notify)
                yield self.changed.wait
                continue
            work = costs.at("infer", sum(envs[name] for name, _ in keys)) + hears * max(0, weights.value - version)
            work += costs.at("load") if weights.value > version else 0.0
            version = weights.value
            yield self.thread.work(model.noisy(work))
            for key in keys:
                if self.queue:
                    rows, versions = self.played.get(key, (0, 0.0))
                    self.played[key] = rows + 1, versions + version
                self.waiting.pop(key)(version)
