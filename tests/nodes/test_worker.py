"""A worker; a test plays its actor and the parameter server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rig import PATIENCE_S, WORKERS, FakeController, Living, Rig, eventually, net, rig_of, unroll_of

from ddrl_bus.algos import algorithm
from ddrl_bus.algos.base import Batch
from ddrl_bus.errors import FencedError
from ddrl_bus.messages import PULL, Gradient, Parameters, Weights, fields_of, parse
from ddrl_bus.nodes import worker as workers
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
        parameters = {name: random.normal(size=array.shape).astype(np.float32) for name, array in net().items()}
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


async def test_an_old_life_leaves(on_stage: OnStage) -> None:
    async with on_stage() as stage:
        stage.answer(await stage.asked(PULL), "fenced", 0)
        with pytest.raises(FencedError, match="newer life of learner-0"):
            await stage.worker.task
