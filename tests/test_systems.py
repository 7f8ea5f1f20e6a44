"""Every reference topology as its user starts it, shortly: it learns in processes of its own, and its books close.

What each has been shown to learn in full is docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from replicas import groups
from runs import assert_closed, running

from ddrl_bus import algos
from ddrl_bus.bench.control import Training
from ddrl_bus.envs import EnvConfig
from ddrl_bus.launch.catalog import packaged

ON_POLICY = ("a2c", "a3c", "ga3c", "ppo", "impala", "appo", "seed", "torchbeast_mono", "torchbeast_poly")
REPLAYED = {"apex": 150, "gorila": 100, "r2d2": 60, "seed_r2d2": 60}
"""System → return to reach; random play makes 22."""
SYSTEMS = (*ON_POLICY, *REPLAYED)
REPLICATED = {"ddppo": (), "impala": ("nodes.learner.count=2", "algo.batch=16")}
"""System → what makes several learners of one, with as many rows an update."""
TESTED_ELSEWHERE = {"quickstart", "two-hosts"}
ENV_ONLY = ("ga3c", "seed", "torchbeast_poly", "seed_r2d2")


def test_no_topology_is_left_out() -> None:
    assert packaged().keys() == {*SYSTEMS, *REPLICATED, *TESTED_ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_learns(system: str, tmp_path: Path) -> None:
    """Well above 22, which is chance; the step budget is the smoke bar's."""
    reward = REPLAYED.get(system, 150)
    with running(tmp_path / "run", f"stop.reward={reward}", "stop.steps=200000", topology=system) as run:
        closing = run.ends()
        assert closing["reason"] == "reward", closing
        assert closing["return"] >= reward
        assert closing["ledger"]["closed"]
        assert_closed(run.books())
        assert ("time/forward" in run.counters("actor-0")) == (system not in ENV_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("system", REPLICATED)
def test_several_learners_learn_as_one(system: str, tmp_path: Path) -> None:
    words = (*REPLICATED[system], "stop.reward=150", "stop.steps=200000")
    with running(tmp_path / "run", *words, topology=system) as run:
        closing = run.ends()
        assert closing["reason"] == "reward", closing
        assert closing["ledger"]["closed"]
        assert_closed(run.books())
        trained = [run.counters(f"learner-{n}")["trajectories/trained"] for n in (0, 1)]
        assert min(trained) > 0
        assert all(set(groups(run, n)[-1].ranks) == {0, 1} for n in (0, 1))


@pytest.mark.slow
def test_a_recurrent_agent_learns_what_it_is_not_shown(tmp_path: Path) -> None:
    """The same agent without a memory never had more than 59 (docs/results.md)."""
    words = ("env.preset=no_velocity", "algo.core=lstm", "nodes.actor.count=2", "stop.reward=75", "stop.steps=600000")
    with running(tmp_path / "run", *words, topology="impala") as run:
        assert run.ends()["reason"] == "reward"


@pytest.mark.slow
def test_a_solved_cartpole_is_worth_100() -> None:
    """It ends by its time limit alone, which is no death: V tends to 1/(1-γ), where deaths at 500 would make it 80."""
    rule = algos.algorithm("a2c")
    config = rule.Config(batch=64, anneal_steps=400_000)
    training = Training(EnvConfig("CartPole-v1"), rule, config, envs=32, seed=1)
    values = []
    while training.learner.env_steps < 400_000:
        report = training.update()
        if report and training.learner.env_steps > 300_000:
            values.append(report["value"] / config.reward_scale)
    assert np.mean(values) == pytest.approx(100, abs=5)
