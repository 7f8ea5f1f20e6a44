"""Every way says the same, and the break-even is where two are equally quick."""

from __future__ import annotations

import numpy as np
import pytest

from ddrl_bus.bench import codec
from ddrl_bus.transport import delta, wire


def test_a_row_for_each_payload() -> None:
    rows = {row.name: {k: f.median for k, f in row.figures.items()} for row in codec.measure(repeats=1, seconds=0.005)}
    assert list(rows) == [*(name for name, _, _ in codec.CASES), *(name for name, _ in codec.STEPS)]
    for values in rows.values():
        assert values["smaller"] == pytest.approx(values["plain"] / values["coded"])
    small, game, noise, weights, all_rows, some_rows = rows.values()
    assert game["smaller"] > 10
    assert noise["smaller"] == weights["smaller"] == 1
    assert noise["break-even"] == weights["break-even"] == 0
    spent = sum(game[what] - game[f"plain {what}"] for what in ("encode", "decode"))
    assert game["break-even"] == pytest.approx((game["plain"] - game["coded"]) / spent)
    assert small["plain"] > 320
    assert 1 < all_rows["smaller"] < some_rows["smaller"]
    assert some_rows["break-even"] > 0


def test_a_difference_is_of_the_rows_that_moved() -> None:
    before, after = codec._two_values(0.45)
    old, new = (wire.decode(frame).arrays["weights"] for frame in (before, after))
    assert 0.3 < np.mean((old != new).any(axis=1)) < 0.6
    packed = delta.encode(before, after)
    assert packed is not None
    np.testing.assert_array_equal(wire.decode(delta.decode(before, packed)).arrays["weights"], new)
