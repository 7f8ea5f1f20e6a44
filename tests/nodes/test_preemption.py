"""Who ends its rollout early, and when: the rule, an actor that is told, and what its learner makes of the unroll."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import walks
from rig import PATIENCE_S, Living, Rig, eventually, net, publish_weights, rig_of

from ddrl_bus.algos.ppo import Ppo, PpoConfig
from ddrl_bus.experience import BatchSlots
from ddrl_bus.messages import Tally, Trajectory, fields_of, parse
from ddrl_bus.nodes.batches import batch_of
from ddrl_bus.nodes.preemption import preempted
from ddrl_bus.transport.links import Publisher, Receiver
from ddrl_bus.transport.wire import Arena, Message

# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("share", "workers", "enough"),
    [
        (0.6, 5, 3),
        (0.6, 4, 3),
        (0.6, 3, 2),
        (0.6, 2, 2),  # one of two never stops the other
        (0.6, 1, 1),
        (0.6, 10, 6),
        (0.28, 25, 7),  # more by 1e-15, where floats multiply
        (0.07, 100, 7),
        (1.0, 4, 4),
        (0.01, 4, 1),
    ],
)
def test_the_share_of_workers_that_must_have_played(share: float, workers: int, enough: int) -> None:
    for done in range(workers + 1):
        assert preempted(128, 32, done, workers, share) == (done >= enough), done


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_a_share_of_none_stops_nobody(workers: int) -> None:
    assert not any(preempted(128, 32, done, workers, 0.0) for done in range(workers + 1))


@pytest.mark.parametrize("least", [1, 5, 20])
def test_the_rows_that_a_worker_plays_in_any_case(least: int) -> None:
    for rows in range(21):
        assert preempted(rows, least, 3, 4, 0.6) == (rows >= least), rows


@pytest.mark.parametrize(
    ("unroll", "share", "least"),
    [
        (128, 0.25, 32),
        (20, 0.25, 5),
        (10, 0.25, 3),
        (10, 0.3, 3),
        (100, 0.07, 7),
        (5, 1.0, 5),
        (1, 0.25, 1),
        (9, 1e-12, 1),
    ],
)
def test_ppo_plays_a_share_of_its_rollout_in_any_case(unroll: int, share: float, least: int) -> None:
    assert Ppo.least_rows(PpoConfig(unroll=unroll, preempt=0.6, preempt_after=share)) == least
    assert Ppo.least_rows(PpoConfig(unroll=unroll, preempt_after=share)) == unroll


# ── an actor ─────────────────────────────────────────────────────────────────────────────────────────────────────

UNROLL, ENVS, LEAST = 12, 2, 3


class Gated(walks.Walk):
    """Waits in each step for the test to let it go on."""

    gate: ClassVar[threading.Condition]
    begun: ClassVar[int]
    """Steps, over all environments."""
    allowed: ClassVar[float]

    @classmethod
    def allow(cls, steps: float) -> None:
        with cls.gate:
            cls.allowed += steps
            cls.gate.notify_all()

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        with self.gate:
            Gated.begun += 1
            assert self.gate.wait_for(lambda mine=self.begun: mine <= self.allowed, PATIENCE_S)
        return super().step(action)


@pytest.fixture(autouse=True)
def gated() -> Iterator[None]:
    gym.register("Gated-v0", Gated)
    Gated.gate, Gated.begun, Gated.allowed = threading.Condition(), 0, 0.0
    yield
    del gym.registry["Gated-v0"]


class Stage:
    """An actor; a test plays its learner."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.controller = rig.fake_controller()
        self.weights: Publisher = rig.publisher("learner-0", "weights")
        self.tally: Publisher = rig.publisher("learner-0", "tally")
        self.trajectories: Receiver = rig.receiver("learner-0")
        self.actor: Living = rig.start("actor-0", inline=False)
        self.said = 0

    def publish(self, updates: int) -> None:
        arrays = net()
        arrays["torso.0.weight"] = np.zeros((8, 2), np.float32)
        publish_weights(self.weights, updates, arrays)

    async def tell(self, update: int, done: int, workers: int = 4) -> None:
        """And wait until the actor has heard it."""
        self.said += 1
        tally = Tally(update, done, workers)
        self.tally.publish(self.said, Arena.of(Tally.KIND, {}), fields_of(tally))
        await eventually(lambda: self.actor.node.tally == tally)

    async def plays(self, rows: int) -> None:
        """So many more rows, and begins the next one."""
        Gated.allow(rows * ENVS)
        await eventually(lambda: Gated.begun == Gated.allowed + 1)

    async def unroll(self) -> Message:
        """What comes of it once nothing holds it up."""
        Gated.allow(np.inf)
        async with asyncio.timeout(PATIENCE_S):
            message = await self.trajectories.recv()
        assert self.actor.node.schema.check(message) is None
        return message


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]
DDPPO = (
    *("algo={name: ppo, unroll: 12, batch: 2, minibatches: 1, hidden: [8], preempt: 0.6, reward_scale: 1}",),
    *("nodes.actor={count: 2, envs: 2, bundle: worker}", "nodes.learner={count: 2, bundle: worker, device: cpu}"),
    *("links.trajectories.window=1", "links.trajectories.max_lag=0", "links.tally.kind=latest"),
)


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str, length: int = 1000) -> AsyncIterator[Stage]:
        env = ("env.id=Gated-v0", f"env.kwargs.length={length}")
        async with rig_of(tmp_path, *DDPPO, *env, *overrides) as rig:
            try:
                yield Stage(rig)
            finally:
                Gated.allow(np.inf)

    return made


def rows_of(message: Message) -> int:
    return len(message.arrays["reward"])


@pytest.mark.parametrize(("rows", "expected"), [(0, LEAST), (1, LEAST), (LEAST - 1, LEAST), (5, 6), (UNROLL - 2, 11)])
async def test_a_rollout_ends_at_the_row_where_it_is_told(on_stage: OnStage, rows: int, expected: int) -> None:
    """The row that is being played then is its last, unless it has not a quarter of its rows yet."""
    async with on_stage() as stage:
        stage.publish(4)
        await stage.plays(rows)
        await stage.tell(5, done=3)
        message = await stage.unroll()
        await stage.actor.drained()
    arrays = message.arrays
    assert rows_of(message) == expected
    assert arrays["obs"][:, :, 0].tolist() == [[t] * ENVS for t in range(expected + 1)]
    assert arrays["reward"].tolist() == [[t + 1.0] * ENVS for t in range(expected)]
    assert arrays["version"].tolist() == [4] * expected
    assert stage.actor.count("env_steps") % ENVS == 0


async def test_what_was_told_before_it_began_counts_too(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.actor.running()
        await stage.tell(5, done=4)
        stage.publish(4)
        assert rows_of(await stage.unroll()) == LEAST
        await stage.actor.drained()


async def test_the_next_rollout_goes_on_where_the_last_one_ended(on_stage: OnStage) -> None:
    """Whole again, for the tally was of the last update."""
    async with on_stage() as stage:
        stage.publish(4)
        await stage.plays(4)
        await stage.tell(5, done=3)
        first = await stage.unroll()
        stage.publish(5)
        second = await stage.unroll()
        await stage.actor.drained()
    assert (rows_of(first), rows_of(second)) == (5, UNROLL)
    assert second.arrays["obs"][:, 0, 0].tolist() == list(range(5, 5 + UNROLL + 1))
    assert stage.actor.count("env_steps") == (5 + UNROLL) * ENVS


@pytest.mark.parametrize(("update", "done"), [(4, 4), (6, 4), (0, 4), (5, 2), (5, 0)])
async def test_a_tally_of_another_update_or_of_too_few_is_ignored(on_stage: OnStage, update: int, done: int) -> None:
    async with on_stage() as stage:
        stage.publish(4)
        await stage.plays(5)
        await stage.tell(update, done)
        assert rows_of(await stage.unroll()) == UNROLL
        await stage.actor.drained()


async def test_settings_say_when(on_stage: OnStage) -> None:
    async with on_stage("algo.preempt=1", "algo.preempt_after=0.5") as stage:
        stage.publish(4)
        await stage.plays(1)
        await stage.tell(5, done=3)
        await stage.plays(1)
        await stage.tell(5, done=4)
        assert rows_of(await stage.unroll()) == UNROLL // 2
        await stage.actor.drained()


async def test_its_episodes_and_final_observations_are_those_of_its_rows(on_stage: OnStage) -> None:
    """And the learner's batch has its rows."""
    async with on_stage(length=3) as stage:
        stage.publish(4)
        await stage.plays(6)
        await stage.tell(5, done=3)
        message = await stage.unroll()
        await stage.actor.drained()
        schema = stage.actor.node.schema
    assert rows_of(message) == 7
    said = parse(Trajectory, message)
    assert (said.returns, said.lengths) == ([6.0] * 4, [3] * 4)
    assert message.arrays["final_index"].tolist() == [2 * ENVS, 2 * ENVS + 1, 5 * ENVS, 5 * ENVS + 1]
    slots = BatchSlots(schema, ENVS, slots=1)
    slot = slots.free[0]
    slots.copy(slot, message, 0)
    assert (slot.length, slot.steps, slot.full) == (7, 7 * ENVS, True)
    batch = batch_of(slot, schema)
    for name in ("obs", "action", "reward", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(batch, name), message.arrays[name], name)
    for name, array in batch.record.items():
        np.testing.assert_array_equal(array, message.arrays[f"record.{name}"], name)
    assert batch.version.tolist() == [[4] * ENVS] * 7
    assert batch.final_index.tolist() == message.arrays["final_index"].tolist()
    assert batch.final_obs.tolist() == [[3.0, 30.0]] * 4
