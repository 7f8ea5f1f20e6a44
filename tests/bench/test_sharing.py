"""Both ways bring every value to everybody."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import sharing


def test_a_row_for_each_size() -> None:
    rows = list(sharing.measure(sizes=(4 << 10, 1 << 20), subscribers=(2,), values=10, repeats=1))
    assert [row.name for row in rows] == ["4 KiB, ipc, 2 peers", "1024 KiB, ipc, 2 peers"]
    for row in rows:
        values = {name: figure.median for name, figure in row.figures.items()}
        assert min(values.values()) > 0
        assert values["ratio"] == pytest.approx(values["shared"] / values["sent"])
