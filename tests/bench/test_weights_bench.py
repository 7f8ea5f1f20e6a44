"""The comparison runs, on one host and over a cable."""

from __future__ import annotations

import os
import shutil

import pytest

from ddrl_bus.bench import weights
from ddrl_bus.errors import UsageError


def test_a_row_for_each_way() -> None:
    link, bare = weights.measure(subscribers=2, size=400_000, rounds=3)
    assert (link.way, bare.way) == ("link", "bare PUB/SUB")
    for row in (link, bare):
        assert (row.subscribers, row.bytes) == (2, 400_000)
        assert 0 < row.all_hold_ms <= row.p90_ms
        assert 0 < row.publisher_cpu_ms <= row.cpu_ms
    assert len(list(weights.rows_as_text(iter([link, bare])))) == 3


@pytest.mark.skipif(bool(os.geteuid()) or not shutil.which("tc"), reason="needs root and iproute2")
def test_differences_are_fewer_bytes_over_a_cable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MOVES", (0.45,))
    whole, delta = weights.measure_between_hosts(mbit=100, size=400_000, rounds=2)
    assert whole.sent_bytes == pytest.approx(whole.bytes, rel=0.01)
    assert 0 < delta.sent_bytes < whole.sent_bytes / 2


def test_without_rights_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="only root"):
        list(weights.measure_between_hosts(mbit=100))
