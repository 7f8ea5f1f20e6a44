from __future__ import annotations

import pytest

from ddrl_bus.bench import faults
from ddrl_bus.bench.faults import Fault, Seen, measure, row_of
from ddrl_bus.bench.report import Row
from ddrl_bus.errors import UsageError
from ddrl_bus.transport.ledger import Balance

BEFORE = Seen([40.0, 50.0], pause_s=0.1, noticed_s=None)
AFTER = Seen([30.0, 20.0], pause_s=1.5, noticed_s=None)


def medians(row: Row) -> dict[str, float]:
    return {name: figure.median for name, figure in row.figures.items()}


def test_a_run_whose_connections_are_reset_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "QUIET_S", 1.0)
    (reset,) = (fault for fault in faults.faults([]) if fault.name == "reset")
    (row,) = measure([reset])
    assert (row.section, row.name, row.main) == ("a dead line", "reset", "goes on")
    found = medians(row)
    assert list(found) == ["goes on", "unrolls", "lost", "open books"]  # it is over at once: there is no meanwhile
    assert found["goes on"] > 0
    assert found["unrolls"] > 20
    assert found["lost"] <= 1  # the window
    assert found["open books"] == 0


def test_a_dead_line_is_judged_by_when_it_goes_on() -> None:
    meanwhile = Seen([80.0, 0.0], pause_s=5.0, noticed_s=4.6)
    row = row_of(Fault("partition", 5.0), BEFORE, meanwhile, AFTER, Balance(produced=9, lost=1, closed=False))
    assert (row.section, row.name, row.main) == ("a dead line", "partition, 5 s", "goes on")
    expected = {"noticed": 4.6, "goes on": 1.5, "near": 200, "far": 0, "unrolls": 9, "lost": 1, "open books": 1}
    assert medians(row) == expected


def test_a_bad_line_is_judged_by_its_gaps() -> None:
    meanwhile = Seen([20.0, 25.0], pause_s=0.4, noticed_s=None)
    row = row_of(Fault("5 % packet loss", 10.0, leaky=True), BEFORE, meanwhile, AFTER, Balance(produced=9))
    assert (row.section, row.name, row.main) == ("a bad line", "5 % packet loss, 10 s", "longest gap")
    assert medians(row) == {"longest gap": 0.4, "near": 50, "far": 50, "unrolls": 9, "lost": 0, "open books": 0}


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "MISSING", "needs root")
    with pytest.raises(UsageError, match="needs root"):
        next(measure(faults.faults([5.0])))
