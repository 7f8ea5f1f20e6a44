"""The comparison runs, on one host and over a cable."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import weights
from ddrl_bus.bench.cable import MISSING
from ddrl_bus.errors import UsageError


def test_each_way_meets_the_same_rounds() -> None:
    held, publisher, everybody = weights.measure(subscribers=2, size=400_000, rounds=3)
    assert [row.name for row in (held, publisher, everybody)] == list(weights.WHAT)
    for row in (held, publisher, everybody):
        assert row.section == "2 processes of this host, 400,000 bytes"
        assert row.main == "ratio"
        for link, bare, ratio in zip(*(row.figures[name].values for name in ("link", "bare", "ratio")), strict=True):
            assert link > 0
            assert ratio == pytest.approx(link / bare)
        assert len(row.figures["ratio"].values) == 3
    for way in ("link", "bare"):
        for one, all_of_them in zip(publisher.figures[way].values, everybody.figures[way].values, strict=True):
            assert one <= all_of_them


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_differences_are_fewer_bytes_over_a_cable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOVES", (0.45,))
    (row,) = weights.measure_between_hosts(mbit=100, size=400_000, rounds=2)
    assert row.section == "another host, 100 Mbit/s, 400,000 bytes"
    assert row.figures["whole sent"].median == pytest.approx(400_000, rel=0.01)
    assert 0 < row.figures["delta sent"].median < row.figures["whole sent"].median / 2
    assert len(row.figures["ratio"].values) == 2


def test_without_rights_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MISSING", "needs root")
    with pytest.raises(UsageError, match="needs root"):
        list(weights.measure_between_hosts(mbit=100))
