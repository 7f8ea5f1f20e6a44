"""A relay between a learner's publisher and the subscribers of its host, all in one event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rig import PATIENCE_S, FakeController, Rig, epoch, eventually, net, publish_weights, rig_of

from ddrl_bus.messages import Group, Weights, parse
from ddrl_bus.transport.links import Subscriber
from ddrl_bus.transport.wire import Message

TWO_HOSTS = (
    *("hosts.a=127.0.0.1", "hosts.b=127.0.0.2", "nodes.learner.host=[a]", "nodes.actor.host=[b]"),
    *("nodes.evaluator.host=[b]", "nodes.controller.host=[a]"),
)


async def taken(subscriber: Subscriber) -> Message:
    async with asyncio.timeout(PATIENCE_S):
        return await subscriber.next()


def leader(controller: FakeController, *names: str, generation: int = 1) -> None:
    controller.say(group=Group(generation, {name: epoch(1) for name in names}, "here:1"))


def hearing(rig: Rig, node: str, origin: str) -> Subscriber:
    return rig.bus(node).subscriber("weights", rig.plan.ports(node)["weights"].peers[origin])


async def test_it_forwards_each_frame_as_it_came(tmp_path: Path) -> None:
    """In its origin's name and under its version, and to whoever comes late."""
    async with rig_of(tmp_path, *TWO_HOSTS) as rig:
        rig.fake_controller()
        publisher = rig.publisher("learner-0", "weights")
        early = rig.subscriber("actor-0", "weights")
        relay = rig.start("relay-0")
        for updates in (3, 4):
            publish_weights(publisher, updates, net(updates))
            message = await taken(early)
            assert (message.node, message.epoch, message.seq) == ("learner-0", epoch(1), updates + 1)
            assert parse(Weights, message).updates == updates
            assert (message.arrays["policy.weight"] == updates).all()
        assert relay.count("weights/messages_out") == relay.count("weights/messages_in") == 2
        assert relay.count("weights/bytes_out") == relay.count("weights/bytes_in") > 0
        assert parse(Weights, await taken(rig.subscriber("evaluator-0", "weights"))).updates == 4
        await relay.drained()


async def test_a_new_life_of_the_relay_brings_nothing_old(tmp_path: Path) -> None:
    """Nor one of the learner: its life is above the last."""
    async with rig_of(tmp_path, *TWO_HOSTS) as rig:
        rig.fake_controller()
        first = rig.publisher("learner-0", "weights")
        subscriber = rig.subscriber("actor-0", "weights")
        relay = rig.start("relay-0")
        publish_weights(first, 7)
        assert (await taken(subscriber)).seq == 8
        await relay.drained()
        again = rig.start("relay-0", life=2)
        await eventually(lambda: again.count("weights/messages_out") == 1, "the newest, once more")
        late = rig.subscriber("evaluator-0", "weights")
        assert (await taken(late)).seq == 8
        assert subscriber.latest() is None
        first.close()
        publish_weights(rig.publisher("learner-0", "weights", life=2), 1)
        for each in (subscriber, late):
            assert ((message := await taken(each)).epoch, message.seq) == (epoch(2), 2)


async def test_of_several_learners_it_hears_the_one_that_leads(tmp_path: Path) -> None:
    """What another publishes, for its own process, costs nothing."""
    async with rig_of(tmp_path, *TWO_HOSTS, "nodes.learner.count=2") as rig:
        controller = rig.fake_controller()
        publishers = [rig.publisher(f"learner-{n}", "weights") for n in range(2)]
        subscribers = [hearing(rig, "actor-0", f"learner-{n}") for n in range(2)]
        relay = rig.start("relay-0")
        for n, publisher in enumerate(publishers):
            publish_weights(publisher, 10 + n)
        await relay.running()
        assert relay.count("weights/messages_in") == 0
        leader(controller, "learner-1", "learner-0")
        assert (await taken(subscribers[1])).seq == 12
        publish_weights(publishers[0], 20)
        publish_weights(publishers[1], 21)
        assert (await taken(subscribers[1])).seq == 22
        assert relay.count("weights/messages_in") == 2
        assert subscribers[0].latest() is None
        leader(controller, "learner-0", generation=2)
        assert (await taken(subscribers[0])).seq == 21
        await relay.drained()
