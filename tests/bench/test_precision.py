"""What rounding changes is measured, on a network that hardly learnt."""

from __future__ import annotations

import dataclasses

import pytest

from ddrl_bus.bench import precision


@pytest.mark.parametrize("case", precision.CASES[:2], ids=lambda case: case.algo)
def test_rounding_is_small_beside_an_update_and_not_nothing(case: precision.Case) -> None:
    (row,) = precision.measure([dataclasses.replace(case, steps=1)], updates=5)
    assert row.updates == 6
    assert 0 < row.error < 0.02  # float16 has eleven bits
    assert 0 < row.spread[0] <= row.ratio <= row.spread[1] < 1
    assert row.flipped < 0.1
    assert min(row.float32_us, row.float16_us, row.numpy_us) > 0
    assert len(list(precision.rows_as_text(iter([row])))) == 2
