"""An actor on `walks.Walk`, whose observations tell where they are from; a test plays learner and controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import walks
from rig import FakeController, Living, Rig, eventually, net, publish_weights, rig_of

from ddrl_bus.errors import EnvError
from ddrl_bus.experience import UnrollSchema
from ddrl_bus.messages import Trajectory, parse
from ddrl_bus.nodes.env_faults import ENV_FAULTS
from ddrl_bus.transport.links import Publisher, Receiver
from ddrl_bus.transport.wire import Array, Message

ENVS, UNROLL = 4, 5
SCHEMA = UnrollSchema(("float32", (2,)), ("int64", ()), {"policy": ("float32", (2,))}, UNROLL)


class Stage:
    """An actor, and the ends that it talks to."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.weights: Publisher = rig.publisher("learner-0", "weights")
        self.trajectories: Receiver = rig.receiver("learner-0")
        self.actor: Living = rig.start("actor-0")

    def publish(self, updates: int, again: int = 0) -> None:
        arrays = net()
        arrays["torso.0.weight"] = np.zeros((8, 2), np.float32)
        publish_weights(self.weights, 2 * updates + again, arrays, updates=updates, env_steps=40 * updates)

    async def unrolls(self, n: int) -> list[Message]:
        async with asyncio.timeout(20):
            messages = [await self.trajectories.recv() for _ in range(n)]
        assert [SCHEMA.check(message) for message in messages] == [None] * n
        return messages


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    from contextlib import asynccontextmanager

    @asynccontextmanager
    async def made(*overrides: str, **kwargs: Any) -> AsyncIterator[Stage]:
        walks.Walk.faults.clear()
        settings = [f"env.kwargs.{name}={value}" for name, value in kwargs.items()]
        async with rig_of(tmp_path, "env.id=Walk-v0", *settings, *overrides) as rig:
            yield Stage(rig)

    return made


def positions(message: Message) -> Array:
    """[T+1, N]: where each walker stood."""
    return message.arrays["obs"][:, :, 0]


# ── what it plays ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("truncates", [True, False])
async def test_rows_of_episodes(on_stage: OnStage, truncates: bool) -> None:
    """Obs, action, reward and ends of a row belong together; only truncated rows have final observations."""
    async with on_stage(length=4, truncates=str(truncates).lower()) as stage:
        stage.publish(0)
        first, second = await stage.unrolls(2)
        await stage.actor.drained()
    rows, one = first.arrays, np.ones(ENVS)
    assert positions(first).tolist() == np.outer([0, 1, 2, 3, 0, 1], one).tolist()  # row 4 starts a new episode
    assert positions(second).tolist() == np.outer([1, 2, 3, 0, 1, 2], one).tolist()
    assert rows["reward"].tolist() == np.outer([1, 2, 3, 4, 1], one).tolist()
    ends = np.outer([0, 0, 0, 1, 0], one).astype(bool)
    assert (rows["truncated"] == (ends & truncates)).all()
    assert (rows["terminated"] == (ends & (not truncates))).all()
    if truncates:
        assert rows["final_index"].tolist() == [3 * ENVS + n for n in range(ENVS)]
        assert rows["final_obs"].tolist() == [[4.0, 40.0]] * ENVS
    else:
        assert "final_obs" not in rows
    said = parse(Trajectory, first)
    assert (said.returns, said.lengths) == ([1.0 + 2 + 3 + 4] * ENVS, [4] * ENVS)


async def test_the_version_is_the_weights_that_acted(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        stage.publish(5)
        (message,) = await stage.unrolls(1)
        assert message.arrays["version"].tolist() == [5] * UNROLL
        assert parse(Trajectory, message).learner_epoch == 1 << 32 | 7
        stage.publish(6)
        async with asyncio.timeout(20):
            while (await stage.trajectories.recv()).arrays["version"][0] != 6:
                pass
        await stage.actor.drained()


async def test_no_unroll_before_the_first_weights(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await eventually(lambda: stage.controller.states("actor-0")[-1:] == ["running"])
        assert stage.trajectories.try_recv() is None
        await stage.actor.drained()
        assert stage.actor.count("env_steps") == 0


async def test_it_waits_for_credit(on_stage: OnStage) -> None:
    """Two unread unrolls, and what it holds in its hands; no step more until one is read."""
    async with on_stage() as stage:
        stage.publish(0)
        await eventually(lambda: stage.trajectories.queued == 2)
        await asyncio.sleep(0.1)
        assert stage.trajectories.queued == 2
        steps = stage.actor.count("env_steps")
        assert steps <= 4 * UNROLL * ENVS
        await asyncio.sleep(0.1)
        assert stage.actor.count("env_steps") == steps
        await stage.unrolls(6)
        await stage.actor.drained()


async def test_lock_step_plays_no_weights_twice(on_stage: OnStage) -> None:
    async with on_stage("links.trajectories.max_lag=0", "links.trajectories.window=1") as stage:
        versions = []
        for version in range(4):
            stage.publish(version)
            versions += [int(message.arrays["version"][0]) for message in await stage.unrolls(1)]
            stage.publish(version, again=1)  # as for a confirmation
            await asyncio.sleep(0.02)
            assert stage.trajectories.try_recv() is None
        await stage.actor.drained()
    assert versions == [0, 1, 2, 3]


async def test_draining_flushes(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        stage.publish(0)
        await stage.unrolls(3)
        await stage.actor.drained()
        produced = stage.actor.count("trajectories", "/produced")
        await eventually(lambda: 3 + stage.trajectories.queued == produced)
        told = stage.controller.last("actor-0").counters
        assert {name: told[name] for name in told if name.startswith(("traj", "env_"))} == {
            name: n for name, n in stage.actor.books.items() if name.startswith(("traj", "env_"))
        }


# ── environments that fail ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["raise", "nan", "reward"])
async def test_a_fault_costs_its_unroll_and_no_more(on_stage: OnStage, fault: str, caplog: Any) -> None:
    """Step 7 is in the second unroll: what was played of it is dropped, and episodes start anew."""
    async with on_stage(length=100, fault=fault, at=7, times=1) as stage:
        stage.publish(0)
        messages = await stage.unrolls(4)
        await stage.actor.drained()
    expected = [[0, 5], [0, 5], [5, 10], [10, 15]]
    assert [[int(positions(m)[0, 0]), int(positions(m)[-1, 0])] for m in messages] == expected
    for message in messages:
        assert (np.diff(positions(message), axis=0) == 1).all()
        assert not message.arrays["terminated"].any()
        assert not message.arrays["truncated"].any()
    assert stage.actor.count("env_faults") == 1
    assert "fault 1 of 3 in a row: Walk-v0: environment 0, step 7" in caplog.text
    played = stage.actor.count("trajectories", "/produced") * UNROLL * ENVS
    assert 0 <= stage.actor.count("env_steps") - played <= 2 * UNROLL * ENVS  # whole unrolls that nobody had room for


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", r"^Walk-v0: environment 0, step 1: RuntimeError: fell over$"),
        ("nan", r"^Walk-v0: environment 0, step 1: observation \[nan nan\] is not finite$"),
        ("reward", r"^Walk-v0: environment 0, step 1: reward inf is not finite$"),
    ],
)
async def test_three_faults_in_a_row_are_given_up(on_stage: OnStage, fault: str, words: str) -> None:
    async with on_stage(fault=fault) as stage:
        stage.publish(0)
        with pytest.raises(EnvError, match=words):
            await stage.actor.task
        assert ENV_FAULTS == 3 <= stage.actor.count("env_faults") <= 4  # an unroll ahead may have begun
        assert stage.actor.count("trajectories", "/produced") == 0
        last = stage.controller.last("actor-0")
        assert (last.state, last.error.partition(": ")[0]) == ("failed", "EnvError")


async def test_two_faults_in_a_row_are_not(on_stage: OnStage) -> None:
    async with on_stage(fault="raise", times=2) as stage:
        stage.publish(0)
        await stage.unrolls(2)
        await stage.actor.drained()
        assert stage.actor.count("env_faults") == 2


async def test_faults_apart_are_forgotten(on_stage: OnStage) -> None:
    """Each object fails once in a while, more often than three times in all."""
    async with on_stage(length=100, fault="raise", at=7) as stage:
        stage.publish(0)
        messages = await stage.unrolls(8)
        await stage.actor.drained()
        assert {int(positions(m)[0, 0]) for m in messages} == {0}
        assert stage.actor.count("env_faults") > 3


async def test_a_reset_that_fails_is_a_fault_too(on_stage: OnStage) -> None:
    async with on_stage(length=3, fault="reset", times=1) as stage:
        stage.publish(0)
        await stage.unrolls(2)
        await stage.actor.drained()
        assert stage.actor.count("env_faults") == 1
