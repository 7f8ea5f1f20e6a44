from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddrl_bus.bench import results
from ddrl_bus.bench.cases import CASES, RULES, Case, Seed, named
from ddrl_bus.bench.results_page import CaseResults, Record
from ddrl_bus.errors import UsageError
from ddrl_bus.launch.catalog import packaged
from ddrl_bus.launch.start import plan_of

WORST = Case("worst", "a2c", bar=475, steps=1000)
TWO_OF_THREE = Case("two", "a3c", bar=475, steps=1000, rule="worst 400")
STAYS = Case("stays", "impala", bar=200, steps=1000, rule="stays", control_of="worst")
ENDS_UNDER = Case("ends", "impala", bar=300, steps=1000, rule="ends under")


def seeds(*finals: float | None, steps: int = 900, best: float | None = None, problem: str = "") -> list[Seed]:
    return [Seed(final, final if best is None else best, steps, problem) for final in finals]


def record(case: Case, seed: int, final: float | None, **change: Any) -> Record:
    return {
        "command": " ".join(["ddrl", *case.words(seed)]),
        "date": "2030-01-02",
        "machine": "2 cores",
        "final": final,
        "best": final,
        "env_steps": 900,
        "wall_s": 12.34,
        "steps_per_s": 5000.0,
        "overhead": {"actor": 0.05, "learner": 0.2},
        "lag": {"mean": 1.5, "p95": 2.0, "max": 3.0},
        "ledger_closed": True,
        "lost": 0,
        "restarts": 0,
        "versions": {"torch": "2.0"},
        "problem": "",
        "curve": [[0, 1.0, 20.0, False], [900, 9.0, final, True]],
        **change,
    }


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("case", "ran", "passes"),
    [
        (WORST, seeds(475, 500, 480), True),
        (WORST, seeds(500, 474.9, 500), False),
        (WORST, seeds(500, None, 500), False),
        (WORST, seeds(500, 500, 500, steps=1020), True),
        (WORST, seeds(500, 500, 500, steps=1021), False),
        (WORST, seeds(500, 500, 500, problem="the ledger does not close"), False),
        (TWO_OF_THREE, seeds(500, 400, 480), True),
        (TWO_OF_THREE, seeds(500, 399, 480), False),
        (TWO_OF_THREE, seeds(500, 450, 450), False),
        (TWO_OF_THREE, seeds(500, None, 480), False),
        (STAYS, seeds(20, 200, 100), True),
        (STAYS, seeds(20, 201, 100), False),
        (STAYS, seeds(20, 20, 20, best=201), False),
        (STAYS, seeds(20, None, 20), False),
        (STAYS, seeds(20, 20, 20, problem="exit code 70"), False),
        (ENDS_UNDER, seeds(500, 100, 300), True),
        (ENDS_UNDER, seeds(500, 200, 300), False),
        (ENDS_UNDER, seeds(100, None, 100), False),
    ],
)
def test_when_a_case_passes(case: Case, ran: Sequence[Seed], passes: bool) -> None:
    assert case.passes(ran) is passes


def test_the_table_of_cases_is_sound() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.rule in RULES
        assert case.topology in packaged()
        assert not case.control_of or named([case.control_of])
        assert case.lock(), case
    with pytest.raises(UsageError, match="no case 'a2c-cartpol'; did you mean 'a2c-cartpole'"):
        named(["a2c-cartpol"])


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────


def written(docs: Path, records: results.Records, cases: Sequence[Case]) -> str:
    (docs / "results").mkdir(parents=True, exist_ok=True)
    results.store(docs / "results.json", records)
    for case in cases:
        results.store_settings(results.settings_path(case, docs), case.lock())
    assert results.main(["--only-write", "--docs", str(docs)], cases) == 0
    return (docs / "results.md").read_text()


def test_the_page_comes_from_the_numbers(tmp_path: Path) -> None:
    records = {
        "worst": {str(seed): record(WORST, seed, final) for seed, final in ((1, 480.0), (2, 500.0), (3, 490.0))},
        "stays": {"1": record(STAYS, 1, 300.0)},
        "two": {
            "1": {
                "command": "ddrl " + " ".join(TWO_OF_THREE.words(1)),
                "date": "-",
                "machine": "-",
                "problem": "it broke",
            }
        },
    }
    page = written(tmp_path, records, (WORST, STAYS, TWO_OF_THREE, ENDS_UNDER))
    lines = {line.split(" | ")[0]: line for line in page.splitlines() if line.startswith("| ")}
    assert lines["| [worst](#worst)"].endswith("| 480.0 @ 1 k; 500.0 @ 1 k; 490.0 @ 1 k | pass |")
    assert lines["| [stays](#stays)"].endswith("| 300.0 @ 1 k (best 300.0) | **FAIL** |")
    assert lines["| [two](#two)"].endswith("| failed | **FAIL** |")
    assert lines["| ends"].endswith("| – | not run |")
    assert (
        "| 2 | 500.0 | 500.0 | 900 | 12.3 | 5,000 | actor 5.0%, learner 20.0% | 1.5 / 2.0 / 3.0 | closed | 2030-01-02 |"
        in page
    )
    assert "| 1 | failed: it broke | | | | | | | | - |" in page
    assert "ddrl run a2c name=worst seed=SEED env.id=CartPole-v1 stop.reward=null stop.steps=1000 " in page
    assert "![learning curves of worst](results/worst.svg)" in page
    assert "![learning curves of two]" not in page
    svg = (tmp_path / "results" / "stays.svg").read_text()
    assert "worst (3 seeds)" in svg
    assert "stays (seed 1)" in svg
    assert written(tmp_path, results.load(tmp_path / "results.json"), (WORST, STAYS, TWO_OF_THREE, ENDS_UNDER)) == page


def test_fewer_seeds_are_no_pass_yet_and_other_settings_are_none_at_all() -> None:
    kept = {"1": record(WORST, 1, 480.0)}
    assert CaseResults(WORST, kept, same_settings=True).verdict == "pass so far, 1 of 3 seeds"
    other_command = CaseResults(replace(WORST, settings="algo.lr=1"), kept, same_settings=True)
    other_settings = CaseResults(WORST, kept, same_settings=False)
    for changed in (other_command, other_settings):
        assert changed.verdict == "settings changed since"
        assert not changed.passed


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "worst.yaml"
    results.store_settings(path, WORST.lock())
    return path


def test_settings_are_a_topology_that_makes_the_same_run(stored: Path) -> None:
    _, topology, *overrides = WORST.words(seed=2)
    assert plan_of(str(stored), ["seed=2"], probe=False) == plan_of(topology, overrides, probe=False)
    assert WORST.matches(stored)


@pytest.mark.parametrize(
    ("written", "instead", "same"),
    [
        (", delay: 0", "", True),  # as before there was such an option
        ("  time: null\n", "", True),
        ("  anneal_steps: 500000\n", "", False),  # the topology file says it, and it is not the default
        ("  lr: 0.003\n", "  lr: 0.004\n", False),
        ("delay: 0", "delay: 1", False),
        ("  time: null\n", "  time: 60.0\n", False),
        ("delay: 0", "delay: 0, gone: 0", False),
        ("  weights:", "  wights:", False),
    ],
)
def test_an_option_that_came_later_is_no_change_unless_it_is_set(
    stored: Path, written: str, instead: str, same: bool
) -> None:
    text = stored.read_text()
    assert text.count(written) == 1
    stored.write_text(text.replace(written, instead))
    assert WORST.matches(stored) is same


def test_without_a_file_nothing_is_known_of_the_settings(stored: Path) -> None:
    absent = Case("absent", "no-such-topology", bar=1, steps=10)
    assert not absent.matches(stored)
    results.store_settings(stored, absent.lock())
    assert not stored.exists()
    assert absent.matches(stored)
    assert not WORST.matches(stored)


def test_a_damaged_file_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"worst": ')
    assert results.main(["--only-write", "--docs", str(tmp_path)]) == 64
    assert "results.json: not whole" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"worst": '


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_real_run_is_measured(recorded: Any) -> None:
    found = recorded.record
    assert found["problem"] == ""
    assert found["command"] == (
        "ddrl run quickstart name=tiny seed=1 env.id=CartPole-v1 stop.reward=null stop.steps=20000 "
        "nodes.evaluator.greedy=false nodes.evaluator.episodes=20"
    )
    assert found["reason"] == "steps"
    assert found["final"] == pytest.approx(found["curve"][-1][2], abs=1e-3)
    assert found["best"] >= found["final"] > 0
    assert 20_000 <= found["env_steps"] < 40_000
    assert found["ledger_closed"] is True
    assert found["overhead"].keys() == {"actor", "learner", "evaluator"}
    assert found["lag"]["max"] >= found["lag"]["mean"] >= 0
    assert not json.dumps(found).count(str(recorded.root))
    verdict = CaseResults(recorded.case, {"1": found}, same_settings=True).verdict
    assert verdict == "**FAIL**"  # 20 random steps are more than its bar of 15


def test_what_fails_is_written_too_and_other_cases_are_kept(
    tmp_path: Path, recorded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recorded.root)
    monkeypatch.setenv("PYTHONPATH", str(Path(results.__file__).parents[2]))
    absent = Case("absent", "no-such-topology", bar=1, steps=10)
    results.store(tmp_path / "results.json", {"tiny": {"1": recorded.record}, "absent": {"7": record(WORST, 7, 1.0)}})
    assert results.main(["absent", "--seeds", "1", "--docs", str(tmp_path)], (recorded.case, absent)) == 1
    assert "no-such-topology" in capsys.readouterr().err
    kept = results.load(tmp_path / "results.json")
    assert kept["tiny"] == {"1": recorded.record}
    assert kept["absent"].keys() == {"1"}, "what was measured with other settings is gone"
    assert kept["absent"]["1"]["problem"].startswith("exit code 64: error: no file and no packaged topology")
    assert (
        "| [absent](#absent) | CartPole-v1 | 1 | 10 | every seed ≥ bar | failed | **FAIL** |"
        in (tmp_path / "results.md").read_text()
    )


def test_what_was_measured_with_other_settings_goes_when_a_case_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(results.__file__).parents[2]))
    case = Case("broken", "quickstart", bar=1, steps=10, env="NoSuchEnv-v0")  # refused when it is made, not before
    results.store(tmp_path / "results.json", {"broken": {"7": record(case, 7, 1.0)}})
    stored = tmp_path / "results" / "broken.yaml"
    stored.parent.mkdir()
    for seed, kept in (("1", {"1"}), ("2", {"1", "2"})):
        assert case.matches(stored) is (seed != "1")
        assert results.main(["broken", "--seeds", seed, "--docs", str(tmp_path)], (case,)) == 1
        assert results.load(tmp_path / "results.json")["broken"].keys() == kept
        assert stored.read_text() == case.lock()


def test_list_prints_commands_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main(["--list", "--docs", str(tmp_path / "docs")]) == 0
    out = capsys.readouterr().out
    assert "a2c-acrobot: -100 within 500,000 steps, every seed ≥ bar\n    ddrl run a2c name=a2c-acrobot seed=1" in out
    assert not (tmp_path / "docs").exists()
