"""Who trains on batches: nodes/learner.py, batches.py, samples.py and replica_learner.py, as activities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from ddrl_bus.planning.places import Place
from ddrl_bus.planning.simulate import Activity, Mailbox
from ddrl_bus.planning.world import World

SPARE: Final = 2
"""Batches that a learner holds besides those it is handed ahead: one that fills, one that is trained on."""
Versions = Sequence[tuple[float, int]]
"""Played by, and how many columns."""


class Batches:
    """A learner's slots on their way round: free, filled, trained on."""

    def __init__(self, world: World, slots: int) -> None:
        self.free, self.ready = Mailbox(world.sim), Mailbox(world.sim)
        self.version = self.filled = 0
        """Of the learner; and batches that are not yet trained on."""
        for _ in range(slots):
            self.free.put(None)


def intake(world: World, node: Place, batches: Batches) -> Activity:
    """Unrolls as they come; too old ones are refused."""
    thread, queue, columns = world.thread(node), world.queues[node.name], 0
    takes = world.ends("trajectories", world.mine(node, world.of("actor"))[0], node)[1] + world.costs.at("copy")
    oldest = world.plan.links["trajectories"].max_lag
    versions: list[tuple[float, int]] = []
    yield batches.free.take()
    while True:
        version, envs, _ = yield from queue.take()
        yield thread.work(world.noisy(takes))
        if oldest is not None and batches.version + batches.filled - version > oldest:
            continue
        columns += envs
        versions.append((version, envs))
        while columns >= world.batch:
            columns -= world.batch
            batches.filled += 1
            batches.ready.put(versions)
            versions = [(version, columns)] if columns else []
            yield batches.free.take()


def samples(world: World, node: Place, batches: Batches) -> Activity:
    """What shards of a replay draw, each its part."""
    thread, shards, answers = world.thread(node), world.mine(node, world.of("replay")), Mailbox(world.sim)
    count, copies = world.batch / len(shards), world.costs.at("copy") * len(shards)
    up, down = (world.size(what, count, world.batch) for what in ("sample", "samples"))
    while True:
        yield batches.free.take()
        for shard in shards:
            yield thread.work(world.noisy(world.ends("samples", node, shard)[0]))
            reply = partial(world.carry("samples", shard, node), down, answers.put)
            world.carry("samples", node, shard)(up, world.questions[shard.name].put, (count, reply))
        for _ in shards:
            yield answers.take()
        yield thread.work(world.noisy(copies))
        batches.ready.put([])


def train(world: World, node: Place, batches: Batches) -> Activity:
    """Update after update, in step with the other replicas where there are some; weights are published."""
    thread, learners = world.thread(node), len(world.of("learner"))
    works, waits = _update(world, learners)
    votes = 2 * (learners - 1) * world.costs.links["weights"][1] if learners > 1 else 0.0
    leads = learners == 1 or node.index == 0 or node.bundle is not None
    if leads:
        yield from world.publish(node, 0, thread)
    while True:
        versions = yield batches.ready.take()
        if world.barrier:
            yield thread.work(world.noisy(votes))
            yield world.barrier.meet
        _trained(world, versions, batches.version)
        batches.filled -= 1
        yield from world.trained(node, works)
        if world.barrier and waits:
            yield world.trainer(node).stall(world.noisy(waits))
            yield world.barrier.meet
        batches.version += 1
        batches.free.put(None)
        if leads and batches.version % node.options.publish_every == 0:
            world.sim.start(world.publish(node, batches.version, thread))


def _update(world: World, learners: int) -> tuple[float, float]:
    """Seconds of work of an update, and those that its sums take besides, by the clock."""
    sums, (cpu, wall) = world.costs.sizes.get("sums", 0), world.costs.sum_of(learners)
    at_once = min(world.costs.cores, learners)
    return world.costs.at("update", world.batch) + sums * cpu, sums * max(0.0, wall - cpu * learners / at_once)


def _trained(world: World, versions: Versions, version: int) -> None:
    world.updates += 1
    world.lag += sum((version - played) * columns for played, columns in versions)
    world.lagged += sum(columns for _, columns in versions)
