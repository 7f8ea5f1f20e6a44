"""A replay node; a test plays actors, learners and the controller."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import contents
from rig import PATIENCE_S, REPLAY, FakeController, Living, Rig, epoch, eventually, make_plan, replayed, rig_of

from ddrl_bus import checkpoint
from ddrl_bus.errors import RemoteError, UsageError
from ddrl_bus.experience import Unroll
from ddrl_bus.messages import Sample, Sampled, Trajectory, fields_of, parse
from ddrl_bus.nodes import replay, waiting
from ddrl_bus.transport.links import Client, Sender
from ddrl_bus.transport.sessions import request
from ddrl_bus.transport.wire import Array, Message

UNROLL, ENVS, BATCH = 5, 4, 8
ITEMS = UNROLL * ENVS
"""Of an unroll."""


class Stage:
    """A replay node, and the ends that talk to it."""

    def __init__(self, rig: Rig, inline: bool) -> None:
        self.rig = rig
        self.inline = inline
        self.controller: FakeController = rig.fake_controller()
        self.actor: Sender = rig.sender("actor-0")
        self.client: Client = rig.client("learner-0", "samples")
        self.sent = 0
        self.replay: Living = rig.start("replay-0", inline=inline)

    async def restarted(self) -> None:
        await self.replay.drained()
        self.replay = self.rig.start("replay-0", life=(self.node.epoch >> 32) + 1, inline=self.inline)
        await self.replay.running()

    async def send(self, unrolls: int = 1, **rows: Any) -> None:
        """Unrolls whose observations count on; returns when they are stored."""
        stored = self.stored + unrolls
        for _ in range(unrolls):
            arena, fields = replayed(self.node.schema, ENVS, self.sent, **rows)
            self.sent += arena.arrays["obs"].shape[0] * ENVS
            async with asyncio.timeout(PATIENCE_S):
                await self.actor.send(arena, fields)
        await eventually(lambda: self.stored == stored)

    async def ask(self, count: int, arrays: Mapping[str, Array] | None = None, life: int = 1) -> Message:
        sample = fields_of(Sample(count, epoch(life)))
        return await self.client.request(Sample.KIND, sample, arrays, timeout_s=PATIENCE_S)

    async def totals(self, arrays: Mapping[str, Array] | None = None, life: int = 1) -> Sampled:
        return parse(Sampled, await self.ask(0, arrays, life))

    @property
    def node(self) -> Any:
        return self.replay.node

    @property
    def stored(self) -> int:
        return self.replay.count("trajectories/stored")

    @property
    def drawn(self) -> int:
        return self.replay.count("items/drawn")


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str, in_process: bool = True) -> AsyncIterator[Stage]:
        plan = make_plan(tmp_path, *REPLAY, *overrides, in_process=in_process)
        rig = Rig(dataclasses.replace(plan, ipc_dir=tmp_path), tmp_path / "run")
        try:
            stage = Stage(rig, inline=in_process)
            await stage.replay.running()
            yield stage
        finally:
            await rig.close()

    return made


# ── in and out ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("in_process", [True, False], ids=["memory", "ipc"])
async def test_what_is_drawn_is_what_was_stored(on_stage: OnStage, in_process: bool) -> None:
    async with on_stage(in_process=in_process) as stage:
        await stage.send(3, reward=np.arange(7)[:, None], version=3)
        answer = await stage.ask(BATCH)
        sampled, arrays = parse(Sampled, answer), answer.arrays
        assert (sampled.items, sampled.env_steps, sampled.waits) == (3 * ITEMS, 3 * ITEMS, "")
        assert sampled.mass == pytest.approx(3 * ITEMS, rel=1e-3)
        assert {name: array.shape for name, array in arrays.items()} == {
            "obs": (3, BATCH, 4),
            **dict.fromkeys(("action", "reward", "terminated", "truncated", "version"), (2, BATCH)),
            **dict.fromkeys(("id", "probability"), (BATCH,)),
        }
        first = arrays["obs"][0, :, 0].astype(int)
        assert first.max() < stage.sent
        np.testing.assert_array_equal(arrays["obs"][1, :, 0], first + 1)
        np.testing.assert_array_equal(arrays["reward"], first % 8 + np.arange(2)[:, None])
        np.testing.assert_array_equal(arrays["id"], first // 8 * UNROLL + first % 8)
        np.testing.assert_allclose(arrays["probability"], 1 / (3 * ITEMS))
        assert (arrays["version"] == 3).all()
        assert (stage.drawn, stage.replay.count("trajectories/", "/taken")) == (BATCH, 3)
        await stage.replay.drained()


async def test_the_oldest_go(on_stage: OnStage) -> None:
    async with on_stage("nodes.replay.capacity=40") as stage:
        await stage.send(3)
        assert (await stage.totals()).items == 2 * ITEMS
        assert stage.replay.count("items/evicted") == ITEMS
        assert (await stage.ask(BATCH)).arrays["id"].min() >= ITEMS
        assert stage.node.gauge()["env_steps"] == 3 * ITEMS
        await stage.replay.drained()


async def test_a_question_waits_and_is_drawn_for_once(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is repeated meanwhile."""
    monkeypatch.setattr(request, "REPEAT_S", 0.01)
    monkeypatch.setattr(replay, "KEPT_S", 1000.0)
    async with on_stage() as stage:
        asking = asyncio.create_task(stage.ask(BATCH))
        await eventually(lambda: stage.replay.count("samples/stray/running") >= 3)
        assert not asking.done()
        await stage.send()
        assert len((await asking).arrays["id"]) == BATCH
        assert (stage.drawn, stage.node.limiter.samples) == (BATCH, BATCH)
        await stage.replay.drained()


async def test_a_question_that_waited_long_is_told_why(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "KEPT_S", 0.02)
    async with on_stage() as stage:
        answer = await stage.ask(BATCH)
        assert answer.arrays == {}
        assert parse(Sampled, answer).waits == "samples wait for inserts: 0 of 20 items needed before sampling"
        assert stage.node.gauge()["sample_wait_s"] > 0
        await stage.send()
        assert not parse(Sampled, await stage.ask(BATCH)).waits
        await stage.replay.drained()


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("at most a batch of 8", {"count": 9}),
        ("at most a batch of 8", {"count": -1}),
        ("fields", {"count": "all"}),
        ("expected id [K] int64", {"count": 1, "arrays": {"id": np.zeros(2, np.int64)}}),
        ("expected id [K] int64", {"count": 1, "arrays": {"id": np.zeros(2), "priority": np.zeros(2, np.float32)}}),
        (
            "expected id [K] int64",
            {"count": 1, "arrays": {"id": np.zeros(2, np.int64), "priority": np.zeros(3, np.float32)}},
        ),
        ("no learner", {"count": 1, "node": "learner-7"}),
    ],
)
async def test_what_is_refused(on_stage: OnStage, words: str, asked: dict[str, Any]) -> None:
    async with on_stage() as stage:
        await stage.send()
        (address,) = stage.rig.plan.ports("learner-0")["samples"].peers.values()
        client = stage.rig.bus(asked.get("node", "learner-0"), 2).client("samples", address)
        with pytest.raises(RemoteError) as refused:
            await client.request(Sample.KIND, {"count": asked["count"]}, asked.get("arrays"), timeout_s=PATIENCE_S)
        assert words in str(refused.value)
        assert stage.drawn == 0
        await stage.replay.drained()


async def test_an_unroll_that_does_not_fit_is_refused(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.actor.send(*replayed(stage.node.schema, ENVS, priority=np.nan))
        await eventually(lambda: stage.replay.count("trajectories/refused/non_finite") == 1)
        assert (await stage.totals()).items == 0
        await stage.replay.drained()


@pytest.mark.parametrize("envs", [0, ENVS + 1])
async def test_an_unroll_of_as_many_environments_as_no_actor_has_is_refused(on_stage: OnStage, envs: int) -> None:
    async with on_stage() as stage:
        unroll = Unroll(stage.node.schema.layout(envs))
        for array in unroll.rows.values():
            array[...] = 0
        await stage.actor.send(unroll.finish(), fields_of(Trajectory(0, [], [])))
        await eventually(lambda: stage.replay.count("trajectories/refused/schema") == 1)
        await stage.send()
        assert (await stage.totals()).items == ITEMS
        await stage.replay.drained()


@pytest.mark.parametrize(("batch", "fits"), [(1_700_000, True), (1_800_000, False)])
async def test_a_batch_that_no_answer_can_hold_is_refused_at_the_start(tmp_path: Path, batch: int, fits: bool) -> None:
    """A window of two rows of CartPole takes 156 bytes with all that may be in it, an answer 256 MiB."""
    async with rig_of(tmp_path, *REPLAY, f"algo.batch={batch}") as rig:
        living = rig.start("replay-0")
        if fits:
            await living.running()
            return
        with pytest.raises(UsageError, match=r"algo\.batch: got 1,800,000, .* expected at most .* are 1,7\d\d,\d\d\d$"):
            async with asyncio.timeout(PATIENCE_S):
                await living.task


# ── who waits ────────────────────────────────────────────────────────────────────────────────────────────────────

TIGHT = ("nodes.replay.samples_per_insert=1", "nodes.replay.slack=20", "links.trajectories.window=1")


async def test_inserts_wait_for_samples(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Nothing is taken of what may not be stored: its sender runs out of credit."""
    monkeypatch.setattr(waiting, "PATIENCE_S", 0.0)
    async with on_stage(*TIGHT) as stage:
        await stage.send(2)  # the first is `min_size`, the second what slack allows
        await stage.actor.send(*replayed(stage.node.schema))
        await eventually(lambda: stage.node.receiver.queued == 1)
        assert not stage.actor.try_send(*replayed(stage.node.schema))
        await eventually(lambda: "inserts wait for samples" in caplog.text)
        assert (stage.stored, stage.node.receiver.queued) == (2, 1)
        for drawn in (8, 16, 24):  # 20 are one insert's
            assert stage.stored == 2
            await stage.ask(BATCH)
            assert stage.drawn == drawn
        await eventually(lambda: stage.stored == 3)
        assert stage.node.gauge()["insert_wait_s"] > 0
        await stage.replay.drained()


async def test_a_flood_at_the_start_keeps_within_the_slack(on_stage: OnStage) -> None:
    async with on_stage(*TIGHT[:2], "links.trajectories.window=10") as stage:
        await eventually(lambda: stage.actor.credit == 10)
        for _ in range(10):
            assert stage.actor.try_send(*replayed(stage.node.schema))
        await eventually(lambda: stage.node.insert_wait.words and stage.stored == 2)
        assert stage.node.receiver.queued == 8  # the first was `min_size`, the second what slack allows
        await stage.replay.drained()


async def test_both_sides_keep_the_ratio(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fast as they can, both at once."""
    async with on_stage(*TIGHT) as stage:
        found: list[int] = []
        for what in ("inserted", "sampled"):
            monkeypatch.setattr(stage.node.limiter, what, _spy(stage.node.limiter, what, found))

        async def inserts() -> None:
            for _ in range(50):
                await stage.actor.send(*replayed(stage.node.schema))

        async def samples() -> None:
            while stage.drawn < 48 * ITEMS:
                await stage.ask(BATCH)

        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(inserts(), samples())
        assert len(found) > 150
        assert max(abs(owed) for owed in found) <= 20
        assert stage.node.gauge()["samples_per_insert"] == pytest.approx(1.0, abs=0.05)
        await stage.replay.drained()


def _spy(limiter: Any, what: str, found: list[int]) -> Callable[[int], None]:
    """Notes after each call how many samples are owed."""
    real: Callable[[int], None] = getattr(limiter, what)

    def spy(items: int) -> None:
        real(items)
        if limiter.inserts >= limiter.min_size:
            found.append(limiter.inserts - limiter.min_size - limiter.samples)

    return spy


async def test_a_run_that_drains_keeps_nobody_waiting(on_stage: OnStage) -> None:
    async with on_stage(*TIGHT) as stage:
        await stage.send(2)
        await stage.actor.send(*replayed(stage.node.schema))
        await eventually(lambda: stage.node.receiver.queued == 1)
        flushing = asyncio.create_task(_sends(stage, 3))
        stage.controller.say(phase="drain", draining=["actor-0"])
        await flushing
        await eventually(lambda: stage.stored == 6)
        await stage.actor.send(*replayed(stage.node.schema))
        stage.controller.say(draining=["actor-0", "learner-0", "replay-0"])
        async with asyncio.timeout(PATIENCE_S):
            await stage.replay.task
        assert stage.replay.count("trajectories/", "/accepted") == stage.replay.count("trajectories/", "/taken")
        assert stage.replay.count("trajectories/", "/taken") == stage.stored


async def _sends(stage: Stage, unrolls: int) -> None:
    for _ in range(unrolls):
        await stage.actor.send(*replayed(stage.node.schema))


# ── priorities ───────────────────────────────────────────────────────────────────────────────────────────────────


def named(items: list[int], priority: list[float]) -> dict[str, Array]:
    return {"id": np.array(items, np.int64), "priority": np.array(priority, np.float32)}


async def test_new_priorities_ride_on_questions(on_stage: OnStage) -> None:
    async with on_stage("algo.alpha=1") as stage:
        await stage.send()
        assert (await stage.totals(named([0, 1, 0], [5.0, 7.0, 3.0]))).mass == pytest.approx(ITEMS + 2 + 6, rel=1e-3)
        answer = await stage.ask(BATCH, named(list(range(2, ITEMS)), [0.0] * (ITEMS - 2)))
        assert set(answer.arrays["id"]) <= {0, 1}
        expected = np.where(answer.arrays["id"] == 0, 0.3, 0.7)
        np.testing.assert_allclose(answer.arrays["probability"], expected, rtol=1e-3)
        assert stage.replay.count("priorities/applied") == 3 + ITEMS - 2
        await stage.replay.drained()


@pytest.mark.parametrize(
    ("outcome", "life", "items", "priority"),
    [
        ("late", 1, [0, 19], [9.0, 9.0]),  # evicted
        ("late", 1, [60, -1], [9.0, 9.0]),  # never given
        ("late", 2, [40, 41], [9.0, 9.0]),  # given by another life
        ("refused", 1, [40, 41, 42], [np.nan, np.inf, -1.0]),
    ],
)
async def test_priorities_that_change_nothing(
    on_stage: OnStage, outcome: str, life: int, items: list[int], priority: list[float]
) -> None:
    async with on_stage("nodes.replay.capacity=40") as stage:
        await stage.send(3)
        before = contents(stage.node.buffer)["leaves"]
        await stage.totals(named(items, priority), life)
        np.testing.assert_array_equal(contents(stage.node.buffer)["leaves"], before)
        assert stage.replay.count(f"priorities/{outcome}") == len(items)
        assert stage.replay.count("priorities/applied") == 0
        await stage.replay.drained()


async def test_priorities_of_a_question_that_waits_are_applied_at_once(on_stage: OnStage) -> None:
    async with on_stage("nodes.replay.min_size=40", "algo.alpha=1") as stage:
        await stage.send()
        asking = asyncio.create_task(stage.ask(BATCH, named([0], [100.0])))
        await eventually(lambda: stage.node.buffer.mass > 100)
        assert not asking.done()
        assert (await stage.totals(named([0], [1.0]))).waits  # answered in turn, after KEPT_S
        assert parse(Sampled, await asking).waits
        assert stage.replay.count("priorities/applied") == 2
        await stage.replay.drained()


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_goes_on_where_it_left(on_stage: OnStage) -> None:
    async with on_stage(
        "nodes.replay.samples_per_insert=4", "nodes.replay.capacity=40", "nodes.replay.slack=900"
    ) as stage:
        await stage.send(3, priority=np.arange(1, ITEMS + 1).reshape(UNROLL, ENVS))
        await stage.ask(BATCH, named([50], [9.0]))
        before, counts = contents(stage.node.buffer), stage.node.limiter.state()
        await stage.restarted()
        assert (stage.node.limiter.state(), stage.node.env_steps) == (counts, 3 * ITEMS)
        after = contents(stage.node.buffer)
        assert after.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, name)
        assert [path.name for path in (stage.rig.folder / "checkpoints-replay-0").iterdir()] == [f"{3 * ITEMS:012d}"]
        answer = await stage.ask(BATCH)  # what the earlier life would have drawn next
        await stage.replay.drained()
        stage.node.buffer.load_state(before)
        drawn = stage.node.buffer.sample(BATCH, lambda specs: {n: np.empty(s, d) for n, (d, s) in specs.items()})
        np.testing.assert_array_equal(answer.arrays["id"], drawn["id"])


async def test_contents_may_be_left_out_of_checkpoints(on_stage: OnStage) -> None:
    async with on_stage("nodes.replay.save=false") as stage:
        await stage.send()
        await stage.restarted()
        waits = "samples wait for inserts: 0 of 20 items needed before sampling"
        assert await stage.totals(life=2) == Sampled(0, 0.0, ITEMS, waits)
        await stage.replay.drained()


async def test_it_saves_now_and_then(on_stage: OnStage, caplog: Any) -> None:
    async with on_stage("checkpoint.every=1ms") as stage:
        await stage.send()
        folder = stage.rig.folder / "checkpoints-replay-0"
        await asyncio.sleep(0.002)
        await stage.totals()
        saved = await eventually(lambda: checkpoint.newest(folder))
        assert (saved.step, saved.values["limiter"]) == (ITEMS, {"inserts": ITEMS, "samples": 0})
        folder.rename(folder.with_name("elsewhere"))
        folder.touch()  # no folder can be made here
        await asyncio.sleep(0.002)
        await stage.totals()
        await eventually(lambda: "checkpoint not written" in caplog.text)
        await stage.replay.drained()


async def test_a_checkpoint_under_way_keeps_no_answer_waiting(
    on_stage: OnStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor unrolls, until they would replace what is not yet written; what is written is of the instant it began."""
    go_on, save = threading.Event(), checkpoint.save

    def slow(*args: Any, **more: Any) -> Path:
        assert go_on.wait(PATIENCE_S)
        return save(*args, **more)

    async with on_stage("nodes.replay.capacity=40", "algo.alpha=1", in_process=False) as stage:
        await stage.send()
        before = contents(stage.node.buffer)
        monkeypatch.setattr(checkpoint, "save", slow)
        stage.node.save_at = 0.0
        await stage.totals()
        try:
            await stage.send()
            await stage.actor.send(*replayed(stage.node.schema, first=stage.sent))
            assert len((await stage.ask(BATCH, named([0], [100.0]))).arrays["id"]) == BATCH
            await eventually(lambda: stage.node.receiver.queued == 1)
            assert len((await stage.ask(BATCH)).arrays["id"]) == BATCH
            assert stage.stored == 2
        finally:
            go_on.set()
        await eventually(lambda: stage.stored == 3)
        await stage.node.saving
        saved = checkpoint.newest(stage.rig.folder / "checkpoints-replay-0")
        assert saved is not None
        assert (saved.step, saved.values["limiter"]) == (ITEMS, {"inserts": ITEMS, "samples": 0})
        assert saved.arrays.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(saved.arrays[name], array, name)
        await stage.replay.drained()
