"""Levels and hops that are known, found again from what they come to; and a trial that is real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import COSTS, MS

from ddrl_bus.errors import UsageError
from ddrl_bus.launch.start import plan_of
from ddrl_bus.planning import check, fit, pace, trial
from ddrl_bus.planning.costs import Costs, Strain
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


def on(strain: Strain, costs: Costs = COSTS) -> Costs:
    return replace(costs, strains=[strain])


def as_if_run(topology: Plan, costs: Costs) -> Trial:
    """A trial on a machine where these are the costs."""
    rate = rates(model(topology, costs, Setting()), fit.EVENTS)
    cpu = {
        name.removeprefix("cpu "): each / rate["env_steps"] for name, each in rate.items() if name.startswith("cpu ")
    }
    return Trial(rate["env_steps"], cpu, 0.0, 1 - rate["trains learner-0"])


@pytest.mark.parametrize("topology", ["quickstart", "a2c"])
def test_levels_are_found_and_with_them_how_fast_it_gets_on(topology: str) -> None:
    ran = as_if_run(plan(topology), on(Strain(levels=LEVELS, locked=0.4)))

    found = fit.fitted(plan(topology), COSTS, ran)

    assert found.levels == pytest.approx(LEVELS, rel=0.05)
    again, before = (as_if_run(plan(topology), costs) for costs in (on(found), COSTS))
    assert again.env_steps_per_s == pytest.approx(ran.env_steps_per_s, rel=0.05)
    assert again.idle == pytest.approx(ran.idle, abs=0.05)
    assert before.env_steps_per_s > 1.2 * ran.env_steps_per_s


def test_what_is_not_work_is_a_hop() -> None:
    truth = Strain(levels=LEVELS, hop=0.6 * MS)

    found = fit.fitted(plan("a2c"), COSTS, as_if_run(plan("a2c"), on(truth)))

    assert found.hop == pytest.approx(truth.hop, rel=0.25)
    assert found.levels == pytest.approx(LEVELS, rel=0.05)


def test_what_no_hop_explains_takes_cores() -> None:
    crowded = plan("quickstart", "nodes.actor.count=4")

    ran = as_if_run(crowded, on(Strain(besides=0.7)))

    found = fit.fitted(crowded, COSTS, ran)

    assert found.hop == 0
    assert found.besides > 0.3
    assert as_if_run(crowded, on(found)).env_steps_per_s == pytest.approx(ran.env_steps_per_s, rel=0.05)


def test_a_learner_that_waits_for_its_event_loop_is_found_out() -> None:
    crowded = replace(plan("quickstart"), links=plan("quickstart", "links.trajectories.window=4").links)
    costs = replace(COSTS, cores=4)
    truth = Strain(levels={"actor": 0.4, "learner": 2.0, "trainer": 1.0}, locked=0.5)

    found = fit.fitted(crowded, costs, as_if_run(crowded, on(truth, costs)))

    assert found.locked == pytest.approx(truth.locked, abs=0.1)
    assert found.hop == pytest.approx(0.0, abs=0.1 * MS)


@pytest.mark.parametrize(
    ("crowd", "level", "hop"), [(0.1, 1.0, 4.0), (1.0, 1.0, 4.0), (1.5, 1.5, 3.0), (9.0, 2.0, 2.0)]
)
def test_between_two_trials_is_a_line_and_beyond_them_the_nearest(crowd: float, level: float, hop: float) -> None:
    strains = [Strain(1.0, {"actor": 1.0}, hop=4.0), Strain(2.0, {"actor": 2.0}, hop=2.0)]

    found = replace(COSTS, strains=strains).strain(crowd)

    assert (found.crowd, found.levels, found.hop) == (crowd, {"actor": level}, hop)


def test_on_a_fuller_machine_work_takes_as_much_as_in_the_fuller_trial() -> None:
    strains = [Strain(1.0, {"actor": 1.0}), Strain(2.0, {"actor": 2.0})]
    alone = plan("quickstart", "nodes.actor.count=20")

    roomy, full = (
        model(alone, replace(COSTS, strains=strains), Setting(hosts=2, cores=cores)).machines["host-1"].strain
        for cores in (20, 10)
    )

    assert (roomy.crowd, full.crowd) == (1.0, 2.0)
    assert (roomy.levels["actor"], full.levels["actor"]) == (1.0, 2.0)


def test_cores_that_do_more_are_quicker_in_proportion() -> None:
    ran = Trial(100.0, {"actor": 0.01}, 0.2, 0.3).at_pace(2.0)

    assert ran == Trial(200.0, {"actor": 0.005}, 0.2, 0.3)


def test_the_pace_is_of_all_cores_and_about_the_same_again() -> None:
    with pace.of_cores() as now:
        first, second = now(), now()

    assert first == pytest.approx(second, rel=0.9)


def test_a_trial_is_small_endless_and_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU0", "10.0.0.1")
    monkeypatch.setenv("CPU1", "10.0.0.2")
    tried = trial.alone(plan_of("two-hosts", ["nodes.actor.count=9"], probe=False, starts=False), 3)

    assert {node.host for node in tried.nodes.values()} == {"gpu0"}
    assert [tried.groups[name].count for name in ("actor", "evaluator")] == [3, 0]
    assert tried.stop.steps is None


def test_an_evaluator_to_whom_alone_a_link_goes_is_tried_too() -> None:
    tried = trial.alone(plan_of("gorila", probe=False, starts=False), 1)

    assert tried.groups["evaluator"].count == 1


def test_in_lock_step_a_round_of_those_that_are_left_is_a_batch() -> None:
    tried = trial.alone(plan("a2c", "nodes.actor.count=8", "algo.batch=256"), 3)

    assert tried.algo.batch == 3 * 32


def test_who_shares_processes_with_actors_is_tried_in_their_number() -> None:
    tried = trial.alone(plan_of("ddppo", probe=False, starts=False), 3)

    assert {tried.groups[name].count for name in ("actor", "learner")} == {3}


def test_a_trial_that_cannot_train_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trial run did not train.*NoSuch"):
        trial.run(trial.alone(plan("quickstart", "env.id=NoSuch-v0"), 1), tmp_path / "run", 0.1)
