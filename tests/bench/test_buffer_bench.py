"""The comparison runs, and copies what the buffer moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ddrl_bus.bench import buffer


def test_a_row_for_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "CASES", [replace(case, capacity=2_000) for case in buffer.CASES])
    monkeypatch.setattr(buffer, "_FAR_BYTES", 1 << 20)
    rows = list(buffer.measure(repeats=1, seconds=0.02))
    assert [row.payload for row in rows] == [case.payload for case in buffer.CASES]
    for row in rows:
        assert min(row.add, row.copy_in, row.draw, row.copy_out) > 0
        assert (row.add_ratio, row.gather_ratio) == pytest.approx((row.add / row.copy_in, row.gather / row.copy_out))
    assert len(list(buffer.rows_as_text(iter(rows)))) == 1 + len(rows)
