"""A worker; a test plays its actor and the parameter server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import PATIENCE_S, REPLAY, WORKERS, FakeController, Living, Rig, eventually, net, replayed, rig_of, unroll_of

from ddrl_bus.algos import algorithm
from ddrl_bus.algos.base import Batch
from ddrl_bus.errors import FencedError
from ddrl_bus.messages import PULL, Gradient, Parameters, Weights, fields_of, parse
from ddrl_bus.nodes import outliers
from ddrl_bus.nodes import worker as workers
from ddrl_bus.nodes.shards import parts
from ddrl_bus.transport.links import Request
from ddrl_bus.transport.wire import Array, Message

UNROLL, ENVS = 5, 4
ROWS = UNROLL * ENVS


class Stage:
    """A worker, and the ends that it talks to."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.controller: FakeController = rig.fake_controller()
        self.weights = rig.subscriber("actor-0", "weights")
        self.actor = rig.sender("actor-0")
        self.server = rig.bus("param_server-0").server("gradients", rig.plan.ports("param_server-0")["gradients"].binds)
        self.worker: Living = rig.start("learner-0")

    async def asked(self, kind: str) -> Request:
        async with asyncio.timeout(PATIENCE_S):
            request = await self.server.recv()
        assert request.message.kind == kind
        return request

    def answer(
        self, request: Request, verdict: str, updates: int, parameters: Mapping[str, Array] | None = None
    ) -> None:
        fields = fields_of(Parameters(updates * ROWS, updates, verdict))
        request.answer(Parameters.KIND, fields, parameters or net(updates / 16))

    async def begin(self, updates: int = 0) -> None:
        """The worker has pulled these parameters, and its actor has them."""
        self.answer(await self.asked(PULL), "pulled", updates)
        await self.played(updates)

    async def played(self, updates: int) -> Message:
        """The weights that the actor is to play next."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self.weights.next()
        assert parse(Weights, message) == Weights(env_steps=updates * ROWS, updates=updates)
        return message

    async def send(self, version: int, **rows: Any) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.actor.send(*unroll_of(self.rig.plan, ENVS, version, **rows))

    async def gradient(self) -> tuple[Request, Gradient]:
        request = await self.asked(Gradient.KIND)
        return request, parse(Gradient, request.message)

    @property
    def books(self) -> tuple[int, int]:
        """Unrolls taken, and those trained on or evicted."""
        evicted = self.worker.count("trajectories/evicted/", "")
        return self.worker.count("trajectories", "/taken"), self.worker.count("trajectories/trained") + evicted

    def evicted(self, reason: str) -> int:
        return self.worker.count(f"trajectories/evicted/{reason}")


OnStage = Callable[..., AbstractAsyncContextManager[Stage]]


@pytest.fixture
def on_stage(tmp_path: Path) -> OnStage:
    @asynccontextmanager
    async def made(*overrides: str) -> AsyncIterator[Stage]:
        async with rig_of(tmp_path, *WORKERS, *overrides) as rig:
            yield Stage(rig)

    return made


def a_network(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=array.shape).astype(np.float32) for name, array in net().items()}


def batch_like(version: int, rows: dict[str, Array]) -> Batch:
    """What the worker makes of one unroll with these rows."""
    zeros = np.zeros((UNROLL, ENVS))
    return Batch(
        obs=rows["obs"],
        action=zeros.astype(np.int64),
        reward=rows["reward"],
        terminated=zeros.astype(bool),
        truncated=zeros.astype(bool),
        record={"policy": np.zeros((UNROLL, ENVS, 2), np.float32)},
        version=np.full((UNROLL, ENVS), version),
        final_obs=np.empty((0, 4), np.float32),
        final_index=np.empty(0, np.int64),
    )


# ── rounds ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_round_learns_from_what_exactly_its_parameters_played(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        random = np.random.default_rng(0)
        rows = {
            "obs": random.normal(size=(UNROLL + 1, ENVS, 4)).astype(np.float32),
            "reward": random.normal(size=(UNROLL, ENVS)).astype(np.float32),
        }
        parameters = a_network(1)
        stage.answer(await stage.asked(PULL), "pulled", 7, parameters)
        played = await stage.played(7)
        for name, array in parameters.items():
            np.testing.assert_array_equal(played.arrays[name], array, name)
        await stage.send(version=7, **rows)
        request, sent = await stage.gradient()
        assert (sent.number, sent.version, sent.env_steps) == (1, 7, ROWS)
        twin = algorithm("impala")(stage.rig.plan.algo, stage.worker.node.spaces, seed=9)
        twin.load(parameters)
        expected, report = twin.gradients(batch_like(7, rows))
        assert sent.report == pytest.approx(report)
        assert request.message.arrays.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(request.message.arrays[name], array, rtol=1e-5, err_msg=name)
        stage.answer(request, "applied", 9)
        await stage.played(9)
        await stage.send(version=9)
        request, sent = await stage.gradient()
        assert (sent.number, sent.version) == (2, 9)
        stage.answer(request, "applied", 10)
        await stage.played(10)
        assert (stage.worker.node.gauge()["version"], stage.worker.node.gauge()["gradients"]) == (10, 2)
        await stage.worker.drained()
        assert stage.books == (2, 2)


@pytest.mark.parametrize("other", [2, 4])
async def test_what_other_parameters_played_is_evicted(on_stage: OnStage, other: int) -> None:
    """Older ones, and those of a future that a server lost with its life."""
    async with on_stage() as stage:
        await stage.begin(3)
        await stage.send(version=other)
        await stage.send(version=3)
        request, sent = await stage.gradient()
        assert sent.version == 3
        assert stage.evicted("stale") == 1
        stage.answer(request, "applied", 4)
        await stage.worker.drained()


async def test_a_refused_gradient_is_dropped(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.begin()
        await stage.send(version=0)
        request, _ = await stage.gradient()
        stage.answer(request, "stale", 5)
        await stage.played(5)
        assert (stage.evicted("stale"), stage.worker.count("trajectories/trained")) == (1, 0)
        await stage.send(version=5)
        request, sent = await stage.gradient()
        assert (sent.number, sent.version) == (2, 5)
        stage.answer(request, "duplicate", 6)
        await stage.played(6)
        assert stage.worker.count("trajectories/trained") == 1
        await stage.worker.drained()
        assert stage.books == (2, 2)


# ── the server is away, holds still, or has enough ───────────────────────────────────────────────────────────────


async def test_a_gradient_is_repeated_until_it_is_answered(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ANSWER_S", 0.1)
    async with on_stage() as stage:
        await stage.begin()
        await stage.send(version=0, obs=0.5, reward=1.0)
        first, sent = await stage.gradient()
        for _ in range(2):
            again, repeated = await stage.gradient()
            assert again.message.seq > first.message.seq
            assert repeated == sent
            for name, array in first.message.arrays.items():
                np.testing.assert_array_equal(again.message.arrays[name], array, name)
        stage.answer(again, "duplicate", 1)
        await stage.played(1)
        await stage.worker.drained()


async def test_it_waits_for_a_server(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ANSWER_S", 0.1)
    async with on_stage() as stage:
        for _ in range(3):
            request = await stage.asked(PULL)
        stage.answer(request, "pulled", 0)
        await stage.played(0)
        await stage.worker.drained()


async def test_it_rests_while_the_server_holds_still(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.begin()
        await stage.send(version=0)
        for _ in range(2):
            request, sent = await stage.gradient()
            assert sent.number == 1
            stage.answer(request, "held", 0)
        request, sent = await stage.gradient()
        assert stage.weights.latest() is None
        stage.answer(request, "applied", 1)
        await stage.played(1)
        await stage.worker.drained()
        assert stage.books == (1, 1)


@pytest.mark.parametrize("verdict", ["held", "budget"])
async def test_it_drains_while_the_server_wants_no_more(on_stage: OnStage, verdict: str) -> None:
    async with on_stage() as stage:
        await stage.begin()
        await stage.send(version=0)
        request, _ = await stage.gradient()
        stage.answer(request, verdict, 0)
        await stage.worker.drained()
        assert stage.weights.latest() is None
        assert (stage.evicted("drained"), stage.books) == (1, (1, 1))


async def test_it_drains_without_a_server(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody answered counts as not trained on."""
    monkeypatch.setattr(workers, "ANSWER_S", 0.1)
    async with on_stage() as stage:
        await stage.begin()
        await stage.send(version=0)
        await stage.gradient()
        await stage.worker.drained()
        assert (stage.evicted("drained"), stage.books) == (1, (1, 1))


async def test_draining_settles_what_came(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        await stage.begin(1)
        await stage.send(version=0)
        await stage.actor.flush(PATIENCE_S)
        await eventually(lambda: stage.evicted("stale") == 1)
        await stage.worker.drained()
        assert stage.books == (1, 1)


# ── several servers ──────────────────────────────────────────────────────────────────────────────────────────────


class Servers(Stage):
    """The same with two parameter servers, each of which a test plays."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        bus = rig.bus("param_server-1")
        other = bus.server("gradients", rig.plan.ports("param_server-1")["gradients"].binds)
        self.both = [self.server, other]
        self.parts = parts(net(), 2)

    async def asked_of(self, server: int, kind: str) -> Request:
        self.server = self.both[server]
        return await self.asked(kind)

    def answer_of(self, server: int, request: Request, verdict: str, updates: int) -> None:
        part = {name: net(updates / 16)[name] for name in self.parts[server]}
        self.answer(request, verdict, updates, part)

    async def begin_with(self, *versions: int) -> None:
        for server, updates in enumerate(versions):
            self.answer_of(server, await self.asked_of(server, PULL), "pulled", updates)
        await self.plays(*versions)

    async def plays(self, *versions: int) -> Message:
        """The weights that the actor is to play next."""
        async with asyncio.timeout(PATIENCE_S):
            message = await self.weights.next()
        assert parse(Weights, message) == Weights(env_steps=min(versions) * ROWS, updates=sum(versions))
        for names, updates in zip(self.parts, versions, strict=True):
            for name in names:
                np.testing.assert_array_equal(message.arrays[name], net(updates / 16)[name], name)
        return message

    async def gradient_for(self, server: int, number: int, version: int) -> Request:
        request = await self.asked_of(server, Gradient.KIND)
        sent = parse(Gradient, request.message)
        assert (sent.number, sent.version, sent.env_steps) == (number, version, ROWS)
        assert sorted(request.message.arrays) == sorted(self.parts[server])
        return request


OnServers = Callable[..., AbstractAsyncContextManager[Servers]]


@pytest.fixture
def on_servers(tmp_path: Path) -> OnServers:
    @asynccontextmanager
    async def made(*overrides: str) -> AsyncIterator[Servers]:
        async with rig_of(tmp_path, *WORKERS, "nodes.param_server.count=2", *overrides) as rig:
            yield Servers(rig)

    return made


async def test_each_server_gets_its_part_and_gives_its_part(on_servers: OnServers) -> None:
    """With the version that it gave them out under."""
    async with on_servers() as stage:
        await stage.begin_with(3, 5)
        await stage.send(version=8)
        for server, version in enumerate((3, 5)):
            request = await stage.gradient_for(server, 1, version)
            stage.answer_of(server, request, "applied", version + 1 + server)
        await stage.plays(4, 7)
        await stage.send(version=11)
        for server, version in enumerate((4, 7)):
            stage.answer_of(server, await stage.gradient_for(server, 2, version), "applied", version + 1)
        await stage.plays(5, 8)
        await stage.worker.drained()
        assert (stage.worker.count("trajectories/trained"), stage.books) == (2, (2, 2))


async def test_what_is_learnt_from_is_what_all_servers_gave_out(on_servers: OnServers) -> None:
    async with on_servers() as stage:
        parameters = a_network(0)
        for server, names in enumerate(stage.parts):
            request = await stage.asked_of(server, PULL)
            stage.answer(request, "pulled", 0, {name: parameters[name] for name in names})
        await stage.played(0)
        rows = {"obs": np.full((UNROLL + 1, ENVS, 4), 0.5, np.float32), "reward": np.ones((UNROLL, ENVS), np.float32)}
        await stage.send(version=0, **rows)
        sent = [await stage.gradient_for(server, 1, 0) for server in (0, 1)]
        twin = algorithm("impala")(stage.rig.plan.algo, stage.worker.node.spaces, seed=9)
        twin.load(parameters)
        expected, _ = twin.gradients(batch_like(0, rows))
        for name, array in {name: a for request in sent for name, a in request.message.arrays.items()}.items():
            np.testing.assert_allclose(array, expected.pop(name), rtol=1e-5, err_msg=name)
        assert not expected


async def test_a_server_that_is_away_is_waited_for_alone(
    on_servers: OnServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has settled its part, and does not hear of it again."""
    monkeypatch.setattr(workers, "ANSWER_S", 0.1)
    async with on_servers() as stage:
        await stage.begin_with(0, 0)
        await stage.send(version=0)
        stage.answer_of(1, await stage.gradient_for(1, 1, 0), "applied", 1)
        for _ in range(3):
            late = await stage.gradient_for(0, 1, 0)
        assert stage.weights.latest() is None
        assert stage.both[1].try_recv() is None
        stage.answer_of(0, late, "applied", 4)
        await stage.plays(4, 1)
        await stage.worker.drained()
        assert stage.books == (1, 1)


@pytest.mark.parametrize(
    ("verdicts", "trained"), [(("applied", "stale"), 1), (("stale", "duplicate"), 1), (("stale", "non_finite"), 0)]
)
async def test_an_unroll_is_trained_on_where_any_server_learnt_from_it(
    on_servers: OnServers, verdicts: tuple[str, str], trained: int
) -> None:
    async with on_servers() as stage:
        await stage.begin_with(0, 0)
        await stage.send(version=0)
        for server, verdict in enumerate(verdicts):
            stage.answer_of(server, await stage.gradient_for(server, 1, 0), verdict, 2)
        await stage.plays(2, 2)
        assert stage.worker.count("trajectories/trained") == trained
        assert stage.evicted("stale") == 1 - trained
        await stage.worker.drained()
        assert stage.books == (1, 1)


async def test_it_drains_with_a_part_of_a_gradient_applied(on_servers: OnServers) -> None:
    async with on_servers() as stage:
        await stage.begin_with(0, 0)
        await stage.send(version=0)
        stage.answer_of(0, await stage.gradient_for(0, 1, 0), "held", 0)
        stage.answer_of(1, await stage.gradient_for(1, 1, 0), "applied", 1)
        await stage.worker.drained()
        assert (stage.worker.count("trajectories/trained"), stage.books) == (1, (1, 1))


# ── from a replay ────────────────────────────────────────────────────────────────────────────────────────────────


class Replayed(Servers):
    """A worker that draws from a real replay node; a test plays the actor that fills it, and the servers."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.replay = rig.start("replay-0")

    async def fed(self, unrolls: int = 1) -> None:
        """The replay holds so many more."""
        stored = self.replay.count("trajectories/stored") + unrolls
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(unrolls):
                await self.actor.send(*replayed(self.worker.node.schema, ENVS, reward=1.0))
        await eventually(lambda: self.replay.count("trajectories/stored") == stored)

    async def answered(self, *versions: int, kind: str = Gradient.KIND) -> list[Message]:
        """What both servers are asked; the worker gets these versions of the parameters for it, and they are played."""
        asked = [await self.asked_of(server, kind) for server in (0, 1)]
        network = self.worker.node.algo.weights()
        for request, names, updates in zip(asked, parts(network, 2), versions, strict=True):
            part = {name: np.full_like(network[name], updates / 16) for name in names}
            self.answer(request, "pulled" if kind == PULL else "applied", updates, part)
        async with asyncio.timeout(PATIENCE_S):
            played = await self.weights.next()
        assert parse(Weights, played).updates == sum(versions)
        return [request.message for request in asked]

    def network(self, which: str) -> set[float]:
        """The values that it has."""
        state = getattr(self.worker.node.algo, which).state_dict()
        return {float(value) for tensor in state.values() for value in tensor.ravel()}


@pytest.fixture
async def replaying(tmp_path: Path) -> AsyncIterator[Replayed]:
    settings = ("links.trajectories.max_lag=null", "nodes.replay.bundle=worker", "nodes.replay.count=2")
    servers = ("nodes.param_server.count=2", "nodes.learner.outliers=4")
    async with rig_of(tmp_path, *WORKERS, *REPLAY, *settings, *servers) as rig:
        yield Replayed(rig)


async def test_what_is_drawn_counts_for_what_was_played_meanwhile(replaying: Replayed) -> None:
    """It needs nothing new to learn on; each of both servers is told the same."""
    stage, sent = replaying, []
    await stage.answered(0, 0, kind=PULL)
    await eventually(lambda: stage.worker.node.source.shards[0].life)  # from here on it counts
    await stage.fed()
    for number in range(1, 6):
        if number == 3:
            await stage.fed(2)
        both = [parse(Gradient, message) for message in await stage.answered(number, number)]
        assert [(each.number, each.version) for each in both] == [(number, number - 1)] * 2
        assert both[0].env_steps == both[1].env_steps
        sent.append(both[0].env_steps)
    assert (sent[:2], sum(sent[2:])) == ([ROWS, 0], 2 * ROWS)
    await stage.worker.drained()
    assert stage.worker.count("samples/trained") == 5 * stage.rig.plan.algo.batch


async def test_the_target_follows_the_server_that_is_least_far(replaying: Replayed) -> None:
    """Every 10 updates."""
    stage = replaying
    await stage.answered(1, 1, kind=PULL)
    await stage.fed()
    await stage.answered(9, 12)
    await eventually(lambda: stage.network("net") == {9 / 16, 12 / 16})
    assert stage.network("target") == {1 / 16}
    await stage.answered(10, 13)
    await eventually(lambda: stage.network("net") == {10 / 16, 13 / 16})
    assert stage.network("target") == {10 / 16, 13 / 16}
    await stage.worker.drained()


async def test_a_draw_that_stands_out_is_left_out(replaying: Replayed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "FIRST", 3)
    stage = replaying
    await stage.answered(0, 0, kind=PULL)
    await stage.fed()
    for _ in range(2):
        await stage.answered(0, 0)
    await stage.answered(160, 160)  # their Q is far off
    await stage.answered(0, 0, kind=PULL)
    again, _ = await stage.answered(0, 0)
    assert parse(Gradient, again).number == 4
    assert stage.worker.count("samples/left_out/outlier") == stage.rig.plan.algo.batch
    assert stage.worker.count("samples/trained") == 4 * stage.rig.plan.algo.batch
    await stage.worker.drained()


# ── outliers ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_outlier_is_left_out(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, and not sent; the actor plays on with the newest parameters."""
    monkeypatch.setattr(outliers, "FIRST", 3)
    async with on_stage("nodes.learner.outliers=4") as stage:
        await stage.begin()
        for number, reward in enumerate((1.0, 1.1, 0.9, 1.0), 1):
            await stage.send(version=number - 1, reward=reward)
            request, sent = await stage.gradient()
            assert sent.number == number
            stage.answer(request, "applied", number)
            await stage.played(number)
        await stage.send(version=4, reward=1000.0)
        stage.answer(await stage.asked(PULL), "pulled", 6)
        await stage.played(6)
        assert (stage.evicted("outlier"), stage.worker.count("trajectories/trained")) == (1, 4)
        await stage.send(version=6, reward=1.0)
        request, sent = await stage.gradient()
        assert (sent.number, sent.version) == (5, 6)
        stage.answer(request, "applied", 7)
        await stage.played(7)
        await stage.worker.drained()
        assert stage.books == (6, 6)


async def test_an_old_life_leaves(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        stage.answer(await stage.asked(PULL), "fenced", 0)
        with pytest.raises(FencedError, match="newer life of learner-0"):
            await stage.worker.task
