"""Predictions from made-up costs, where arithmetic says what must come out; one real calibration."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import COSTS, MS, POINTS

from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch.catalog import packaged
from ddrl_bus.launch.start import plan_of
from ddrl_bus.planning import calibrate, check, fit, report
from ddrl_bus.planning import predict as module
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import Prediction, predict
from ddrl_bus.planning.world import NOISE
from ddrl_bus.topology.plan import Plan


def plan(topology: str, *overrides: str) -> Plan:
    return plan_of(topology, overrides, probe=False, starts=False)


def quickstart(setting: Setting, costs: Costs = COSTS, *overrides: str) -> Prediction:
    return predict(plan("quickstart", "nodes.evaluator.count=0", "stop.reward=null", *overrides), costs, setting)


def many_cores(**counts: int) -> Setting:
    return Setting(cores=1000, counts=counts)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the usual simulation tells these apart."""
    monkeypatch.setattr(module, "EVENTS", 8_000)


ENV = {"GPU0": "10.0.0.1", "CPU1": "10.0.0.2"}


@pytest.mark.parametrize("topology", packaged())
def test_every_topology_is_predicted(topology: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENV.items():
        monkeypatch.setenv(name, value)

    found = predict(plan(topology), COSTS)

    assert found.env_steps_per_s > 100
    assert found.updates_per_s > 1
    assert 0 <= found.learner_idle < 1
    assert all(0 <= share <= 1.01 for share in found.load.values())  # by whole time slices
    links = set(plan(topology).links) - {"progress", "control", "sync", "tally", "parameters"}
    assert found.bytes_per_s.keys() == links
    assert all(size > 0 for size in [*found.bytes_per_s.values(), *found.memory.values()])
    assert found.bottleneck


def test_the_same_comes_out_again_and_another_seed_changes_little() -> None:
    first, again, other = (quickstart(Setting(seed=seed)) for seed in (1, 1, 2))

    assert first == again
    assert other != first
    assert other.env_steps_per_s == pytest.approx(first.env_steps_per_s, rel=0.03)


def test_an_actor_that_nothing_holds_up_is_as_fast_as_it_plays() -> None:
    found = quickstart(many_cores(actor=1))

    play, send, hear = 6 * MS, 0.1 * MS, 0.2 * MS  # each unroll has one new version to hear of and to load
    assert found.env_steps_per_s == pytest.approx(640 / (play + send + hear), rel=0.02)
    assert "wait" not in found.bottleneck or found.learner_idle > 0.5


def test_a_learner_that_is_full_updates_as_fast_as_it_can() -> None:
    found = quickstart(many_cores(actor=50))

    assert found.updates_per_s == pytest.approx(1 / (2 * MS), rel=0.02)
    assert found.learner_idle < 0.01
    assert "learner-0 (" in found.bottleneck


def test_on_full_cores_throughput_is_cores_over_work() -> None:
    found = quickstart(Setting(counts={"actor": 20}))

    # one unroll: played, sent, taken, copied, trained on; its weights published to 20 and heard by 20 that are behind
    work = found.load["cores of local"] * 2 / (found.env_steps_per_s / 640)
    assert work >= (6 + 0.1 + 0.2 + 2 + 0.1) * MS * (1 - NOISE)
    assert "cores of local (" in found.bottleneck


@pytest.mark.parametrize("topology", ["quickstart", "apex", "seed", "a2c", "a3c"])
def test_more_cores_are_never_slower_and_others_never_help(topology: str) -> None:
    rates = [predict(plan(topology), COSTS, Setting(cores=cores)).env_steps_per_s for cores in (1, 2, 4, 16)]
    beside = [predict(plan(topology), COSTS, Setting(others=others)).env_steps_per_s for others in (0, 2, 8)]

    assert all(more >= 0.97 * fewer for fewer, more in itertools.pairwise(rates)), rates
    assert all(busier <= 1.03 * freer for freer, busier in itertools.pairwise(beside)), beside


def test_a_slower_learner_never_makes_anything_faster() -> None:
    def slower(times: float) -> Costs:
        return replace(COSTS, points=POINTS | {"update": [(size, times * t) for size, t in POINTS["update"]]})

    rates = [quickstart(many_cores(), slower(times)).env_steps_per_s for times in (1, 3, 9)]

    assert rates[0] >= rates[1] > rates[2]


def test_larger_windows_only_make_what_is_trained_on_older() -> None:
    stale = [
        quickstart(many_cores(actor=20), COSTS, f"links.trajectories.window={window}").staleness for window in (1, 4)
    ]

    assert stale[0] is not None
    assert stale[1] is not None
    assert stale[1] > stale[0] + 2 * 20  # three unrolls more of each wait


def test_lock_step_is_never_behind_and_its_batch_follows_the_actors() -> None:
    one, many = (predict(plan("a2c"), COSTS, many_cores(actor=count)) for count in (2, 16))

    assert one.staleness == many.staleness == 0
    assert many.env_steps_per_s / many.updates_per_s == pytest.approx(16 * 32 * plan("a2c").algo.unroll, rel=0.1)


def test_the_replay_keeps_samples_per_insert() -> None:
    found = predict(plan("apex"), COSTS, many_cores())

    drawn = found.updates_per_s * plan("apex").algo.batch
    assert drawn / found.env_steps_per_s == pytest.approx(4, rel=0.1)


def test_a_thin_network_binds() -> None:
    found = quickstart(Setting(hosts=3, cores=100, bandwidth=1e5, counts={"actor": 8}))

    # every link is one that crosses: unrolls come in from two hosts, at least as fast as their wires
    assert found.bytes_per_s["trajectories"] <= 2.05e5
    assert "network out of" in found.bottleneck
    assert set(found.memory) == {"host-0", "host-1", "host-2"}


def test_a_far_inference_node_costs_a_round_trip_a_step() -> None:
    rates = [
        predict(plan("seed"), COSTS, Setting(hosts=2, cores=100, latency=latency, counts={"actor": 1})).env_steps_per_s
        for latency in (1e-6, 10 * MS)
    ]

    # two groups of 16, each a step every 20 ms at best
    assert rates[1] < 2 * 16 / (20 * MS)
    assert rates[1] > 0.9 * 2 * 16 / (21 * MS)
    assert rates[0] > 5 * rates[1]


def test_thousands_of_actors_are_simulated() -> None:
    found = quickstart(Setting(hosts=101, cores=64, bandwidth=1e12, counts={"actor": 2_000}))

    assert found.actors == 2_000
    # an unroll taken, copied and its weights published to 2,000: the learner's event loop has no time for more
    assert found.updates_per_s == pytest.approx(1 / ((0.1 + 0.1 + 0.1 + 1.999) * MS), rel=0.05)
    assert "event loop of learner-0" in found.bottleneck
    assert found.events < 150_000


def test_a_bundle_grows_as_one() -> None:
    found = predict(plan("ddppo"), COSTS, Setting(cores=64, counts={"learner": 6}))

    assert found.actors == 6


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(8, 4 * MS), (32, 6 * MS), (20, 5 * MS), (80, 10 * MS), (2, 3.5 * MS)],
)
def test_costs_are_interpolated(size: float, seconds: float) -> None:
    assert COSTS.at("play", size) == pytest.approx(seconds)
    assert COSTS.at("of nothing") == 0


# ---- asked for by people


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "of", lambda plan, calibrate=False: COSTS)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["actor"], "GROUP.FIELD=VALUE"),
        (["count=3"], "GROUP.FIELD=VALUE"),
        (["actor.count=none"], "whole number of at least 1"),
        (["actor.count=0"], "whole number of at least 1"),
        (["actor.envs=-3"], "nodes.actor.envs"),
        (["actor.color=3"], "nodes.actor.color"),
        (["painter.count=2"], "painter"),
    ],
)
@pytest.mark.usefixtures("known")
def test_a_bad_setting_is_refused(sets: list[str], words: str) -> None:
    with pytest.raises(DdrlError, match=words):
        report.Asked("quickstart", (), sets, Setting()).predict()


@pytest.mark.parametrize("word", ["actor.count", "actor.count=9..3", "actor.count=a..b", "actor.count=1,x"])
@pytest.mark.usefixtures("known")
def test_a_bad_range_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="expected"):
        list(report.Asked("quickstart", (), (), Setting()).sweep(word))


@pytest.mark.usefixtures("known")
def test_a_sweep_is_sampled_evenly_and_drawn(tmp_path: Path) -> None:
    asked = report.Asked("quickstart", (), ["learner.publish_every=2"], Setting(cores=100))

    rows = list(asked.sweep("actor.count=3..40"))
    report.draw("actor.count", rows, tmp_path / "sweep.svg")

    assert [value for value, _ in rows] == [found.actors for _, found in rows] == [3, 5, 10, 20, 40]
    assert "<svg" in (tmp_path / "sweep.svg").read_text()
    assert len(list(report.sweep_as_text("actor.count", iter(rows)))) == 6


@pytest.mark.usefixtures("known")
def test_sizes_may_be_swept_too() -> None:
    rows = list(report.Asked("quickstart", (), (), Setting(cores=100)).sweep("actor.envs=16,64"))

    assert rows[1][1].env_steps_per_s > 1.5 * rows[0][1].env_steps_per_s


def run_plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from ddrl_bus.cli import ddrl

    monkeypatch.setattr(sys, "argv", ["ddrl"])
    with pytest.raises(SystemExit) as ended:
        ddrl(["plan", *words])
    said = capsys.readouterr()
    return int(str(ended.value.code)), said.out, said.err


@pytest.mark.usefixtures("known")
def test_the_command_prints_a_prediction(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_plan(monkeypatch, capsys, "impala", "--set", "actor.count=8", "--hosts", "2", "--json")

    assert code == 0
    assert json.loads(out)["actors"] == 8
    code, out, _ = run_plan(monkeypatch, capsys, "impala")
    assert code == 0
    assert "bottleneck" in out


@pytest.mark.parametrize(
    "words",
    [(), ("quickstart", "-o", "x.svg"), ("quickstart", "--check", "x"), ("quickstart", "--hosts", "0"), ("nowhere",)],
)
@pytest.mark.usefixtures("known")
def test_the_command_refuses(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_plan(monkeypatch, capsys, *words)

    assert code == UsageError.exit_code
    assert not out
    assert err


# ---- measured


def test_costs_are_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fit, "EVENTS", 2_000)
    small = plan("quickstart", "nodes.actor.envs=4", "algo.batch=4")

    measured = calibrate.of(small, budget=0.005, seconds=1.0)

    for name in ("play", "load", "copy", "update", "evaluate"):
        assert 0 < measured.at(name, 4) < 1, name
    assert measured.at("play", 16) > measured.at("play", 4) / 2
    assert measured.links.keys() == {"trajectories", "weights"}
    assert all(seconds > 0 for seconds in measured.links["trajectories"])
    few, many = measured.strains
    assert few.levels.keys() == many.levels.keys() == {"actor", "learner", "trainer"}
    assert all(0.05 < level < 50 for level in [*few.levels.values(), *many.levels.values()])
    assert few.crowd < many.crowd
    assert measured.pace > 0
    assert measured.sizes["trajectories"] > 4 * 20 * 4 * 4  # the observations alone
    assert measured.sizes["weights"] < 4 * 4 * (4 * 64 + 64 * 64)  # of float16
    (kept,) = calibrate.folder().iterdir()
    assert json.loads(kept.read_text())["machine"] == measured.machine
    again = calibrate.of(plan("quickstart", "nodes.actor.envs=4", "algo.batch=4", "nodes.actor.count=7"))
    assert (again.strains, again.took) == (measured.strains, measured.took)
    assert predict(small, measured).env_steps_per_s > 0


def test_a_run_that_is_over_is_compared(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a run that is over"):
        check.measured(tmp_path)
    found: dict[str, Any] = {"env_steps_per_s": 100.0, "updates_per_s": 2.0, "learner_idle": 0.5, "staleness": None}
    made = {**found, "env_steps_per_s": 115.0, "bytes_per_s": {"weights": 5.0}, "bottleneck": "cores"}

    lines = check.compared(made, found | {"bytes_per_s": {"weights": 4.0}})

    assert [line.split()[-1] for line in lines if "env_steps" in line or "weights" in line] == ["+15%", "+25%"]


def test_the_table_says_what_is_off_and_what_of_that_is_the_machine() -> None:
    def a_round(told: float, found: float, pace: float) -> dict[str, Any]:
        figures = {"learner_idle": 0.5, "staleness": None}
        return {
            "predicted": {"2": {**figures, "env_steps_per_s": told}},
            "measured": {"2": {**figures, "env_steps_per_s": found, "pace": pace}},
            "pace": 10.0,
        }

    line = check._line("apex", 2, [a_round(140.0, 100.0, 8.0), a_round(100.0, 100.0, 10.0)])

    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["apex, 2", "120", "100", "**+20%**", "-10%", "+8%", "+40%, +0%", "50% / 50%", "-"]
    assert line.count("|") == check.HEAD[0].count("|") == check.HEAD[1].count("|")


def test_a_run_that_failed_says_so_in_the_table() -> None:
    rounds = [{"predicted": {}, "measured": {"2": {"problem": "it did not train"}}}]

    assert "it did not train" in check._line("apex", 2, rounds)
