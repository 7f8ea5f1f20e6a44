"""The comparison runs, and both ways move the same bytes."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import requests


def test_a_row_for_each_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CASES", requests.CASES[:1])  # the other processes count from the first one too
    (row,) = requests.measure(repeats=1)
    assert row.payload == "64 B"
    assert 0 < row.link_us <= row.link_p99_us
    assert 0 < row.raw_us <= row.raw_p99_us
    assert row.ratio == pytest.approx(row.link_us / row.raw_us) == row.spread[0]
    assert len(list(requests.rows_as_text(iter([row])))) == 2
