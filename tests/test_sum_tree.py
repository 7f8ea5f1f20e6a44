"""The sum tree against a plain array of its leaves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ddrl_bus.errors import UsageError
from ddrl_bus.sum_tree import SumTree

PRIORITY = st.one_of(st.just(0.0), st.floats(1e-12, 1e12))


def tree_of(leaves: NDArray[np.float64] | list[float], seed: int = 0) -> SumTree:
    tree = SumTree(len(leaves), np.random.default_rng(seed))
    tree.set_range(0, np.asarray(leaves, np.float64))
    return tree


def chi_square(drawn: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Standard deviations that the χ² statistic lies above its mean, of draws that should follow `p` > 0."""
    expected = len(drawn) * p
    statistic = ((np.bincount(drawn, minlength=len(p)) - expected) ** 2 / expected).sum()
    freedom = len(p) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("leaves", [10, 1_500, 5_000])  # without, with one, and with several levels under the top
def test_draws_follow_the_priorities(leaves: int) -> None:
    value = np.random.default_rng(1).random(leaves) + 0.1

    drawn = tree_of(value).sample(200_000)

    assert chi_square(drawn, value / value.sum()) < 5
    assert chi_square(drawn, np.full(leaves, 1 / leaves)) > 50, "the statistic would not see a wrong distribution"


def test_the_total_is_the_sum_of_the_leaves_after_a_million_updates() -> None:
    rng, leaves = np.random.default_rng(2), 20_000
    twin = np.zeros(leaves)
    tree = tree_of(twin)
    for _ in range(500):
        index, value = rng.integers(0, leaves, 2_000), rng.exponential(10.0 ** rng.integers(-6, 6), 2_000)
        tree.set(index, value)
        for i, v in zip(index.tolist(), value.tolist(), strict=True):
            twin[i] = v

    assert np.array_equal(tree.values(np.arange(leaves)), twin)
    assert tree.total == pytest.approx(math.fsum(twin), rel=1e-9)


@given(
    st.integers(1, 5_000),
    st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, 4_999), PRIORITY), max_size=20),
            st.tuples(st.integers(0, 4_999), st.lists(PRIORITY, min_size=1, max_size=20)),
        ),
        max_size=6,
    ),
)
@settings(max_examples=150, deadline=None)
def test_leaves_are_what_was_set_last(
    leaves: int, changes: list[list[tuple[int, float]] | tuple[int, list[float]]]
) -> None:
    twin = np.zeros(leaves)
    tree = tree_of(twin)
    for change in changes:
        if isinstance(change, list):
            index = np.array([i % leaves for i, _ in change], np.int64)
            tree.set(index, np.array([value for _, value in change]))
            for i, (_, value) in zip(index, change, strict=True):
                twin[i] = value
        else:
            start = change[0] % leaves
            values = np.array(change[1][: leaves - start])
            tree.set_range(start, values)
            twin[start : start + len(values)] = values

    assert np.array_equal(tree.values(slice(0, leaves)), twin)
    assert tree.total == pytest.approx(math.fsum(twin), rel=1e-12)
    if twin.any():
        assert twin[tree.sample(100)].all(), "a zero leaf was drawn"
        again = tree_of(twin)
        assert again.total == tree.total, "the leaves alone are the state"


class _Edges(np.random.Generator):
    """Its first draws are half of them the largest number below 1, and one is 0."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))
        self.first = True

    def random(self, size: int) -> NDArray[np.float64]:  # type: ignore[override]
        drawn = super().random(size)
        if self.first:
            drawn[::2] = np.nextafter(1.0, 0.0)
            drawn[1] = 0.0
        self.first = False
        return drawn


@pytest.mark.parametrize("seed", range(20))
def test_no_zero_leaf_is_drawn_at_an_edge(seed: int) -> None:
    rng = np.random.default_rng(seed)
    value = rng.random(3_000) * 10.0 ** rng.integers(-15, 15, 3_000)
    value[rng.random(3_000) < 0.7] = 0
    value[1_000:] = 0
    tree = SumTree(3_000, _Edges())
    tree.set_range(0, value)

    drawn = tree.sample(512)

    assert value[drawn].all()
    assert (drawn[1:] >= drawn[:-1]).all()


def test_an_empty_leaf_that_rounding_reached_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tree_of([0.0, 1.0, 1.0])
    descents = iter([np.array([0, 1, 2]), np.array([0]), np.array([2])])
    monkeypatch.setattr(tree, "_descend", lambda _count: next(descents))

    assert tree.sample(3).tolist() == [1, 2, 2]


def test_nothing_to_draw() -> None:
    with pytest.raises(UsageError, match="every priority is 0"):
        tree_of([0.0, 0.0]).sample(1)


def test_a_seed_repeats_its_draws() -> None:
    value = np.arange(2_000.0)

    assert np.array_equal(tree_of(value, 7).sample(300), tree_of(value, 7).sample(300))
    assert not np.array_equal(tree_of(value, 7).sample(300), tree_of(value, 8).sample(300))
