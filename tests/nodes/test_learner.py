"""A learner; a test plays actors and controller."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import PATIENCE_S, FakeController, Living, Rig, eventually, rig_of, unroll_of

from ddrl_bus import checkpoint
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.impala import Impala
from ddrl_bus.errors import RefusedFileError
from ddrl_bus.messages import Weights, parse
from ddrl_bus.nodes import tuning
from ddrl_bus.transport.links import Sender, Subscriber
from ddrl_bus.transport.wire import Arena, Array

UNROLL, BATCH = 5, 8
ROWS = UNROLL * BATCH
EXACT = "links.weights.precision=float32"


class Stage:
    """A learner, and the ends that it talks to."""

    def __init__(self, rig: Rig, inline: bool = True) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.weights: Subscriber = rig.subscriber("actor-1", "weights")
        self.actors: list[Sender] = [rig.sender(f"actor-{n}") for n in range(2)]
        self.learner: Living = rig.start("learner-0", inline=inline)

    async def send(self, envs: int = BATCH, version: int = 0, actor: int = 0, **rows: Any) -> None:
        async with asyncio.timeout(30):
            await self.actors[actor].send(*unroll_of(self.rig.plan, envs, version, **rows))

    async def updated(self, times: int) -> None:
        await eventually(lambda: self.algo is not None and self.algo.updates >= times)

    async def version(self, at_least: int) -> Weights:
        """The first published weights of this many updates, or of more."""
        async with asyncio.timeout(30):
            while (weights := parse(Weights, await self.weights.next())).updates < at_least:
                pass
        return weights

    @property
    def algo(self) -> Any:
        return getattr(self.learner.node, "algo", None)

    def evicted(self, reason: str) -> int:
        return self.learner.count(f"trajectories/evicted/{reason}")

    @property
    def saved(self) -> checkpoint.Checkpoint | None:
        return checkpoint.newest(self.rig.folder / "checkpoints")


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str, inline: bool = True) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *overrides) as rig:
            yield Stage(rig, inline)

    return made


def batches_of(stage: Stage) -> list[Batch]:
    """Fills with the batches that are trained on from now on."""
    seen: list[Batch] = []
    step = stage.algo.step

    def spy(batch: Batch, env_steps: int) -> dict[str, float]:
        seen.append(batch)
        report: dict[str, float] = step(batch, env_steps)
        return report

    stage.algo.step = spy
    return seen


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_publishes_before_it_has_learnt_and_after(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        first = await stage.version(0)
        assert (first.updates, first.env_steps, first.confirm) == (0, 0, 0)
        await stage.send()
        assert await stage.version(1) == Weights(env_steps=ROWS, updates=1)
        await stage.learner.drained()


async def test_publish_every(on_stage: OnStage) -> None:
    async with on_stage("nodes.learner.publish_every=3") as stage:
        assert (await stage.version(0)).updates == 0
        for n in range(1, 7):
            await stage.send()
            await stage.updated(n)
            await asyncio.sleep(0.01)
            published = stage.weights.latest()
            assert (published is not None) == (n % 3 == 0)
        await stage.learner.drained()


async def test_delay_publishes_what_was_the_newest_so_many_updates_ago(on_stage: OnStage) -> None:
    async with on_stage("nodes.learner.delay=2", EXACT) as stage:
        assert (await stage.version(0)).updates == 0
        arrays = [stage.algo.weights()]
        for n in range(1, 6):
            await stage.send(version=max(0, n - 3), reward=n)
            await stage.updated(n)
            arrays.append(stage.algo.weights())
            if n <= 2:
                await asyncio.sleep(0.01)
                assert stage.weights.latest() is None
                continue
            async with asyncio.timeout(30):
                message = await stage.weights.next()
            assert parse(Weights, message) == Weights(env_steps=(n - 2) * ROWS, updates=n - 2)
            for name, array in arrays[n - 2].items():
                np.testing.assert_array_equal(message.arrays[name], array, name)
        assert stage.learner.node.gauge()["lag_max"] == 2
        stage.controller.say(phase="confirm", confirm=1)
        assert await stage.version(5) == Weights(env_steps=5 * ROWS, updates=5, confirm=1)
        await stage.learner.drained()


# ── what it publishes ────────────────────────────────────────────────────────────────────────────────────────────


async def weights_of(stage: Stage, **expected: int) -> dict[str, Array]:
    """The first published weights whose fields are these."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            message = await stage.weights.next()
            if all(message.fields[name] == value for name, value in expected.items()):
                return message.arrays


async def test_actors_play_by_halves_and_what_is_confirmed_is_what_is_saved(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.version(0)
        await stage.send()
        halves = await weights_of(stage, updates=1)
        exact = stage.algo.weights()
        assert halves.keys() == exact.keys()
        for name, array in halves.items():
            assert array.dtype == np.float16
            np.testing.assert_array_equal(array, exact[name].astype(np.float16))
        stage.controller.say(phase="confirm", confirm=1)
        confirmed = await weights_of(stage, confirm=1)
        await stage.learner.drained()
        assert stage.saved is not None
        for name, array in confirmed.items():
            np.testing.assert_array_equal(array, stage.saved.arrays[f"net.{name}"], strict=True)
        assert any((halves[name] != array).any() for name, array in confirmed.items())


@pytest.mark.parametrize("value", [65_520.0, -1e6, float("inf")])
async def test_what_is_beyond_halves_is_published_whole(on_stage: OnStage, value: float, caplog: Any) -> None:
    """65,520 is the least that rounds to infinity; whoever plays by it needs the number that it is."""
    async with on_stage("nodes.learner.publish_every=1") as stage:
        await stage.version(0)
        bias = stage.algo.net.state_dict()["policy.bias"]
        stage.algo.step = lambda batch, env_steps: stage.algo.count(env_steps) or {}
        for n, (stored, dtype) in enumerate([(value, np.float32), (value, np.float32), (65_504.0, np.float16)]):
            bias[:] = stored
            await stage.send(version=n)
            arrays = await weights_of(stage, updates=n + 1)
            assert {array.dtype for array in arrays.values()} == {np.dtype(dtype)}
            assert arrays["policy.bias"].tolist() == [stored, stored]
        await stage.learner.drained()
    assert caplog.text.count("beyond float16") == 1


async def test_columns_of_several_actors_fill_a_batch(on_stage: OnStage) -> None:
    """Behaviour versions stand at their columns; rows and final rows are where the schema says."""
    async with on_stage() as stage:
        await stage.version(0)
        seen = batches_of(stage)
        await stage.send(envs=3, version=0, reward=1.0)
        await eventually(lambda: stage.learner.count("trajectories", "/taken") == 1)
        await stage.send(envs=5, actor=1, reward=2.0, terminated=True)
        await stage.updated(1)
        await stage.learner.drained()
    (batch,) = seen
    assert batch.obs.shape == (UNROLL + 1, BATCH, 4)
    assert batch.reward.tolist() == [[1.0] * 3 + [2.0] * 5] * UNROLL
    assert batch.terminated.tolist() == [[False] * 3 + [True] * 5] * UNROLL
    assert batch.record["policy"].shape == (UNROLL, BATCH, 2)
    assert len(batch.final_index) == len(batch.final_obs) == 0


async def test_truncated_rows_keep_their_final_observations(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.version(0)
        seen = batches_of(stage)
        await stage.send(envs=4, terminated=True)
        truncated, fields = unroll_of(stage.rig.plan, 4)
        truncated.arrays["truncated"][2, 1] = True
        final = {"final_index": np.array([2 * 4 + 1]), "final_obs": np.full((1, 4), 7, np.float32)}
        await stage.actors[0].send(truncated.extended(final), fields)
        await stage.updated(1)
        await stage.learner.drained()
    (batch,) = seen
    assert np.argwhere(batch.truncated).tolist() == [[2, 4 + 1]]
    assert not (batch.truncated & batch.terminated).any()
    assert batch.final_index.tolist() == [2 * BATCH + 4 + 1]
    assert batch.final_obs.tolist() == [[7.0] * 4]


async def test_what_does_not_fit_is_refused_and_counted(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.version(0)
        await stage.send(reward=np.nan)
        arena, fields = unroll_of(stage.rig.plan, 2)
        short = {name: array[:-1] for name, array in arena.arrays.items()}
        await stage.actors[1].send(Arena.of("trajectory", short), fields)
        await stage.actors[1].send(arena, {"version": "new"})
        await stage.send()
        await stage.updated(1)
        await stage.learner.drained()
        reasons = {r: stage.learner.count(f"trajectories/refused/{r}") for r in ("non_finite", "schema", "fields")}
        assert reasons == {"non_finite": 1, "schema": 1, "fields": 1}
        assert stage.learner.count("trajectories", "/refused") == 3
        assert stage.learner.count("trajectories/trained") == 1
        assert all(np.isfinite(array).all() for array in stage.algo.weights().values())


# ── staleness ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_lag", [1, 3])
async def test_what_is_too_old_is_evicted(on_stage: OnStage, max_lag: int) -> None:
    async with on_stage(f"links.trajectories.max_lag={max_lag}") as stage:
        for n in range(5):
            await stage.send(version=n)
            await stage.updated(n + 1)
        for version in (4 - max_lag, 5 - max_lag):  # the second one is just young enough
            await stage.send(version=version)
        await stage.updated(6)
        assert stage.evicted("stale") == 1
        assert stage.learner.node.gauge()["lag_max"] == max_lag
        await stage.learner.drained()
        assert stage.learner.count("trajectories/trained") == 6


async def test_no_batch_is_trained_on_beyond_the_bound(on_stage: OnStage) -> None:
    """Also not one that was young when it came and had to wait."""
    async with on_stage("links.trajectories.max_lag=1", "links.trajectories.window=16") as stage:
        await stage.version(0)
        for _ in range(12):
            await stage.send(version=0)
        await eventually(lambda: stage.learner.count("trajectories", "/taken") == 12)
        await eventually(lambda: stage.learner.count("trajectories/trained") + stage.evicted("stale") == 12)
        assert stage.learner.node.gauge()["lag_max"] <= 1
        assert 1 <= stage.algo.updates <= 2
        await stage.learner.drained()


async def test_without_a_bound_nothing_is_too_old(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        for n in range(5):
            await stage.send(version=0)
            await stage.updated(n + 1)
        assert stage.evicted("stale") == 0
        await stage.learner.drained()


LOCK_STEP = ("links.trajectories.max_lag=0", "links.trajectories.window=1")


async def test_lock_step_takes_one_of_every_actor_in_order(on_stage: OnStage) -> None:
    async with on_stage(*LOCK_STEP) as stage:
        await stage.version(0)
        seen = batches_of(stage)
        for n in range(3):
            for actor in ((0, 1), (1, 0), (1, 0))[n]:
                await stage.send(envs=4, version=n, actor=actor, reward=actor)
            await stage.updated(n + 1)
        await stage.learner.drained()
    assert [batch.reward[0].tolist() for batch in seen] == [[0.0] * 4 + [1.0] * 4] * 3


async def test_lock_step_goes_on_with_a_new_life(on_stage: OnStage) -> None:
    """An actor that died after it sent, and came back: one of its two unrolls counts, and nobody waits for ever."""
    async with on_stage(*LOCK_STEP) as stage:
        await stage.version(0)
        await stage.send(envs=4, actor=0)
        await eventually(lambda: stage.learner.count("trajectories", "/taken") == 1)
        stage.actors[0].close()
        stage.actors[0] = stage.rig.sender("actor-0", life=2)
        await stage.send(envs=4, actor=0)
        await eventually(lambda: stage.learner.count("trajectories", "/taken") == 2)
        await stage.send(envs=4, actor=1)
        await stage.updated(1)
        assert stage.evicted("superseded") == 1
        await stage.send(envs=4, actor=0, version=0)  # a left-over
        for actor in (0, 1):
            await stage.send(envs=4, actor=actor, version=1)
        await stage.updated(2)
        assert stage.evicted("stale") == 1
        await stage.learner.drained()


# ── budget, confirmation, drain ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("trainers", [1, 4])
@pytest.mark.parametrize("steps", [3 * ROWS, 3 * ROWS - 1, 2 * ROWS + 1])
async def test_the_budget_is_counted_in_trained_rows(on_stage: OnStage, steps: int, trainers: int) -> None:
    settings = (f"stop.steps={steps}", "links.trajectories.window=16", f"nodes.learner.trainers={trainers}")
    async with on_stage(*settings, inline=trainers == 1) as stage:
        for _ in range(6):
            await stage.send()
        await eventually(lambda: (said := stage.controller.last("learner-0")) and said.done == "steps")
        assert (stage.algo.updates, stage.algo.env_steps) == (3, 3 * ROWS)
        await asyncio.sleep(0.05)
        assert stage.algo.updates == 3
        await stage.learner.drained()
        assert stage.saved is not None
        assert stage.saved.step == 3 * ROWS
        assert stage.learner.count("trajectories/trained") == 3
        assert stage.evicted("drained") == stage.learner.count("trajectories", "/taken") - 3


async def test_a_confirmation_holds_training_still(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.send()
        await stage.version(1)
        stage.controller.say(phase="confirm", confirm=3)
        assert await stage.version(1) == Weights(env_steps=ROWS, updates=1, confirm=3)
        await stage.send()
        await asyncio.sleep(0.1)
        assert stage.algo.updates == 1
        assert stage.weights.latest() is None  # each number is answered once
        stage.controller.say(phase="run")
        assert (await stage.version(2)).confirm == 0
        stage.controller.say(phase="confirm", confirm=4)
        async with asyncio.timeout(30):
            while parse(Weights, await stage.weights.next()).confirm != 4:
                pass
        await stage.learner.drained()


async def test_draining_settles_and_saves(on_stage: OnStage) -> None:
    """Every unroll that was taken is trained on or evicted, and the weights that were left are on disk."""
    async with on_stage() as stage:
        await stage.send()
        await stage.updated(1)
        await stage.send(envs=3)  # fills no batch
        await stage.actors[0].flush(10)
        await stage.learner.drained()
        assert stage.learner.count("trajectories", "/taken") == 2
        assert (stage.learner.count("trajectories/trained"), stage.evicted("drained")) == (1, 1)
        assert stage.saved is not None
        for name, array in stage.algo.weights().items():
            np.testing.assert_array_equal(stage.saved.arrays[f"net.{name}"], array)


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_checkpoints_while_it_trains(on_stage: OnStage) -> None:
    async with on_stage("checkpoint.every=0s", "checkpoint.keep=2") as stage:
        for n in range(4):
            await stage.send()
            await stage.updated(n + 1)
        await eventually(lambda: stage.saved is not None and stage.saved.step == 4 * ROWS)
        folders = sorted(path.name for path in (stage.rig.folder / "checkpoints").iterdir())
        assert folders == [f"{3 * ROWS:012d}", f"{4 * ROWS:012d}"]
        await stage.learner.drained()


async def test_it_resumes_where_it_left(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        for n in range(2):
            await stage.send(reward=n)
            await stage.updated(n + 1)
        await stage.learner.drained()
        before = stage.algo.state()
        stage.weights.latest()
        stage.learner = stage.rig.start("learner-0", life=2)
        first = await stage.version(0)
        assert (first.updates, first.env_steps) == (2, 2 * ROWS)
        for name, array in stage.algo.state().items():
            np.testing.assert_array_equal(array, before[name], name)
        await stage.send()
        assert await stage.version(3) == Weights(env_steps=3 * ROWS, updates=3)
        await stage.learner.drained()


async def test_it_does_not_start_over_a_damaged_checkpoint(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.version(0)
        await stage.learner.drained()
        (saved,) = (stage.rig.folder / "checkpoints").iterdir()
        (saved / "arrays.safetensors").write_bytes(b"")
        stage.learner = stage.rig.start("learner-0", life=2)
        with pytest.raises(RefusedFileError, match="no checkpoint is whole"):
            await stage.learner.task


async def test_a_disk_that_takes_nothing_does_not_end_training(on_stage: OnStage, caplog: Any) -> None:
    async with on_stage("checkpoint.every=0s") as stage:
        (stage.rig.folder / "checkpoints").touch()  # no folder can be made here
        for n in range(2):
            await stage.send()
            await stage.updated(n + 1)
        await stage.learner.drained()
        assert stage.learner.node.state == "stopped"
    assert "checkpoint not written" in caplog.text


# ── several trainers ─────────────────────────────────────────────────────────────────────────────────────────────


def gradients_of(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[Batch], Any] = lambda batch: None
) -> list[dict[str, Array]]:
    """Fills with the parameters of each gradient that is computed, after `first` has returned for its batch."""
    seen: list[dict[str, Array]] = []
    gradients = Impala.gradients

    def spy(self: Impala, batch: Batch) -> Any:
        first(batch)
        seen.append(self.weights())
        return gradients(self, batch)

    monkeypatch.setattr(Impala, "gradients", spy)
    return seen


def versions_of(stage: Stage) -> list[dict[str, Array]]:
    """The parameters now, and after each update from now on, which takes long enough to be looked into."""
    versions = [stage.algo.weights()]
    bias, descend = stage.algo.net.policy.bias.data, stage.algo.optimizer.step

    def slow() -> None:
        bias.add_(1000.0)
        time.sleep(0.005)
        bias.sub_(1000.0)
        descend()
        versions.append(stage.algo.weights())

    stage.algo.optimizer.step = slow
    return versions


def same(some: dict[str, Array], others: dict[str, Array]) -> bool:
    return all(np.array_equal(array, others[name]) for name, array in some.items())


async def test_as_many_gradients_at_a_time_as_trainers(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes an update, and the age of its rows is what it is when it changes the parameters."""
    together = threading.Barrier(3, timeout=PATIENCE_S)
    gradients_of(monkeypatch, lambda batch: together.wait())
    async with on_stage("nodes.learner.trainers=3", "links.trajectories.window=16", inline=False) as stage:
        await stage.version(0)
        for _ in range(12):
            await stage.send()
        await stage.updated(12)
        await stage.learner.drained()
        assert (stage.algo.updates, stage.algo.env_steps) == (12, 12 * ROWS)
        assert stage.learner.count("trajectories/trained") == 12
        assert [int(lag.min()) for lag in stage.learner.node.lags] == list(range(12))
        assert stage.learner.node.gauge()["trainers"] == 3


async def test_no_trainer_sees_half_an_update(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is published is whole, whichever thread is first: every second version, two updates late."""
    seen = gradients_of(monkeypatch)
    published: dict[int, dict[str, Array]] = {}
    settings = ("nodes.learner.publish_every=2", "nodes.learner.delay=2", "links.trajectories.window=16", EXACT)
    async with on_stage("nodes.learner.trainers=3", *settings, inline=False) as stage:
        first = await stage.version(0)
        versions = versions_of(stage)
        for n in range(30):
            await stage.send(reward=n)
            if message := stage.weights.latest():
                published[parse(Weights, message).updates] = dict(message.arrays)
        await stage.updated(30)
        last = await stage.version(28)
        await stage.learner.drained()
    assert (first.updates, last.updates, len(seen), len(versions)) == (0, 28, 30, 31)
    assert all(any(same(parameters, version) for version in versions) for parameters in seen)
    assert list(published) == sorted(published)
    for updates, arrays in published.items():
        assert updates % 2 == 0
        assert same(arrays, versions[updates])


async def test_a_trainer_that_was_overtaken_publishes_nothing_older(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    overtaken = threading.Event()
    gradients_of(monkeypatch, lambda batch: batch.reward[0, 0] or overtaken.wait(PATIENCE_S))
    async with on_stage("nodes.learner.trainers=2", inline=False) as stage:
        await stage.version(0)
        for n in range(2):
            await stage.send(reward=n)  # the first one, whichever thread is quicker, is overtaken by the second
        await stage.updated(1)
        overtaken.set()
        await eventually(lambda: stage.learner.count("trajectories/trained") == 2)
        assert (await stage.version(1)).updates == 2
        await stage.learner.drained()
        assert stage.weights.latest() is None


@pytest.mark.parametrize("trainers", ["2", "auto"])
async def test_in_turn_several_trainers_learn_what_one_learns(tmp_path: Path, trainers: str) -> None:
    states = []
    for number in (trainers, "1"):
        (tmp_path / number).mkdir()
        async with rig_of(tmp_path / number, f"nodes.learner.trainers={number}") as rig:
            stage = Stage(rig, inline=False)
            await stage.version(0)
            for n in range(4):
                await stage.send(reward=n)
                await stage.updated(n + 1)
            await stage.learner.drained()
            states.append(stage.algo.state())
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], name)


async def test_the_number_of_trainers_is_tuned(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one to as many as there are cores, and each number has the slots that it needs."""
    monkeypatch.setattr(tuning, "TUNE_S", 0.002)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    numbers: set[int] = set()
    async with on_stage("nodes.learner.trainers=auto", "links.trajectories.window=16", inline=False) as stage:
        await stage.version(0)
        node, sent = stage.learner.node, 0
        while numbers != {1, 2, 3} or sent < 100:
            await stage.send()
            sent += 1
            going_round = node.free.qsize() + len(node.ready) + len(node.training) + 1  # one fills
            assert node.in_use + 1 <= going_round <= node.in_use + 3  # one may be on its way out or in
            numbers.add(node.in_use)
        await stage.updated(sent)
        await stage.learner.drained()
        assert (stage.algo.env_steps, stage.learner.count("trajectories/trained")) == (sent * ROWS, sent)
