"""The comparison runs, and copies what the buffer moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddrl_bus.bench import buffer


def test_a_row_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "CASES", [replace(case, capacity=2_000) for case in buffer.CASES])
    monkeypatch.setattr(buffer, "_FAR_BYTES", 1 << 20)
    rows = list(buffer.measure(repeats=1, seconds=0.02))
    assert [row.name for row in rows] == [case.payload for case in buffer.CASES]
    for row in rows:
        us = {name: figure.median for name, figure in row.figures.items()}
        assert min(us[name] for name in ("add", "copy in", "draw", "copy out")) > 0
        assert us["add ratio"] == pytest.approx(us["add"] / us["copy in"])
        assert us["gather ratio"] == pytest.approx(us["gather"] / us["copy out"])
