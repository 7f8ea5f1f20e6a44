"""Every reference topology as its user starts it, shortly: it trains in processes of its own, and its books close.

Each family of rules learns a little here; what each system has been shown to learn in full is docs/results.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from replicas import groups
from runs import assert_closed, running

from ddrl_bus.launch.catalog import packaged

ON_POLICY = ("a2c", "a3c", "ga3c", "ppo", "appo", "seed", "torchbeast_mono", "torchbeast_poly")
REPLAYED = ("apex", "gorila")
RECURRENT = ("r2d2", "seed_r2d2")
"""Too slow to learn here: tests/algos has them remember a cue."""
LEARNT = 75
"""CartPole's return at which they stop; random play makes 22, untrained weights less than 40."""
SYSTEMS = (*ON_POLICY, *REPLAYED, *RECURRENT)
REPLICATED = {"ddppo": (), "impala": ("nodes.learner.count=2", "algo.batch=16")}
"""System → what makes several learners of one, with as many rows an update. impala has one below."""
TESTED_ELSEWHERE = {"quickstart", "two-hosts"}
ENV_ONLY = ("ga3c", "seed", "torchbeast_poly", "seed_r2d2")


def test_no_topology_is_left_out() -> None:
    assert packaged().keys() == {*SYSTEMS, *REPLICATED, *TESTED_ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_trains(system: str, tmp_path: Path) -> None:
    """All but the recurrent ones until it plays better than chance."""
    reward, steps = ("null", 10_000) if system in RECURRENT else (LEARNT, 200_000)
    with running(tmp_path / "run", f"stop.reward={reward}", f"stop.steps={steps}", topology=system) as run:
        closing = run.ends()
        assert closing["reason"] == ("steps" if system in RECURRENT else "reward"), closing
        assert closing["updates"] > 0
        assert closing["return"] >= (0 if system in RECURRENT else LEARNT)
        assert closing["ledger"]["closed"]
        assert_closed(run.books())
        assert ("time/forward" in run.counters("actor-0")) == (system not in ENV_ONLY)


@pytest.mark.slow
@pytest.mark.parametrize("system", REPLICATED)
def test_several_learners_learn_as_one(system: str, tmp_path: Path) -> None:
    words = (*REPLICATED[system], f"stop.reward={LEARNT}", "stop.steps=200000")
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
        closing = run.ends()
        assert closing["reason"] == "reward", closing
        assert closing["ledger"]["closed"]
        assert_closed(run.books())
        assert "time/forward" in run.counters("actor-0")
