"""The comparison runs, and both ways move the same bytes."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import requests


def test_a_row_for_each_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "CASES", requests.CASES[:1])  # the other processes count from the first one too
    (row,) = requests.measure(repeats=1)
    us = {name: figure.median for name, figure in row.figures.items()}
    assert row.name == "64 B"
    assert 0 < us["link"] <= us["link p99"]
    assert 0 < us["raw"] <= us["raw p99"]
    assert us["ratio"] == pytest.approx(us["link"] / us["raw"])
