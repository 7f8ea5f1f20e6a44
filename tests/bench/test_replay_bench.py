"""The comparison runs: three ways to do the same, one at a time and beside each other."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import replay


def test_a_row_for_each_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CASES", replay.CASES[:1])  # the other processes count from the first one too
    rows = list(replay.measure(repeats=1, seconds=0.05))
    assert [row.what for row in rows] == [
        *("inserts", "samples", "priorities"),
        *("inserts beside samples", "samples beside inserts"),
    ]
    for row in rows:
        assert row.payload == "4 floats"
        assert min(row.bare, row.node, row.raw, row.mb_per_s) > 0
        assert (row.of_bare, row.of_raw) == pytest.approx((row.node / row.bare, row.node / row.raw))
    assert len(list(replay.rows_as_text(iter(rows)))) == 1 + len(rows)
