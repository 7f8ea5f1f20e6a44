"""A node's life: every way that is allowed, every way that is not, and what a node says on its way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import product
from typing import ClassVar, get_args

import pytest
from rig import FakeController, Rig, beat, epoch, eventually, progress_of

from ddrl_bus.errors import FencedError, UsageError
from ddrl_bus.messages import NodeState
from ddrl_bus.nodes.base import TRANSITIONS, Node

STATES: tuple[NodeState, ...] = get_args(NodeState)
LEGAL = {
    ("new", "starting"),
    ("new", "failed"),
    ("starting", "running"),
    ("starting", "draining"),
    ("starting", "failed"),
    ("running", "draining"),
    ("running", "failed"),
    ("draining", "stopped"),
    ("draining", "failed"),
}


class Probe(Node):
    """A node whose start and run a test writes."""

    role: ClassVar[str] = "actor"

    def __init__(self, rig: Rig, start: Callable[[Probe], Awaitable[None]], run: Callable[[Probe], Awaitable[None]]):
        super().__init__(rig.plan, "actor-0", rig.folder, epoch(1), rig.hub, inline=True)
        self._start_, self._run_ = start, run

    async def start(self) -> None:
        await self._start_(self)

    async def run(self) -> None:
        await self._run_(self)


async def nothing(node: Probe) -> None:
    """Returns at once."""


async def until_drained(node: Probe) -> None:
    await node.draining.wait()


def test_the_table_knows_every_state() -> None:
    assert set(TRANSITIONS) == set(STATES)
    assert {(a, b) for a in STATES for b in TRANSITIONS[a]} == LEGAL


@pytest.mark.parametrize(("before", "after"), list(product(STATES, STATES)))
async def test_only_legal_transitions(rig: Rig, before: NodeState, after: NodeState) -> None:
    node = Probe(rig, nothing, nothing)
    node.state = before
    if (before, after) in LEGAL:
        node.enter(after)
        assert node.state == after
    else:
        with pytest.raises(RuntimeError, match=f"actor-0: no way from {before} to {after}"):
            node.enter(after)
        assert node.state == before


async def test_a_whole_life_is_told(rig: Rig, controller: FakeController) -> None:
    living = rig.run(Probe(rig, nothing, until_drained))
    await eventually(lambda: "running" in controller.states("actor-0"))
    await living.drained()
    assert controller.states("actor-0")[-1] == living.node.state == "stopped"
    assert controller.last("actor-0").error is None


async def test_a_node_whose_work_is_over_stops_by_itself(rig: Rig, controller: FakeController) -> None:
    living = rig.run(Probe(rig, nothing, nothing))
    await living.task
    assert controller.states("actor-0")[-1] == "stopped"


async def test_the_controller_drains_by_name(rig: Rig, controller: FakeController) -> None:
    living = rig.run(Probe(rig, nothing, until_drained))
    await eventually(lambda: "running" in controller.states("actor-0"))
    controller.say(phase="drain", draining=["actor-1"])
    await asyncio.sleep(0.05)
    assert not living.node.draining.is_set()
    controller.say(draining=["actor-1", "actor-0"])
    await living.task
    assert living.node.state == "stopped"


async def test_stopped_before_it_ran(rig: Rig, controller: FakeController) -> None:
    ran = []

    async def start(node: Probe) -> None:
        living.stop.set()
        await eventually(lambda: node.state == "draining")

    async def run(node: Probe) -> None:
        ran.append(node)

    living = rig.run(Probe(rig, start, run))
    await living.task
    assert (living.node.state, ran) == ("stopped", [])


async def test_drained_in_the_last_moment_of_starting(rig: Rig, controller: FakeController) -> None:
    async def start(node: Probe) -> None:
        await asyncio.sleep(0.01)
        node.draining.set()

    living = rig.run(Probe(rig, start, nothing))
    await living.task
    assert living.node.state == "stopped"


@pytest.mark.parametrize("when", ["start", "run"])
async def test_the_first_exception_leaves_as_it_was(rig: Rig, controller: FakeController, when: str) -> None:
    async def fails(node: Probe) -> None:
        raise ZeroDivisionError("by nothing")

    living = rig.run(Probe(rig, fails, nothing) if when == "start" else Probe(rig, nothing, fails))
    with pytest.raises(ZeroDivisionError, match="by nothing"):
        await living.task
    assert living.node.state == "failed"
    assert controller.last("actor-0").state == "failed"
    assert controller.last("actor-0").error == "ZeroDivisionError: by nothing"


async def test_without_a_controller_it_works(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """It says so, and goes on: in the middle of its life and at the end."""
    living = rig.run(Probe(rig, nothing, until_drained))
    await eventually(lambda: "controller unreachable; going on" in caplog.text)
    assert living.node.state == "running"
    await living.drained()
    assert living.node.state == "stopped"


async def test_a_controller_that_comes_late_is_heard(rig: Rig) -> None:
    living = rig.run(Probe(rig, nothing, until_drained))
    await living.running()
    late = rig.fake_controller()
    late.say(phase="drain", draining=["actor-0"])
    await living.task
    assert late.states("actor-0")[-1] == "stopped"


async def test_a_refused_node_fails_with_the_words(rig: Rig, controller: FakeController) -> None:
    controller.refuses = "actor-0 runs topology 1, this is t 2"
    living = rig.run(Probe(rig, nothing, until_drained))
    with pytest.raises(UsageError, match="actor-0 runs topology 1, this is t 2"):
        await living.task


async def test_a_fenced_node_leaves_as_fenced(rig: Rig, controller: FakeController) -> None:
    newer = rig.client("actor-0", life=2)
    await beat(newer, progress_of(rig.plan, "actor"))
    living = rig.run(Probe(rig, nothing, until_drained))
    with pytest.raises(FencedError, match="a newer life of actor-0"):
        await living.task


async def test_heartbeats_carry_the_ledger(rig: Rig, controller: FakeController) -> None:
    async def run(node: Probe) -> None:
        node.ledger.counter("env_steps").add(640)
        await until_drained(node)

    living = rig.run(Probe(rig, nothing, run))
    await eventually(lambda: (said := controller.last("actor-0")) and said.counters.get("env_steps") == 640)
    await living.drained()
