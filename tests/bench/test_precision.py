"""What rounding changes is measured, on a network that hardly learnt."""

from __future__ import annotations

import dataclasses

import pytest

from ddrl_bus.bench import precision


@pytest.mark.parametrize("case", precision.CASES[:2], ids=lambda case: case.algo)
def test_rounding_is_small_beside_an_update_and_not_nothing(case: precision.Case) -> None:
    said, copied = precision.measure([dataclasses.replace(case, steps=1)], updates=5)
    assert said.name == case.name
    assert said.main == "error/step"
    assert len(said.figures["error"].values) == 5
    assert 0 < said.figures["error"].median < 0.02  # float16 has eleven bits
    assert all(0 < ratio < 1 for ratio in said.figures["error/step"].values)
    assert max(said.figures["best action changes"].values) < 20
    assert copied.name == f"{case.name}, 4,675 weights"
    assert all(figure.median > 0 for figure in copied.figures.values())
    assert len(copied.figures["ratio"].values) == precision.COPIES
