from __future__ import annotations

from dataclasses import replace

import pytest

from ddrl_bus.bench import faults
from ddrl_bus.bench.faults import measure, rows_as_text
from ddrl_bus.errors import UsageError


def test_a_run_whose_connections_are_reset_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "QUIET_S", 1.0)
    (reset,) = (fault for fault in faults.faults([]) if fault.name == "reset")
    (row,) = measure([reset])
    assert row.closed
    assert (row.noticed_s, row.near, row.far) == (None, None, None)
    assert row.goes_on_s > 0
    assert row.lost <= 1  # the window
    assert row.produced > 20


def test_table(monkeypatch: pytest.MonkeyPatch) -> None:
    row = faults.Row("partition", 5.0, 4.6, 1.461, 2.61, 0.0, 1174, 1, closed=True)
    head, first, second = rows_as_text(iter([row, replace(row, noticed_s=None, near=None, closed=False)]))
    assert head.split()[:4] == ["fault", "lasts", "s", "noticed"]
    assert first.split() == ["partition", "5", "4.6", "1.46", "261%", "0%", "1174", "1", "closed"]
    assert second.split() == ["partition", "5", "-", "1.46", "-", "0%", "1174", "1", "OPEN"]


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MISSING", "needs root")
    with pytest.raises(UsageError, match="needs root"):
        next(measure(faults.faults([5.0])))
