"""Shares of a node's time, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddrl_bus import metrics
from ddrl_bus.metrics import JsonLines, SharedClock, clock, shares
from ddrl_bus.transport.ledger import Ledger


def counted(**ns: int) -> dict[str, int]:
    return {f"time/{what}": n for what, n in ns.items()} | {"env_steps": 10**12}


def test_no_time_no_shares() -> None:
    assert shares({}) == {}
    assert shares(counted(send_wait=5)) == {}


def test_shares_of_an_actor() -> None:
    # busy 100: 60 env, 30 forward, 4 record, 2 pack, 1 send, 1 unpack, 2 handed over (of 27 idle, 25 were waits)
    spent = counted(env=60, forward=30, record=4, pack=2, send=1, unpack=1, idle=27, send_wait=20, weights_wait=5)
    assert shares(spent) == pytest.approx(
        {
            "env": 0.60,
            "forward": 0.30,
            "record": 0.04,
            "pack": 0.02,
            "send": 0.01,
            "unpack": 0.01,
            "handoff": 0.02,
            "send_wait": 20 / 125,
            "weights_wait": 5 / 125,
            "overhead": 0.06,
        }
    )


def test_waits_that_overlap_work_are_no_negative_handoff() -> None:
    found = shares(counted(learn=90, unpack=10, queue_wait=50, idle=40))
    assert "handoff" not in found
    assert found["overhead"] == pytest.approx(0.1)


def test_shares_of_the_time_in_between() -> None:
    before, now = counted(env=1000, pack=1000), counted(env=1030, pack=1010)
    assert shares(now, before) == pytest.approx({"env": 0.75, "pack": 0.25, "overhead": 0.25})


def test_busy_shares_add_up() -> None:
    found = shares(counted(env=7, forward=11, record=13, pack=17, send=19, unpack=23, idle=40, send_wait=9))
    assert sum(share for what, share in found.items() if what not in ("overhead", "send_wait")) == pytest.approx(1)


def test_a_clock_counts_into_the_ledger() -> None:
    ledger = Ledger()
    timed = clock(ledger, "env")
    with timed:
        pass
    once = ledger.snapshot()["time/env"]
    with timed:
        sum(range(1000))
    assert ledger.snapshot()["time/env"] > once > 0


def test_a_clock_counts_what_raised() -> None:
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError), clock(ledger, "learn"):
        raise ZeroDivisionError
    assert ledger.snapshot()["time/learn"] > 0


def test_json_lines_are_whole_at_once_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for n in (1, 2):
        lines = JsonLines(path)
        lines.write({"n": n, "nested": {"none": None}})
        assert json.loads(path.read_text().splitlines()[-1]) == {"n": n, "nested": {"none": None}}
        lines.close()
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


def test_what_json_has_no_number_for_is_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    nan, inf = float("nan"), float("inf")
    lines.write({"loss": nan, "nodes": {"learner-0": {"grad_norm": inf, "lag": [1.0, -inf]}}})
    lines.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"loss": None, "nodes": {"learner-0": {"grad_norm": None, "lag": [1.0, None]}}}


def test_a_shared_clock_counts_while_all_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under what the first to go on had waited for."""
    now = 0
    monkeypatch.setattr(metrics.time, "perf_counter_ns", lambda: now)
    ledger = Ledger()
    shared = SharedClock(ledger, 2)
    a, b = shared.waits("act_wait"), shared.waits("send_wait")
    a.__enter__()
    now = 10
    b.__enter__()
    now = 17
    b.__exit__(None, None, None)
    now = 30
    with shared.waits("send_wait"):
        now = 32
        a.__exit__(None, None, None)
        now = 40
    assert ledger.snapshot() == {"time/send_wait": 7, "time/act_wait": 2}
