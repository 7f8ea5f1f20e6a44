"""The comparison runs: three ways to do the same, one at a time and beside each other."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import replay


def test_a_row_for_each_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "CASES", replay.CASES[:1])  # the other processes count from the first one too
    rows = list(replay.measure(repeats=1, seconds=0.05))
    assert [row.name for row in rows] == [
        *("inserts", "samples", "priorities"),
        *("inserts beside samples", "samples beside inserts"),
    ]
    for row in rows:
        assert row.section.endswith("4 floats")
        rates = {name: figure.median for name, figure in row.figures.items()}
        assert min(rates.values()) > 0
        assert rates["of bare"] == pytest.approx(rates["node"] / rates["bare"])
        assert rates["of raw"] == pytest.approx(rates["node"] / rates["raw"])
