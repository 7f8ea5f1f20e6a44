"""A learner with several trainers, on real threads; a test plays actors and controller."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from rig import eventually
from test_learner import ROWS, OnStage, Stage, on_stage  # noqa: F401

from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.impala import Impala
from ddrl_bus.messages import Weights, parse
from ddrl_bus.nodes import tuning

WIDE = "links.trajectories.window=16"
PATIENCE_S = 30.0

Arrays = dict[str, np.ndarray[Any, Any]]


def gradients_of(monkeypatch: pytest.MonkeyPatch, before: Any) -> list[Arrays]:
    """Fills with the parameters of each gradient that is computed; `before` is called first."""
    seen: list[Arrays] = []
    gradients = Impala.gradients

    def spy(self: Impala, batch: Batch) -> Any:
        before()
        seen.append(self.weights())
        return gradients(self, batch)

    monkeypatch.setattr(Impala, "gradients", spy)
    return seen


def versions_of(stage: Stage) -> list[Arrays]:
    """Fills with the parameters after each update, and holds those before the first."""
    versions: list[Arrays] = [stage.algo.weights()]
    apply = stage.algo.apply

    def spy(*args: Any) -> float:
        norm: float = apply(*args)
        versions.append(stage.algo.weights())
        return norm

    stage.algo.apply = spy
    return versions


def same(some: Arrays, others: Arrays) -> bool:
    return all(np.array_equal(array, others[name]) for name, array in some.items())


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


async def test_so_many_gradients_at_a_time(on_stage: OnStage, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Each update counts, and the age of its rows is that at which it changes the parameters."""
    together = threading.Barrier(3, timeout=PATIENCE_S)
    seen = gradients_of(monkeypatch, together.wait)
    async with on_stage("nodes.learner.trainers=3", WIDE, inline=False) as stage:
        await stage.version(0)
        versions = versions_of(stage)
        for n in range(12):
            await stage.send(reward=n)
        await stage.updated(12)
        await stage.learner.drained()
    assert (stage.algo.updates, stage.algo.env_steps, stage.learner.count("trajectories/trained")) == (12, 12 * ROWS, 12)
    assert [int(lag.max()) for lag in stage.learner.node.lags] == list(range(12))
    for n in range(0, 12, 3):
        assert all(same(parameters, versions[n]) for parameters in seen[n : n + 3])
    assert stage.learner.node.gauge()["trainers"] == 3


async def test_a_gradient_is_of_one_version(
    on_stage: OnStage,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    hasty: None,
) -> None:
    """And so are the weights that are published, whichever thread comes first."""
    seen = gradients_of(monkeypatch, lambda: None)
    published: dict[int, Arrays] = {}
    settings = ("nodes.learner.trainers=3", "nodes.learner.publish_every=2", "nodes.learner.delay=2")
    async with on_stage(*settings, WIDE, "algo.hidden=[16, 16, 16, 16]", inline=False) as stage:
        await stage.version(0)
        versions = versions_of(stage)
        for n in range(100):
            await stage.send(reward=n)
            if message := stage.weights.latest():
                published[parse(Weights, message).updates] = dict(message.arrays)
        await stage.updated(100)
        await stage.learner.drained()
    assert len(seen) == 100
    assert all(any(same(parameters, version) for version in versions) for parameters in seen)
    assert list(published) == sorted(published)
    for updates, arrays in published.items():
        assert updates % 2 == 0
        assert same(arrays, versions[updates])


async def test_who_was_overtaken_publishes_no_older_weights(
    on_stage: OnStage,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overtaken, order = threading.Event(), iter(range(2))

    def before() -> None:
        if next(order) == 0:
            assert overtaken.wait(PATIENCE_S)

    gradients_of(monkeypatch, before)
    async with on_stage("nodes.learner.trainers=2", inline=False) as stage:
        await stage.version(0)
        await stage.send()
        await stage.send()
        await stage.updated(1)
        overtaken.set()
        await eventually(lambda: stage.learner.count("trajectories/trained") == 2)
        assert stage.algo.updates == 2
        assert (await stage.version(2)).updates == 2
        await stage.learner.drained()
        assert stage.weights.latest() is None


@pytest.mark.parametrize("trainers", ["2", "auto"])
async def test_one_after_the_other_they_learn_what_one_learns(on_stage: OnStage, trainers: str) -> None:  # noqa: F811
    states = []
    for number, life in ((trainers, 1), ("1", 2)):
        async with on_stage(f"nodes.learner.trainers={number}", f"name=rig{life}", inline=False) as stage:
            stage.rig.folder.joinpath("checkpoints")
            await stage.version(0)
            for n in range(4):
                await stage.send(reward=n)
                await stage.updated(n + 1)
            await stage.learner.drained()
            states.append(stage.algo.state())
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], name)
