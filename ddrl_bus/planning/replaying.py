"""What is replayed: nodes/replay.py, as activities."""

from __future__ import annotations

from collections.abc import Iterator

from ddrl_bus.planning.places import Place
from ddrl_bus.planning.simulate import Activity, Signal
from ddrl_bus.planning.world import World
from ddrl_bus.rate_limiter import RateLimiter


def replay(world: World, node: Place) -> Iterator[Activity]:
    """What a replay does at the same time; it is filled as far as it must be before anything is drawn."""
    options, largest = node.options, _items(world, max(actor.envs for actor in world.of("actor")))
    limits = options.min_size, options.samples_per_insert, options.slack
    limiter, changed = RateLimiter(*limits, insert=largest, batch=world.batch), Signal()
    limiter.inserted(options.min_size)
    yield inserts(world, node, limiter, changed)
    yield draws(world, node, limiter, changed)


def _items(world: World, envs: int) -> int:
    """Of an unroll."""
    return int(world.windows.starts * envs) if world.windows else 0


def inserts(world: World, node: Place, limiter: RateLimiter, changed: Signal) -> Activity:
    thread, queue = world.thread(node), world.queues[node.name]
    senders = world.of("inference") if "act" in world.plan.links else world.of("actor")
    takes = world.ends("trajectories", world.mine(node, senders)[0], node)[1] + world.costs.at("insert")
    largest = _items(world, max(actor.envs for actor in world.of("actor")))
    while True:
        while limiter.insert_waits(largest):
            yield changed.wait
        _, envs, _ = yield from queue.take()
        limiter.inserted(_items(world, envs))
        yield thread.work(world.noisy(takes))
        changed.notify()


def draws(world: World, node: Place, limiter: RateLimiter, changed: Signal) -> Activity:
    thread, box, costs = world.thread(node), world.questions[node.name], world.costs
    serves = world.ends("samples", world.mine(node, world.of("learner"))[0], node)[1]
    while True:
        count, reply = yield box.take()
        while limiter.sample_waits(max(1, round(count))):
            yield changed.wait
        limiter.sampled(round(count))
        yield thread.work(world.noisy(serves + costs.at("draw", count) + costs.at("prioritise", count)))
        changed.notify()
        reply(None)
