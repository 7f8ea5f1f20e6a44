"""Both ways pack the same, and the break-even is where they are equally quick."""

from __future__ import annotations

import pytest

from ddrl_bus.bench import codec


def test_a_row_for_each_payload() -> None:
    rows = {row.name: {k: f.median for k, f in row.figures.items()} for row in codec.measure(repeats=1, seconds=0.005)}
    assert list(rows) == [name for name, _, _ in codec.CASES]
    for values in rows.values():
        assert values["smaller"] == pytest.approx(values["plain"] / values["LZ4"])
    small, game, noise, weights = rows.values()
    assert game["smaller"] > 10
    assert noise["smaller"] == weights["smaller"] == 1
    assert noise["break-even"] == weights["break-even"] == 0
    spent = sum(game[f"LZ4 {what}"] - game[f"plain {what}"] for what in ("encode", "decode"))
    assert game["break-even"] == pytest.approx((game["plain"] - game["LZ4"]) / spent)
    assert small["plain"] > 320
