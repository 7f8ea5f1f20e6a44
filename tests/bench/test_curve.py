"""The comparison runs, and both ways move the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddrl_bus.bench import curve


def test_a_row_for_each_payload() -> None:
    cell = curve.CELLS[0]
    (row,) = curve.measure([replace(cell, payload=replace(cell.payload, flood=500))], repeats=1)
    values = {name: figure.median for name, figure in row.figures.items()}
    assert min(values.values()) > 0
    assert values["ratio"] == pytest.approx(values["CURVE"] / values["plain"])
    assert values["CURVE rate"] == pytest.approx(320 / values["CURVE"])
