"""Losses that stand out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddrl_bus.nodes.outliers import FIRST, IN_A_ROW, RATE, Outliers


def used(limit: float = 4.0, losses: int = 300) -> tuple[Outliers, np.random.Generator]:
    """After losses of mean 1 and deviation .1, both signs."""
    outliers, random = Outliers(limit), np.random.default_rng(0)
    for loss in random.normal(1.0, 0.1, losses):
        outliers.stands_out(loss * random.choice([-1, 1]))
    return outliers, random


@pytest.mark.parametrize("sign", [-1, 1])
def test_what_is_far_above_the_mean_stands_out(sign: int) -> None:
    outliers, _ = used()
    assert not outliers.stands_out(sign * 1.2)
    assert outliers.stands_out(sign * 2.0)
    assert not outliers.stands_out(sign * 0.1)  # small is never wrong


def test_outliers_change_no_statistics() -> None:
    outliers, _ = used()
    for _ in range(50):
        assert outliers.stands_out(1.9)
        assert not outliers.stands_out(1.0)


def test_the_first_losses_are_not_judged() -> None:
    outliers = Outliers(4.0)
    assert not any(outliers.stands_out(10.0**n) for n in range(FIRST))
    assert outliers.stands_out(10.0**FIRST)


def test_what_stays_large_is_the_new_scale() -> None:
    outliers, random = used()
    judged = [outliers.stands_out(loss) for loss in random.normal(1000.0, 100.0, 1000)]
    assert judged[: IN_A_ROW + 1] == [True] * IN_A_ROW + [False]
    assert not any(judged[200:])


def test_the_mean_follows_as_slowly_as_it_should() -> None:
    """Of a slope, it lags by that of 1/RATE losses."""
    outliers = Outliers(math.inf)
    for n in range(5000):
        assert not outliers.stands_out(float(n))
    assert outliers._mean == pytest.approx(4999 - (1 - RATE) / RATE, rel=1e-3)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_judged_and_spoils_nothing(loss: float) -> None:
    outliers, _ = used()
    assert not any(outliers.stands_out(loss) for _ in range(2 * IN_A_ROW))
    assert outliers.stands_out(2.0)
    assert not outliers.stands_out(1.0)
