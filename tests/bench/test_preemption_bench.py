"""Real runs, of one worker that is slow: who waits for it, and for how long."""

from __future__ import annotations

from pathlib import Path

import pytest

from ddrl_bus.bench import preemption
from ddrl_bus.bench.crew import crew
from ddrl_bus.bench.preemption import SLOWER, UNROLL, Case
from ddrl_bus.launch import run_dir


@pytest.mark.parametrize(
    ("case", "rollouts"), [(Case(1, 0), 1), (Case(5, 0), 5), (Case(5, 0.6), 1.25), (Case(2, 0.6), 1), (Case(1, 0.6), 1)]
)
def test_the_least_time_of_an_update(case: Case, rollouts: float) -> None:
    assert case.least_s == pytest.approx(rollouts * UNROLL * preemption.STEP_S)


@pytest.mark.parametrize("preempt", [0.0, 0.6])
def test_the_plan_is_of_the_case(preempt: float, tmp_path: Path) -> None:
    plan = preemption._plan(Case(SLOWER, preempt), tmp_path)
    assert (plan.algo.preempt, plan.algo.preempt_after) == (preempt, preemption.LEAST)
    assert len(plan.process("worker-3")) == 2


def test_the_slow_one_ends_its_rollouts_early() -> None:
    case = Case(SLOWER, 0.5, workers=2)
    (row,) = preemption.measure(updates=3, cases=[case])
    assert row.name == "2 workers, last 5× slower, preempt 0.5"
    update, rows = row.figures["update"], row.figures["its rows"]
    assert len(update.values) == 3
    assert row.figures["of all alike"].median == 1
    assert UNROLL / 4 <= sum(rows.values) / 3 < UNROLL
    assert update.median > 0.95 * case.least_s * 1e3  # it may be slower than the rule says, but never quicker


def test_a_process_that_leaves_ends_it(tmp_path: Path) -> None:
    case = Case(1, 0)
    run_dir.create(preemption._plan(case, tmp_path), path=tmp_path, command=[], started=0.0)
    with crew(1) as members:
        members[0].start(preemption._live, "worker-9", case, tmp_path)
        with pytest.raises(RuntimeError, match="no node 'worker-9'; have"):
            next(preemption._updates(tmp_path, 1, members))
