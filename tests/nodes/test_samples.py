"""A learner's end of `samples`, among real replay nodes; a test plays the actors, and trains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from contents import contents
from rig import PATIENCE_S, REPLAY, FakeController, Living, Rig, epoch, eventually, replayed, rig_of

from ddrl_bus.errors import UsageError
from ddrl_bus.experience import Slot
from ddrl_bus.messages import Weights, parse
from ddrl_bus.nodes import replay, samples, waiting
from ddrl_bus.nodes.base import Node
from ddrl_bus.nodes.samples import Samples
from ddrl_bus.replay_buffer import EPSILON
from ddrl_bus.transport.links import Sender
from ddrl_bus.transport.sessions import request
from ddrl_bus.transport.wire import Array

UNROLL, ENVS, BATCH = 5, 4, 8
ITEMS = UNROLL * ENVS
"""Of an unroll."""


class Asker(Node):
    """Draws when it is told to."""

    role: ClassVar[str] = "learner"

    async def start(self) -> None:
        self.source = Samples(self)
        self.slots = self.source.allocate(3, torch.device("cpu"))

    async def run(self) -> None:
        await self.draining.wait()
        await self.source.settle()


class Stage:
    """Shards of a replay, what fills them, and who draws from them."""

    def __init__(self, rig: Rig, asks: bool) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        peers = rig.plan.ports("actor-0")["trajectories"].peers
        self.actors: dict[str, Sender] = {
            name: rig.bus("actor-0").sender("trajectories", {name: address}) for name, address in peers.items()
        }
        self.shards: dict[str, Living] = {name: rig.start(name) for name in peers}
        self.learner: Living = (
            rig.run(Asker(rig.plan, "learner-0", rig.folder, epoch(1), rig.hub, inline=True))
            if asks
            else rig.start("learner-0")
        )

    async def send(self, shard: int, first: int = 0, priority: float | Array = 1.0, unrolls: int = 1) -> None:
        """Unrolls to one shard, all alike; returns when they are stored."""
        name = f"replay-{shard}"
        living = self.shards[name]
        stored = living.count("trajectories/stored") + unrolls
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(unrolls):
                await self.actors[name].send(*replayed(living.node.schema, ENVS, first, priority))
        await eventually(lambda: living.count("trajectories/stored") == stored)

    async def fill(self, number: int = 0) -> Slot:
        slot: Slot = self.learner.node.slots[number]
        slot.clear()
        async with asyncio.timeout(PATIENCE_S):
            await self.source.fill(slot)
        return slot

    async def killed(self, shard: int) -> None:
        living = self.shards[f"replay-{shard}"]
        living.task.cancel()
        await asyncio.wait([living.task])

    async def back(self, shard: int) -> None:
        name = f"replay-{shard}"
        self.shards[name] = self.rig.start(name, life=(self.shards[name].node.epoch >> 32) + 1)
        await self.shards[name].running()

    @property
    def source(self) -> Any:
        return self.learner.node.source

    def count(self, what: str) -> int:
        return sum(living.count(what) for living in self.shards.values())

    async def drained(self) -> None:
        for living in (self.learner, *self.shards.values()):
            await living.drained()


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OnStage:
    monkeypatch.setattr(request, "REPEAT_S", 0.02)
    monkeypatch.setattr(replay, "KEPT_S", 0.05)

    @asynccontextmanager
    async def made(*overrides: str, asks: bool = True) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *REPLAY, *overrides) as rig:
            stage = Stage(rig, asks)
            for living in rig.living:
                await living.running()
            yield stage

    return made


# ── several shards draw like one ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [1, 4])
async def test_shards_draw_like_one(on_stage: OnStage, shards: int) -> None:
    """χ² of 2·10⁵ draws against P(i) among the items of all shards, and weights by that P."""
    batch, alpha, beta = 1000, 0.7, 0.5
    sizes = f"nodes.replay.count={shards}", f"algo.batch={batch}", f"algo.alpha={alpha}", f"algo.beta={beta}"
    async with on_stage(*sizes) as stage:
        rng = np.random.default_rng(5)
        expected: dict[int, float] = {}  # number in the first observation of an item → its priority
        for n in range(8):
            shard = min(n * n // 10, shards - 1)  # unlike numbers of items
            priority = rng.exponential(1 + 3 * shard, (UNROLL, ENVS)).astype(np.float32)
            await stage.send(shard, 100 * n, priority)
            expected |= {100 * n + 8 * e + t: float(priority[t, e]) for t in range(UNROLL) for e in range(ENVS)}
        p = (np.array(list(expected.values())) + EPSILON) ** alpha
        p /= p.sum()
        where = {number: place for place, number in enumerate(expected)}
        await stage.fill()  # before any, no mass is known
        found = np.zeros(len(p))
        for _ in range(200):
            slot = await stage.fill()
            drawn = np.array([where[int(number)] for number in slot.rows["obs"][0, :, 0]])
            found += np.bincount(drawn, minlength=len(p))
            weights = (len(p) * p[drawn]) ** -beta
            assert slot.weight is not None
            np.testing.assert_allclose(slot.weight, weights / weights.max(), rtol=1e-5)
        assert found.sum() == 2e5
        chi2, freedom = (((found - 2e5 * p) ** 2) / (2e5 * p)).sum(), len(p) - 1
        assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)
        assert stage.count("items/drawn") == 2e5 + batch
        await stage.drained()


async def test_uniform_draws_have_no_weights_and_no_priorities(on_stage: OnStage) -> None:
    async with on_stage("nodes.replay.count=2", "algo.alpha=0") as stage:
        await stage.send(0)
        await stage.send(1, 1000, priority=50.0, unrolls=3)
        await stage.fill()
        drawn = 0
        for _ in range(100):
            slot = await stage.fill()
            assert slot.weight is None
            slot.errors = np.ones(BATCH, np.float32)
            stage.source.trained(slot)
            drawn += int((slot.rows["obs"][0, :, 0] >= 1000).sum())
        assert abs(drawn / (100 * BATCH) - 3 / 4) < 0.08
        await stage.drained()
        assert stage.count("priorities/applied") == stage.count("priorities/late") == 0


async def test_errors_become_priorities_where_the_items_lie(on_stage: OnStage) -> None:
    """They ride on the next question, and the last ones of a run on one of their own."""
    async with on_stage("nodes.replay.count=2", "algo.alpha=1", "algo.batch=32") as stage:
        for shard in (0, 1):
            await stage.send(shard, 1000 * shard)
        known = {1000 * shard + 8 * e + t: 1.0 for shard in (0, 1) for t in range(UNROLL) for e in range(ENVS)}
        for error in (2.0, 3.0, 5.0):
            slot = await stage.fill()
            numbers = [int(number) for number in slot.rows["obs"][0, :, 0]]
            assert len({number // 1000 for number in numbers}) == 2
            slot.errors = error + np.arange(32, dtype=np.float32)
            known |= dict(zip(numbers, slot.errors.tolist(), strict=True))
            stage.source.trained(slot)
        assert stage.count("priorities/applied") == 2 * 32
        await stage.learner.drained()
        assert stage.count("priorities/applied") == 3 * 32
        assert stage.learner.count("samples/trained") == 3 * 32
        for shard in (0, 1):
            leaves = contents(stage.shards[f"replay-{shard}"].node.buffer)["leaves"]
            expected = [[known[1000 * shard + 8 * e + t] for t in range(UNROLL)] for e in range(ENVS)]
            np.testing.assert_allclose(leaves, expected, rtol=1e-5)
        await stage.drained()


async def test_steps_are_counted_once(on_stage: OnStage) -> None:
    """Those that shards took in since the last batch; of one that nothing was learnt from the next counts them."""
    async with on_stage("nodes.replay.count=2") as stage:
        for shard in (0, 1):
            await stage.send(shard)
        assert (await stage.fill()).env_steps == 0  # what was there at first is what the parameters know
        await stage.send(0, unrolls=3)
        slot = await stage.fill()
        assert slot.env_steps == 3 * ITEMS
        stage.source.refuse(slot, "outlier")
        await stage.send(1)
        slot = await stage.fill()
        assert slot.env_steps == 4 * ITEMS
        stage.source.trained(slot)
        assert (await stage.fill()).env_steps == 0
        assert stage.source.gauge()["replay_ratio"] == BATCH / (4 * ITEMS)
        assert stage.learner.count("samples/left_out/outlier") == BATCH
        await stage.drained()


async def test_steps_that_a_killed_shard_forgot_stay_counted(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes back without a checkpoint; what it takes in then is new."""
    monkeypatch.setattr(samples, "LOST_S", 0.3)
    async with on_stage(asks=False) as stage:
        learner = stage.learner.node
        await stage.send(0, unrolls=10)
        await eventually(lambda: learner.algo.env_steps == 10 * ITEMS)
        await stage.killed(0)
        await eventually(lambda: learner.gauge()["shards_lost"] == 1)
        await stage.back(0)
        await eventually(lambda: learner.gauge()["shards_lost"] == 0)
        await stage.send(0, unrolls=5)
        await eventually(lambda: learner.algo.env_steps == 15 * ITEMS)
        await stage.drained()


# ── shards that have nothing, or are away ────────────────────────────────────────────────────────────────────────


async def test_an_empty_shard_is_no_hindrance(on_stage: OnStage) -> None:
    async with on_stage("nodes.replay.count=2") as stage:
        await stage.send(1, 1000)
        assert ((await stage.fill()).rows["obs"][0, :, 0] >= 1000).all()
        await stage.send(0, priority=1e6)
        await stage.fill()
        assert ((await stage.fill()).rows["obs"][0, :, 0] < 1000).sum() >= BATCH - 1
        await stage.drained()


async def test_who_waits_for_whom(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    async with on_stage("nodes.replay.count=2") as stage:
        filling = asyncio.create_task(stage.fill())
        waits = "samples wait for inserts: 0 of 20 items needed before sampling"
        await eventually(lambda: f"no batch: replay-0: {waits}; replay-1: {waits}" in caplog.text)
        assert stage.source.gauge()["sample_wait_s"] > 0.1
        await stage.send(0)
        assert (await filling).full
        await stage.drained()


async def test_a_lost_shard_is_left_out_until_it_is_back(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(samples, "LOST_S", 0.3)
    async with on_stage("nodes.replay.count=2", "algo.alpha=1") as stage:
        await stage.send(0)
        await stage.send(1, 1000, priority=50.0)
        for _ in range(2):
            slot = await stage.fill()
        assert (slot.rows["obs"][0, :, 0] >= 1000).any()
        await stage.killed(1)
        for _ in range(3):
            assert ((await stage.fill()).rows["obs"][0, :, 0] < 1000).all()
        assert stage.source.gauge()["shards_lost"] == 1
        assert caplog.text.count("replay-1 does not answer") == 1
        await stage.back(1)
        await stage.send(1, 2000, priority=50.0)
        await eventually(lambda: stage.source.shards[1].again.done())
        for _ in range(2):
            slot = await stage.fill()
        assert stage.source.gauge()["shards_lost"] == 0
        assert (slot.rows["obs"][0, :, 0] >= 2000).any()
        await stage.drained()


async def test_priorities_of_an_earlier_life_are_dropped_and_counted(on_stage: OnStage) -> None:
    """Its numbers may name other items now."""
    async with on_stage("algo.alpha=1") as stage:
        await stage.send(0)
        slots = [await stage.fill(number) for number in (0, 1)]
        await stage.killed(0)
        await stage.back(0)
        await stage.send(0)
        for slot in slots:
            slot.errors = np.full(BATCH, 1e6, np.float32)
        stage.source.trained(slots[0])
        await stage.fill(2)  # tells a life that is gone: the one that is there sees that
        assert stage.count("priorities/late") == BATCH
        stage.source.trained(slots[1])
        await stage.fill(0)  # by now the learner knows better
        assert stage.learner.count("priorities/late") == stage.count("priorities/late") == BATCH
        assert stage.count("priorities/applied") == 0
        await stage.drained()


async def test_when_all_shards_are_lost_the_first_that_is_back_goes_on(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(samples, "LOST_S", 0.2)
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.1)
    monkeypatch.setattr(samples, "PATIENCE_S", 0.05)
    async with on_stage("nodes.replay.count=2") as stage:
        for shard in (0, 1):
            await stage.send(shard)
            await stage.killed(shard)
        filling = asyncio.create_task(stage.fill())
        await eventually(lambda: "no batch: replay-0: no answer; replay-1: no answer" in caplog.text)
        assert stage.source.gauge()["shards_lost"] == 2
        await stage.back(1)
        await stage.send(1, 1000)
        assert ((await filling).rows["obs"][0, :, 0] >= 1000).all()
        await stage.back(0)
        await stage.drained()


async def test_items_of_another_shape_are_refused(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    async with on_stage() as stage:
        await stage.send(0)
        buffer = stage.shards["replay-0"].node.buffer
        with monkeypatch.context() as patched:
            patched.setattr(buffer, "specs", lambda n, k: {**type(buffer).specs(buffer, n, k), "id": ("int64", (n, 1))})
            patched.setattr(buffer, "sample", lambda count, allocate: allocate(buffer.specs(count, 0)))
            filling = asyncio.create_task(stage.fill())
            await eventually(lambda: "not what was asked for: schema" in caplog.text)
        assert (await filling).full
        assert stage.learner.count("samples/refused/schema") >= BATCH
        await stage.drained()


# ── the learner ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_learner_trains_on_what_is_drawn(on_stage: OnStage) -> None:
    """To the budget of what was played, not of what was trained on."""
    async with on_stage("nodes.replay.count=2", f"stop.steps={6 * ITEMS}", asks=False) as stage:
        weights = stage.rig.subscriber("evaluator-0", "weights")
        for shard in (0, 1):
            await stage.send(shard, 1000 * shard, unrolls=2)
        learner = stage.learner.node
        await eventually(lambda: learner.algo.updates >= 20)
        assert (learner.algo.env_steps, learner.done) == (4 * ITEMS, None)
        assert learner.gauge()["items"] == 4 * ITEMS
        await stage.send(0, unrolls=2)
        await eventually(lambda: learner.done == "steps")
        updates = learner.algo.updates
        assert learner.algo.env_steps == 6 * ITEMS
        stage.controller.say(phase="confirm", confirm=1)
        async with asyncio.timeout(PATIENCE_S):
            while not (said := parse(Weights, await weights.next())).confirm:
                pass
        assert said == Weights(env_steps=6 * ITEMS, updates=updates, confirm=1)
        await stage.drained()
        trained = stage.learner.count("samples/trained")
        assert trained == updates * BATCH
        assert stage.count("priorities/applied") + stage.count("priorities/late") == trained
        assert stage.count("items/drawn") - trained <= 5 * BATCH  # drawn ahead


async def test_a_resumed_learner_counts_on(on_stage: OnStage) -> None:
    async with on_stage(asks=False) as stage:
        await stage.send(0, unrolls=2)
        await eventually(lambda: stage.learner.node.algo.env_steps == 2 * ITEMS)
        await stage.learner.drained()
        await stage.send(0)
        stage.learner = stage.rig.start("learner-0", life=2)
        await stage.learner.running()
        await eventually(lambda: stage.learner.node.algo.env_steps == 3 * ITEMS)
        await stage.drained()


async def test_a_learner_that_is_ahead_of_its_replay_counts_what_is_new(on_stage: OnStage) -> None:
    """After a kill of both: the replay's checkpoint was the older one."""
    async with on_stage(asks=False) as stage:
        await stage.send(0, unrolls=3)
        await eventually(lambda: stage.learner.node.algo.env_steps == 3 * ITEMS)
        await stage.learner.drained()
        await stage.killed(0)
        await stage.back(0)
        stage.learner = stage.rig.start("learner-0", life=2)
        await stage.learner.running()
        await eventually(lambda: stage.learner.node.source.shards[0].life)
        await stage.send(0)
        await eventually(lambda: stage.learner.node.algo.env_steps == 4 * ITEMS)
        await stage.drained()


async def test_a_draw_that_fails_ends_the_learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no controller is heard, whose every word would wake it."""
    failing = asyncio.Event()

    async def fill(self: Samples, slot: Slot) -> Slot:
        await failing.wait()
        raise UsageError("nothing to draw")

    monkeypatch.setattr(Samples, "fill", fill)
    async with rig_of(tmp_path, *REPLAY) as rig:
        learner = rig.start("learner-0")
        await learner.running()
        await asyncio.sleep(0.05)
        failing.set()
        with pytest.raises(UsageError):
            async with asyncio.timeout(PATIENCE_S):
                await learner.task
