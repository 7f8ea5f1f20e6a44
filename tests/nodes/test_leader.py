"""Weights that several replicas could publish: whoever leads is followed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from rig import PATIENCE_S, Rig, epoch, net, publish_weights, rig_of

from ddrl_bus.messages import Control, Group, Weights, parse
from ddrl_bus.nodes.base import node_class
from ddrl_bus.nodes.leader import LeaderSubscriber, weights_of
from ddrl_bus.transport.links import Subscriber


def node_of(rig: Rig, name: str) -> Any:
    """That listens to nobody: the test tells it who leads."""
    node = node_class(rig.plan, name)(rig.plan, name, rig.folder, epoch(1), rig.hub, inline=True)
    rig.buses.append(node.bus)
    return node


def leads(node: Any, *names: str, generation: int = 1) -> None:
    node._obey(Control(group=Group(generation, {name: epoch(1) for name in names}, "here:1")))


async def updates(weights: Any) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return parse(Weights, await weights.next()).updates


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (("nodes.learner.count=1",), ("actor-1", "evaluator-0")),
        (("nodes.learner={count: 2, bundle: w}", "nodes.actor={count: 2, envs: 4, bundle: w}"), ("actor-1",)),
    ],
)
async def test_an_only_learner_needs_not_lead(
    settings: tuple[str, ...], names: tuple[str, ...], tmp_path: Path
) -> None:
    """Nor does the one in the own bundle."""
    async with rig_of(tmp_path, *settings) as rig:
        for name in names:
            assert isinstance(weights_of(node_of(rig, name)), Subscriber)


async def test_the_first_member_is_followed(tmp_path: Path) -> None:
    async with rig_of(tmp_path, "nodes.learner.count=3") as rig:
        publishers = [rig.publisher(f"learner-{n}", "weights") for n in range(3)]
        node = node_of(rig, "evaluator-0")
        weights = weights_of(node)
        assert isinstance(weights, LeaderSubscriber)
        for n, publisher in enumerate(publishers):
            publish_weights(publisher, 10 + n, net())
        assert weights.latest() is None
        waiting = asyncio.create_task(updates(weights))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        leads(node, "learner-1", "learner-0")
        assert await waiting == 11
        publish_weights(publishers[0], 20)
        publish_weights(publishers[1], 21)
        assert await updates(weights) == 21
        assert weights.latest() is None


async def test_another_leader_is_followed_from_then_on(tmp_path: Path) -> None:
    """Also by who waits for weights just then; who leads on is not asked anew."""
    async with rig_of(tmp_path, "nodes.learner.count=2") as rig:
        publishers = [rig.publisher(f"learner-{n}", "weights") for n in range(2)]
        node = node_of(rig, "actor-0")
        weights = weights_of(node)
        leads(node, "learner-0", "learner-1")
        publish_weights(publishers[0], 1)
        publish_weights(publishers[1], 2)
        assert await updates(weights) == 1
        leads(node, "learner-0", generation=2)
        assert weights.latest() is None
        waiting = asyncio.create_task(updates(weights))
        await asyncio.sleep(0.05)
        leads(node, "learner-1", generation=3)
        assert await waiting == 2
        heard = node.ledger.snapshot()["weights/messages_in"]
        publish_weights(publishers[0], 3)
        publish_weights(publishers[1], 4)
        assert await updates(weights) == 4
        assert node.ledger.snapshot()["weights/messages_in"] == heard + 1


async def test_without_a_controller_the_leader_is_kept(tmp_path: Path) -> None:
    """A new one knows of no group at first."""
    async with rig_of(tmp_path, "nodes.learner.count=2") as rig:
        publisher = rig.publisher("learner-1", "weights")
        node = node_of(rig, "evaluator-0")
        weights = weights_of(node)
        leads(node, "learner-1", "learner-0")
        publish_weights(publisher, 1)
        assert await updates(weights) == 1
        node._obey(Control())
        publish_weights(publisher, 2)
        assert await updates(weights) == 2
