"""What simulated nodes share: threads, machines, the ways between nodes, weights, and what is counted."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ddrl_bus.algos import algorithm
from ddrl_bus.planning.costs import Costs, Strain
from ddrl_bus.planning.places import Place, Setting, placed, stepped
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
    Simulation,
    Thread,
    Wire,
)
from ddrl_bus.topology.plan import Plan
from ddrl_bus.transport.links.latest import SHARE_FROM

NOISE: Final = 0.1
"""Every piece of work takes up to so much more or less: what is exactly alike would march in step."""
Ask = Callable[[Place, int, Resume], None]
"""(actor, group, what to call with the version that was acted by)."""


@dataclass
class Machine:
    cpu: Cpu
    wire: Wire
    strain: Strain


class World:
    """A topology's nodes before any of them does anything.

    Raises:
        UsageError: `setting` counts a group that the topology does not have.
    """

    def __init__(self, plan: Plan, costs: Costs, setting: Setting) -> None:
        self.plan, self.costs, self.setting = plan, costs, setting
        self.sim = Simulation()
        self._random = random.Random(setting.seed).random
        self.nodes = list(placed(plan, setting))
        self._of: dict[str, list[Place]] = defaultdict(list)
        for node in self.nodes:
            self._of[node.kind].append(node)
        self.machines = {host: self._machine(host) for host in dict.fromkeys(node.host for node in self.nodes)}
        self.threads: dict[str, Thread] = {}
        """By process."""
        self.trainers: dict[str, Thread] = {}
        """By learner."""
        self.kinds: dict[str, list[Thread]] = defaultdict(list)
        """Kind of process, as of a trial → its threads."""
        self._count()
        self._sizes()
        self._meet()

    def _count(self) -> None:
        self.bytes: dict[str, float] = defaultdict(float)
        self.env_steps = self.updates = 0
        self.lag = self.lagged = 0.0
        """Sum of the versions that rows were behind when they were trained on, and how many."""

    def _sizes(self) -> None:
        algo: Any = self.plan.algo
        self.windows = algorithm(self.plan.algo_name).windows(algo)
        self.rows: int = self.windows.rows - self.windows.overlap if self.windows else algo.unroll
        """New ones of an unroll."""
        self.lockstep = self.plan.links["trajectories"].max_lag == 0
        self.batch: int = algo.batch
        if self.lockstep and self.setting.counts:  # a round of all is a batch
            self.batch = sum(actor.options.envs for actor in self.of("actor")) // len(self.owners())

    def _meet(self) -> None:
        """Where nodes meet."""
        learners, servers = self.of("learner"), self.of("param_server")
        self.queues = {node.name: QueueIn(self.sim) for node in self.owners()}
        self.questions = {node.name: Mailbox(self.sim) for node in [*self.of("replay"), *servers]}
        self.asks: dict[str, Ask] = {}
        """Of each inference node, what questions are put to."""
        self.barrier = Barrier(self.sim, len(learners)) if len(learners) > 1 and not servers else None
        self._heard: dict[tuple[str, str], Latest] = {}
        self._published: dict[str, int] = {}
        self._under_way: set[tuple[str, str]] = set()
        rate = self.plan.links["weights"].rate if "weights" in self.plan.links else None
        self._pace = {node.name: Wire(self.sim, bandwidth=rate or math.inf) for node in learners}
        self._audiences: dict[str, tuple[float, dict[str, int]]] = {}

    def _machine(self, host: str) -> Machine:
        cores = self.setting.cores or self.costs.cores
        strain = self.costs.strain(len({node.process for node in self.nodes if node.host == host}) / cores)
        cpu = Cpu(self.sim, cores, self.setting.others, strain.besides)
        return Machine(cpu, Wire(self.sim, self.setting.latency, self.setting.bandwidth), strain)

    # ---- who

    def of(self, kind: str) -> list[Place]:
        return self._of[kind]

    def owners(self) -> list[Place]:
        """Whoever takes in unrolls of actors of its own, or of all."""
        return self.of("replay" if "samples" in self.plan.links else "learner")

    def mine(self, node: Place, others: Sequence[Place]) -> list[Place]:
        """Those of the others that a link joins it to: in a bundle the one of its index."""
        return [
            other for other in others if not node.bundle or node.bundle != other.bundle or node.index == other.index
        ]

    def trainer_of(self, node: Place) -> Place:
        """The learner whose weights it plays."""
        return self.mine(node, self.of("learner"))[0]

    def has(self, node: Place, link: str) -> bool:
        found = self.plan.links.get(link)
        return found is not None and node.group in found.sources + found.targets

    # ---- work

    def thread(self, node: Place) -> Thread:
        """Of its process: Python's lock lets one of them go on at a time."""
        if node.process not in self.threads:
            self.threads[node.process] = self._thread(node, node.bundle or node.kind)
        return self.threads[node.process]

    def trainer(self, node: Place) -> Thread:
        """On which a learner's network is trained."""
        if node.name not in self.trainers:
            self.trainers[node.name] = self._thread(node, node.bundle or "trainer")
        return self.trainers[node.name]

    def trained(self, node: Place, seconds: float) -> Activity:
        """So much work on a learner's network, which its event loop keeps from Python's lock meanwhile."""
        trainer, thread = self.trainer(node), self.thread(node)
        before = thread.done
        yield trainer.work(self.noisy(seconds))
        yield trainer.stall(self.machines[node.host].strain.locked * (thread.done - before))

    def _thread(self, node: Place, kind: str) -> Thread:
        machine = self.machines[node.host]
        thread = Thread(self.sim, machine.cpu, machine.strain.levels.get(kind, 1.0))
        self.kinds[kind].append(thread)
        return thread

    def noisy(self, seconds: float) -> float:
        return seconds * (1 + NOISE * (2 * self._random() - 1))

    def somewhere(self, seconds: float) -> float:
        """What is left of a piece of work that began some time ago: not all begin at once."""
        return seconds * self._random()

    # ---- ways

    def carry(self, link: str, a: Place, b: Place) -> Carry:
        """The way from a to b, on which bytes are counted."""
        near, wire, hop = a.host == b.host, self.machines[a.host].wire, self.machines[a.host].strain.hop

        def carried(size: float, arrived: Resume, value: Any) -> None:
            self.bytes[link] += size
            if near:
                self.sim.at(self.sim.now + hop, arrived, value)
            else:
                wire.send(size, arrived, value)

        return carried

    def ends(self, link: str, a: Place, b: Place) -> tuple[float, float]:
        """Seconds of a message at both ends."""
        if a.process == b.process:
            half = self.costs.at("inside") / 2
            return half, half
        return self.costs.links.get(link, (0.0, 0.0))

    def size(self, what: str, columns: float = 1.0, measured: float = 1.0) -> float:
        return self.costs.sizes.get(what, 0.0) * columns / measured

    def unroll_size(self, actor: Place) -> float:
        measured = next(node.options for node in self.plan.nodes.values() if node.kind == "actor")
        return self.size("trajectories", actor.envs, stepped(self.plan, measured))

    def queue(self, node: Place) -> QueueOut:
        """The unrolls' way from a node to whoever takes them in."""
        owners, link = self.mine(node, self.owners()), self.plan.links["trajectories"]
        ways = [(self.queues[o.name], self.carry("trajectories", node, o), self._back(o, node)) for o in owners]
        return QueueOut(self.sim, ways, link.window, link.rate)

    def _back(self, a: Place, b: Place) -> float:
        return self.machines[a.host].strain.hop if a.host == b.host else self.setting.latency

    # ---- weights

    def weights(self, learner: Place, host: str) -> Latest:
        """What is heard on this host of the weights of a learner."""
        key = learner.name if "gradients" in self.plan.links or learner.bundle else "", host
        if key not in self._heard:
            self._heard[key] = Latest(self.sim)
        return self._heard[key]

    def publish(self, node: Place, version: int, thread: Thread) -> Activity:
        """To all that listen, a copy for each."""
        if node.name not in self._audiences:
            self._audiences[node.name] = self._audience(node)
        cost, listeners = self._audiences[node.name]
        yield thread.work(self.noisy(cost))
        self._published[node.name] = version
        for host, number in listeners.items():
            if host == node.host:
                shared = self.size("weights") >= SHARE_FROM
                self.bytes["weights"] += 0.0 if shared else self.size("weights") * number
                self.sim.at(self.sim.now + self.machines[host].strain.hop, self.weights(node, host).heard, version)
            elif (node.name, host) not in self._under_way:
                self._ship(node, host, number)

    def _ship(self, node: Place, host: str, number: int) -> None:
        """Send the newest weights to another host, once for all that listen there; newer ones wait meanwhile."""
        size, version = self.size("weights"), self._published[node.name]
        self._under_way.add((node.name, host))
        self.bytes["weights"] += size * number

        def arrived(_: Any) -> None:
            self._under_way.discard((node.name, host))
            self.weights(node, host).heard(version)
            if self._published[node.name] > version:
                self._ship(node, host, number)

        wire = self.machines[node.host].wire
        self._pace[node.name].send(size, lambda _: wire.send(size, arrived))

    def _audience(self, node: Place) -> tuple[float, dict[str, int]]:
        """Seconds that it takes to publish, and host → who listens there."""
        targets = self.plan.links["weights"].targets
        listening = self.mine(node, [other for other in self.nodes if other.group in targets])
        outside = sum(other.process != node.process for other in listening)
        cost = self.costs.at("inside") / 2 if outside < len(listening) else 0.0
        if outside:
            cost += self.costs.links["weights"][0] + self.costs.at("subscriber") * (outside - 1)
        return cost, Counter(other.host for other in listening)
