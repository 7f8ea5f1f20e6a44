"""Levels and hops that are known, found again from what they come to; and a trial that is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import COSTS, MS

from ddrl_bus.errors import UsageError
from ddrl_bus.launch.start import plan_of
from ddrl_bus.planning import check, fit, trial
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.model import model
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import rates
from ddrl_bus.planning.trial import Trial
from ddrl_bus.topology.plan import Plan


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "EVENTS", 4_000)


LEVELS = {"actor": 1.5, "learner": 2.0, "trainer": 1.3}


def plan(topology: str, *overrides: str) -> Plan:
    return plan_of(topology, [*check.ALONE, *overrides], probe=False, starts=False)


def as_if_run(topology: Plan, costs: Costs, others: float = 0.0) -> Trial:
    """A trial on a machine where these are the costs."""
    rate = rates(model(topology, costs, Setting(others=others)), fit.EVENTS)
    cpu = {
        name.removeprefix("cpu "): each / rate["env_steps"] for name, each in rate.items() if name.startswith("cpu ")
    }
    return Trial({}, rate["env_steps"], cpu, costs.besides, others)


@pytest.mark.parametrize(("speeds", "others"), [([1.0, 2.0], 0.0), ([1.0, 1.3], 0.0), ([1.0, 2.0], 3.0)])
def test_levels_are_found_whatever_cores_share_and_whoever_is_there(speeds: list[float], others: float) -> None:
    truth = replace(COSTS, speeds=speeds, levels=LEVELS, locked=0.4, besides=0.1)
    ran = as_if_run(plan("quickstart"), truth, others)

    found = fit.fitted(plan("quickstart"), replace(COSTS, speeds=speeds), ran)

    assert found.levels == pytest.approx(LEVELS, rel=0.05)
    quiet = [as_if_run(plan("quickstart"), costs).env_steps_per_s for costs in (truth, found, COSTS)]
    assert quiet[1] == pytest.approx(quiet[0], rel=0.05)
    assert quiet[2] > 1.2 * quiet[0]


def test_what_is_not_work_is_a_hop() -> None:
    truth = replace(COSTS, levels=LEVELS, locked=fit.MOST_LOCKED, hop=0.6 * MS)

    found = fit.fitted(plan("a2c"), COSTS, as_if_run(plan("a2c"), truth))

    assert found.hop == pytest.approx(truth.hop, rel=0.15)
    assert found.levels == pytest.approx(LEVELS, rel=0.05)


def test_what_no_hop_explains_takes_cores() -> None:
    truth = replace(COSTS, locked=fit.MOST_LOCKED, besides=0.5)
    crowded = plan("quickstart", "nodes.actor.count=4")

    found = fit.fitted(crowded, COSTS, replace(as_if_run(crowded, truth), besides=0.0))

    assert found.hop == 0
    assert found.besides == pytest.approx(0.5, abs=0.15)


def test_a_learner_that_waits_for_its_event_loop_is_found_out() -> None:
    crowded = replace(plan("quickstart"), links=plan("quickstart", "links.trajectories.window=4").links)
    truth = replace(
        COSTS, speeds=[1.0, 2.0, 3.0, 4.0], levels={"actor": 0.4, "learner": 2.0, "trainer": 1.0}, locked=0.5
    )

    found = fit.fitted(crowded, replace(COSTS, speeds=truth.speeds), as_if_run(crowded, truth))

    assert found.locked == pytest.approx(truth.locked, abs=0.1)
    assert found.hop == 0


def test_a_trial_is_small_endless_and_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU0", "10.0.0.1")
    monkeypatch.setenv("CPU1", "10.0.0.2")
    tried = trial.alone(plan_of("two-hosts", ["nodes.actor.count=9"], probe=False, starts=False))

    assert {node.host for node in tried.nodes.values()} == {"gpu0"}
    assert [options.count for name, options in tried.groups.items() if name in ("actor", "evaluator")] == [
        trial.MOST,
        0,
    ]
    assert tried.stop.steps is None


def test_an_evaluator_to_whom_alone_a_link_goes_is_tried_too() -> None:
    tried = trial.alone(plan_of("gorila", probe=False, starts=False))

    assert tried.groups["evaluator"].count == 1


def test_in_lock_step_a_round_of_those_that_are_left_is_a_batch() -> None:
    tried = trial.alone(plan("a2c", "nodes.actor.count=8", "algo.batch=256"))

    assert tried.algo.batch == trial.MOST * 32


def test_a_trial_that_cannot_train_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trial run did not train.*NoSuch"):
        trial.run(plan("quickstart", "env.id=NoSuch-v0"), tmp_path / "run", 0.1)
