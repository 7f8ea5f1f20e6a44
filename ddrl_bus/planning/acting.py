"""Who plays: nodes/actor.py, env_actor.py, inference.py and evaluator.py, as activities."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from ddrl_bus.nodes.batching import Batcher
from ddrl_bus.planning.places import Place
from ddrl_bus.planning.simulate import Activity, Resume, Signal
from ddrl_bus.planning.world import World

EPISODE: Final = 500
"""Steps of an evaluation's episodes where the topology sets no limit."""


def actor(world: World, node: Place) -> Activity:
    """Plays unrolls by its own copy of the weights."""
    costs, learner, thread = world.costs, world.trainer_of(node), world.thread(node)
    weights, queue = world.weights(learner, node.host), world.queue(node)
    send = world.ends("trajectories", node, world.mine(node, world.owners())[0])[0]
    hears = world.ends("weights", learner, node)[1]
    plays, loads, size = costs.at("play", node.envs), costs.at("load"), world.unroll_size(node)
    version = known = yield weights.newer(-1)
    yield thread.work(world.somewhere(plays))
    while True:
        newest = weights.value if world.lockstep or not queue.credit else known
        known = weights.value  # with credit, one unroll is begun before the weights are looked at again
        work = world.noisy(plays) + (loads if newest > version else 0.0) + hears * max(0, newest - version)
        version = newest
        yield thread.work(work)
        yield thread.work(world.noisy(send))
        world.env_steps += world.rows * node.envs
        yield from queue.send((version, node.envs, node), size)
        if world.lockstep:
            yield weights.newer(version)


def env_group(world: World, node: Place, number: int) -> Activity:
    """Steps one group of environments by actions that it asks for."""
    thread, servers = world.thread(node), world.of("inference")
    server = servers[(node.index * node.options.groups + number) % len(servers)]
    ask, steps = world.ends("act", node, server)[0], world.costs.at("step", node.envs)
    question = _question(world, node, number, server)
    queue = world.queue(node) if world.has(node, "trajectories") else None
    send = world.ends("trajectories", node, world.mine(node, world.owners())[0])[0]
    row, oldest = 0, 0
    yield thread.work(world.somewhere(steps))
    while True:
        yield thread.work(world.noisy(ask))
        version = yield question
        oldest = version if row == 0 else oldest
        yield thread.work(world.noisy(steps))
        world.env_steps += node.envs
        row = (row + 1) % world.rows
        if queue and row == 0:
            yield thread.work(world.noisy(send))
            yield from queue.send(((oldest + version) / 2, node.envs, node), world.unroll_size(node))


def _question(world: World, node: Place, number: int, server: Place) -> Callable[[Resume], None]:
    """A round trip: observations there, actions back, with the version that they are by."""
    there, back = world.carry("act", node, server), world.carry("act", server, node)
    up, down = world.size("act"), world.size("actions")

    def asked(answered: Resume) -> None:
        reply = partial(back, down, answered)
        there(up, lambda _: world.asks[server.name](node, number, reply), None)

    return asked


class Predictor:
    """Takes questions, and answers many at a time."""

    def __init__(self, world: World, node: Place) -> None:
        self.world, self.node, self.thread = world, node, world.thread(node)
        self.batcher: Batcher[Any] = Batcher(node.options.batch, node.options.wait)
        self.changed = Signal()
        self.waiting: dict[Any, Resume] = {}
        self.played: dict[Any, tuple[int, float]] = {}
        """(actor, group) → rows of its unroll, and the sum of their versions."""
        self.queue = world.queue(node) if world.has(node, "trajectories") else None

    def ask(self, actor: Place, number: int, reply: Resume) -> None:
        self.waiting[actor.name, number] = reply
        self.world.sim.start(self._arrive(actor, number))

    def _arrive(self, actor: Place, number: int) -> Activity:
        world, key = self.world, (actor.name, number)
        yield self.thread.work(
            world.noisy(world.ends("act", actor, self.node)[1] + world.costs.at("asked", actor.envs))
        )
        rows, versions = self.played.get(key, (0, 0.0))
        if self.queue and rows == world.rows:
            self.played[key] = (0, 0.0)
            owner = world.owners()[0]
            yield self.thread.work(world.noisy(world.ends("trajectories", self.node, owner)[0]))
            yield from self.queue.send((versions / rows, actor.envs, actor), world.unroll_size(actor))
        self.batcher.add(key, actor.envs, world.sim.now)
        self.changed.notify()

    def predict(self) -> Activity:
        world, sim, costs = self.world, self.world.sim, self.world.costs
        learner = world.trainer_of(self.node)
        weights, hears = world.weights(learner, self.node.host), world.ends("weights", learner, self.node)[1]
        version = yield weights.newer(-1)
        envs = {actor.name: actor.envs for actor in world.of("actor")}
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
            yield self.thread.work(world.noisy(work))
            for key in keys:
                rows, versions = self.played.get(key, (0, 0.0))
                self.played[key] = rows + 1, versions + version
                self.waiting.pop(key)(version)


def evaluator(world: World, node: Place) -> Activity:
    """Episodes as long as may be, as those of a policy that has learnt."""
    thread = world.thread(node)
    steps = world.plan.env.max_episode_steps or EPISODE
    while True:
        yield world.sim.sleep(node.options.every)
        yield thread.work(world.noisy(steps * world.costs.at("evaluate")))
