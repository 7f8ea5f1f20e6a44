"""The comparison runs, and both ways move the same bytes."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import curve
from ddrl_bus.bench.links import Case


def test_a_row_for_each_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "CASES", (Case("small unroll, 320 B", 64, 500),))
    (row,) = curve.measure(repeats=1)
    assert row.plain_us > 0
    assert row.ratio == pytest.approx(row.curve_us / row.plain_us) == row.spread[0]
    assert row.curve_mb_s == pytest.approx(320 / row.curve_us)
    assert len(list(curve.rows_as_text(iter([row])))) == 2
