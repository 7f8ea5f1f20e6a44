"""An inference node, asked by actors that a test plays, and by real ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import walks
from rig import FakeController, Living, Rig, epoch, eventually, net, publish_weights, rig_of

from ddrl_bus import algos
from ddrl_bus.envs import describe
from ddrl_bus.errors import FencedError, RemoteError
from ddrl_bus.experience import UnrollSchema, under
from ddrl_bus.messages import Act, Actions, Trajectory, fields_of, parse
from ddrl_bus.nodes import batching, tuning
from ddrl_bus.transport.links import Client, Publisher, Receiver
from ddrl_bus.transport.wire import Array, Message

ENVS, UNROLL = 2, 5
SCHEMA = UnrollSchema(("float32", (2,)), ("int64", ()), {"policy": ("float32", (2,))}, UNROLL)
ASKED = (
    *("nodes.inference.kind=inference", "links.act.kind=request", "links.weights.to=[inference,evaluator]"),
    *("nodes.actor.groups=2", "env.id=Walk-v0"),
)
SEED, GA3C = (*ASKED, "links.trajectories.from=inference"), (*ASKED, "links.trajectories.from=actor")


class Asker:
    """One group of environments in a test's hands: walkers that are at the number of the step, and reward it."""

    def __init__(self, client: Client, group: int, step: int = 0, length: int = 100) -> None:
        self.client, self.group, self.step, self.length = client, group, step, length
        self.fresh = True

    def ask(self, again: bool = False, begins: bool = False, **arrays: Any) -> asyncio.Future[Message]:
        """The next step's question, or the last one's once more."""
        self.step += -1 if again else 0
        position = np.full((ENVS, 2), self.step, np.float32)
        ends = np.full(ENVS, self.step % self.length == 0)
        outcome = {"reward": position[:, 0], "terminated": ends, "truncated": np.zeros(ENVS, bool)}
        rows = {"obs": position, **({} if self.fresh else outcome), **arrays}
        returns = [1.0] * ENVS if ends.all() and not self.fresh else []
        act = Act(self.group, self.step, begins, returns, [self.length] * len(returns))
        self.step += 1
        self.fresh = False
        return self.client.ask(Act.KIND, fields_of(act), rows, timeout_s=20)


class Stage:
    """An inference node, and the ends that it talks to."""

    def __init__(self, rig: Rig, assembles: bool, shapes: dict[str, Array], inline: bool) -> None:
        self.rig, self._net = rig, shapes
        self.clients: dict[tuple[str, int], Client] = {}
        self.controller: FakeController = rig.fake_controller()
        self.weights: Publisher = rig.publisher("learner-0", "weights")
        self.trajectories: Receiver | None = rig.receiver("learner-0") if assembles else None
        self.inference: Living = rig.start("inference-0", inline=inline)
        self.publish(3)

    def publish(self, updates: int) -> None:
        publish_weights(self.weights, updates, self._net)

    def asker(self, actor: str = "actor-0", group: int = 0, life: int = 1, **more: int) -> Asker:
        if (actor, life) not in self.clients:
            self.clients[actor, life] = self.rig.client(actor, "act", life)
        return Asker(self.clients[actor, life], group, **more)

    async def unrolls(self, n: int) -> list[Message]:
        assert self.trajectories is not None
        async with asyncio.timeout(20):
            return [await self.trajectories.recv() for _ in range(n)]

    async def left(self) -> dict[str, int]:
        """Its books after it drained."""
        await self.inference.drained()
        return self.inference.books


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(wiring: tuple[str, ...], *overrides: str, inline: bool = True) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *wiring, *overrides) as rig:
            shapes = net()
            shapes["torso.0.weight"] = np.zeros((8, 2), np.float32)
            if rig.plan.algo.core != "none":
                spaces = describe(rig.plan.env)
                shapes = algos.algorithm(rig.plan.algo_name)(rig.plan.algo, spaces, seed=1).weights()
            stage = Stage(rig, wiring is SEED, shapes, inline)
            await stage.inference.running()
            yield stage

    return made


def positions(message: Message) -> list[float]:
    """[T+1] of the first environment."""
    found: list[float] = message.arrays["obs"][:, 0, 0].tolist()
    return found


# ── unrolls ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_unrolls_of_what_was_said(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        asker = stage.asker(length=4)
        said = [await asker.ask() for _ in range(2 * UNROLL + 1)]
        messages = await stage.unrolls(2)
        books = await stage.left()
    for message in said:
        assert list(message.arrays) == ["action"]
        assert parse(Actions, message) == Actions(3, epoch(1))
    for n, message in enumerate(messages):
        assert SCHEMA.check(message) is None
        steps = list(range(n * UNROLL, (n + 1) * UNROLL))
        rows = message.arrays
        assert positions(message) == [*steps, steps[-1] + 1]
        assert rows["action"].tolist() == [said[step].arrays["action"].tolist() for step in steps]
        assert rows["reward"][:, 1].tolist() == [step + 1 for step in steps]
        assert rows["terminated"][:, 0].tolist() == [(step + 1) % 4 == 0 for step in steps]
        assert rows["version"].tolist() == [3] * UNROLL
    assert parse(Trajectory, messages[0]) == Trajectory(epoch(1), [1.0] * ENVS, [4] * ENVS)
    assert (books["act/rows"], books["unfinished"]) == ((2 * UNROLL + 1) * ENVS, ENVS)


async def test_truncated_rows_bring_their_final_observations(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        asker = stage.asker()
        for step in range(UNROLL + 1):
            if step == 3:
                cut = {"truncated": np.array([False, True]), "final_index": np.array([1])}
                await asker.ask(**cut, final_obs=np.full((1, 2), 9, np.float32))
            else:
                await asker.ask()
        (message,) = await stage.unrolls(1)
    assert SCHEMA.check(message) is None
    assert message.arrays["final_index"].tolist() == [2 * ENVS + 1]
    assert message.arrays["final_obs"].tolist() == [[9, 9]]


async def test_the_policy_may_change_within_an_unroll(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        asker = stage.asker()
        await asker.ask()
        stage.publish(4)
        while parse(Actions, await asker.ask()).version != 4:
            pass
        while asker.step <= UNROLL:
            await asker.ask()
        versions = (await stage.unrolls(1))[0].arrays["version"]
    assert versions[0] == 3
    assert versions[-1] == 4
    assert (np.diff(versions) >= 0).all()


async def test_actors_that_assemble_are_told_what_was_recorded(on_stage: OnStage) -> None:
    async with on_stage(GA3C, "algo.last_inputs=true", "algo.core=gru", "algo.core_size=3") as stage:
        asker = stage.asker()
        first, second = await asker.ask(begins=True), await asker.ask()
        third = await asker.ask(begins=True)
        assert stage.inference.node.trajectories is None
    assert {"action", "record.policy", "state.h", "state.last_action", "state.last_reward"} == set(first.arrays)
    assert set(second.arrays) == {"action", "record.policy"}
    assert not any(array.any() for array in under("state.", first.arrays).values())
    assert (third.arrays["state.last_action"] == second.arrays["action"] + 1).all()
    assert third.arrays["state.last_reward"].tolist() == [1.0, 1.0]  # clipped
    assert third.arrays["state.h"].any()


async def test_a_group_without_credit_waits_and_the_others_go_on(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        assert stage.trajectories is not None
        full, other = stage.asker(group=0), stage.asker(group=1)
        for _ in range(3 * UNROLL):
            await full.ask()
        waits = full.ask()
        for _ in range(UNROLL):
            await other.ask()
        assert not waits.done()
        assert stage.trajectories.queued == 2
        also_waits = other.ask()
        assert [positions(message)[0] for message in await stage.unrolls(1)] == [0]
        await waits
        assert not also_waits.done()
        await stage.unrolls(3)
        await also_waits


# ── steps, lives ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_step_is_taken_once(on_stage: OnStage) -> None:
    """Two groups of the same environments, one of which asks everything twice: the same answers and the same state."""
    async with on_stage(SEED, "algo.core=lstm", "algo.core_size=4", "links.trajectories.window=4") as stage:
        once, twice = stage.asker(group=0), stage.asker(group=1)
        for _ in range(2 * UNROLL + 1):
            await once.ask()
            asked = [twice.ask(), twice.ask(again=True)]  # before it is answered
            first, second = [(await answer).arrays["action"].tolist() for answer in asked]
            third = (await twice.ask(again=True)).arrays["action"].tolist()  # and after
            assert first == second == third
        messages = await stage.unrolls(4)
    for one, other in (messages[:2], messages[2:]):
        for name in ("obs", "reward", "state.h", "state.c"):
            assert (one.arrays[name] == other.arrays[name]).all()
    assert messages[2].arrays["state.h"].any()


async def test_steps_out_of_order_and_strangers_are_refused(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        asker = stage.asker()
        await asker.ask()
        asker.step = 5
        with pytest.raises(RemoteError, match="step: got step 5 of group 0, after step 0"):
            await asker.ask()
        asker.step = 1
        wrong = {
            "obs: got float32[3, 2], expected float32[2, 2]": {"obs": np.zeros((3, 2), np.float32)},
            "obs: got float64[2, 2], expected float32[2, 2]": {"obs": np.zeros((2, 2))},
            "reward: got int64[2], expected float32[2]": {"reward": np.zeros(2, np.int64)},
            "final_index: expected the 1 truncated environments": {"truncated": np.array([True, False])},
            "final_obs: got float32[2, 2], expected one of each of 1": {
                "truncated": np.array([True, False]),
                "final_index": np.array([0]),
                "final_obs": np.zeros((2, 2), np.float32),
            },
        }
        for words, arrays in wrong.items():
            with pytest.raises(RemoteError) as refused:
                await asker.ask(**arrays)
            assert words in str(refused.value)
            asker.step = 1
        (address,) = stage.rig.plan.ports("actor-0")["act"].peers.values()
        stranger = stage.rig.bus("actor-7").client("act", address)
        for client, group in ((stranger, 0), (asker.client, 2), (asker.client, -1)):
            with pytest.raises(RemoteError, match=rf"actor-. has no group {group} in this topology"):
                await Asker(client, group).ask()
        with pytest.raises(RemoteError, match="fields: act"):
            await asker.client.request("act", {"group": "x"}, timeout_s=20)
        await asker.ask()


async def test_a_new_life_begins_anew(on_stage: OnStage) -> None:
    """What its earlier life had half built is in no unroll, what agents carried is forgotten, and it is fenced."""
    async with on_stage(SEED, "algo.core=gru", "algo.core_size=3") as stage:
        asker, other = stage.asker(), stage.asker("actor-1")
        for _ in range(3):
            await asker.ask()
            await other.ask()
        reborn = stage.asker(life=2)
        for step in range(UNROLL + 1):
            await reborn.ask()
            if step == 0:
                with pytest.raises(FencedError):
                    await asker.ask()
        (message,) = await stage.unrolls(1)
        assert positions(message) == list(range(UNROLL + 1))
        assert not message.arrays["state.h"].any()
        while other.step <= UNROLL:
            await other.ask()
        assert positions((await stage.unrolls(1))[0]) == list(range(UNROLL + 1))
        books = await stage.left()
    assert books["unfinished"] == (3 + 2) * ENVS  # the dead one's three rows, and one row each at the end


async def test_environments_made_anew_begin_anew(on_stage: OnStage) -> None:
    async with on_stage(SEED, "algo.core=gru", "algo.core_size=3") as stage:
        asker = stage.asker()
        for _ in range(3):
            await asker.ask()
        asker.fresh = True
        for _ in range(UNROLL + 1):
            await asker.ask()
        (message,) = await stage.unrolls(1)
        books = await stage.left()
    assert positions(message) == list(range(3, UNROLL + 4))
    assert not message.arrays["state.h"].any()
    assert books["unfinished"] == (3 + 1) * ENVS


async def test_a_younger_inference_node_takes_the_step_it_is_given(on_stage: OnStage) -> None:
    async with on_stage(SEED) as stage:
        asker = stage.asker(step=17)
        asker.fresh = False
        for _ in range(UNROLL + 1):
            await asker.ask()
        (message,) = await stage.unrolls(1)
    assert positions(message) == list(range(17, 17 + UNROLL + 1))


# ── batches, predictors ──────────────────────────────────────────────────────────────────────────────────────────


async def test_a_batch_waits_for_others(on_stage: OnStage, monkeypatch: Any) -> None:
    monkeypatch.setattr(batching, "PRESENT_S", 1000.0)
    async with on_stage(SEED, "nodes.inference.wait=1000s", "nodes.inference.batch=6") as stage:
        askers = [stage.asker(actor, group) for actor in ("actor-0", "actor-1") for group in (0, 1)]
        await askers[3].ask()  # nobody else is known
        await asyncio.gather(*(asker.ask() for asker in askers[:3]))
        assert stage.inference.count("act/batches") == 2
        waits = [asker.ask() for asker in askers[:2]]
        await asyncio.sleep(0.05)
        assert not any(answer.done() for answer in waits)
        await asyncio.gather(*waits, askers[2].ask())
        assert stage.inference.count("act/batches") == 3


@pytest.mark.parametrize("predictors", ["1", "3", "auto"])
async def test_predictors_answer_side_by_side(
    on_stage: OnStage, predictors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On threads of their own; `auto` is tuned many times meanwhile."""
    monkeypatch.setattr(tuning, "TUNE_S", 0.002)
    began, settings = time.perf_counter_ns(), (f"nodes.inference.predictors={predictors}", "nodes.inference.batch=1")
    async with on_stage(SEED, *settings, inline=False) as stage:
        askers = [stage.asker(actor, group) for actor in ("actor-0", "actor-1") for group in (0, 1)]

        async def play(asker: Asker) -> None:
            for _ in range(3 * UNROLL + 1):
                await asker.ask()

        playing = asyncio.gather(*map(play, askers))
        messages = await stage.unrolls(12)
        await playing
        gauge = stage.inference.node.gauge()
        books = await stage.left()
    assert all(np.diff(positions(message)).tolist() == [1] * UNROLL for message in messages)
    assert (books["act/rows"], books["unfinished"]) == (4 * ENVS * (3 * UNROLL + 1), 4 * ENVS)
    assert {"requests_per_s", "batch_fill", "batch_wait_ms", "predictors", "credit"} <= gauge.keys()
    assert 0 < books["time/idle"] < time.perf_counter_ns() - began  # however many threads were idle at once


# ── with real actors ─────────────────────────────────────────────────────────────────────────────────────────────


class Lived(walks.Walk):
    """Tells in which life of its actor it was made."""

    life: ClassVar[int] = 0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._life = self.life

    def _obs(self) -> Array:
        return np.array([self._position, self._life], np.float32)


gym.register("Lived-v0", Lived)


async def test_no_unroll_mixes_two_lives(on_stage: OnStage, monkeypatch: Any) -> None:
    """An actor is killed mid-unroll, over and over; episodes are long, so that nothing else resets a walker."""
    overrides = ("env.id=Lived-v0", "env.kwargs.length=100000", "links.trajectories.window=100000")
    async with on_stage(SEED, *overrides) as stage:
        assert stage.trajectories is not None
        for life in range(1, 6):
            monkeypatch.setattr(Lived, "life", life)
            actor = stage.rig.start("actor-0", life)
            before = stage.trajectories.queued
            await eventually(lambda before=before: stage.trajectories.queued >= before + 3)
            groups = stage.inference.node.groups.values()
            await eventually(lambda groups=groups: {0, UNROLL}.isdisjoint(group.assembler.row for group in groups))
            actor.task.cancel()
            await asyncio.wait([actor.task])
        await stage.left()
        assert stage.inference.count("unfinished") > 0
        messages = await stage.unrolls(stage.trajectories.queued)
    lives = [np.unique(message.arrays["obs"][..., 1]).tolist() for message in messages]
    assert {len(life) for life in lives} == {1}
    assert {life[0] for life in lives} == {1, 2, 3, 4, 5}
    for message in messages:
        assert (np.diff(message.arrays["obs"][..., 0], axis=0) == 1).all()


async def test_actors_outlive_their_inference_node(on_stage: OnStage) -> None:
    async with on_stage(SEED, "env.kwargs.length=1000") as stage:
        actor = stage.rig.start("actor-0")
        await stage.unrolls(3)
        stage.inference.task.cancel()
        await asyncio.wait([stage.inference.task])
        steps = actor.count("env_steps")
        stage.inference = stage.rig.start("inference-0", 2)
        messages = await stage.unrolls(6)
        assert actor.count("env_steps") > steps
        await actor.drained()
        await stage.left()
    for message in messages:
        assert (np.diff(message.arrays["obs"][..., 0], axis=0) == 1).all()


async def test_the_books_of_steps_close(on_stage: OnStage) -> None:
    """Every step that actors counted is in an unroll, or was unfinished."""
    async with on_stage(SEED) as stage:
        actors = [stage.rig.start(f"actor-{n}") for n in range(2)]
        await stage.unrolls(12)
        for actor in actors:
            await actor.drained()
        steps = sum(actor.count("env_steps") for actor in actors)
        books = await stage.left()
        produced = sum(n for name, n in books.items() if name.endswith("/produced"))
    # the answer to a group's newest question may not have been played
    assert 0 <= produced * UNROLL * ENVS + books["unfinished"] - steps <= 4 * ENVS
