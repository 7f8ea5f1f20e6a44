"""Draws in proportion to priority: a binary tree whose inner nodes hold the sums of their children. numpy only.

Sums are always those of the two children, never the old sum and a difference: nothing drifts, and the leaves alone are
the tree's state.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.errors import UsageError

_TOP: Final = 1024
"""Nodes of the highest level at most: a draw finds its node there by bisection, and descends from it level by level."""


class SumTree:
    """Non-negative float64 leaves, all zero at first.

    Args:
        leaves: how many there are.
        rng: where draws come from.
    """

    def __init__(self, leaves: int, rng: np.random.Generator) -> None:
        self.leaves = leaves
        self._rng = rng
        self._levels = [np.zeros(_even(leaves))]
        while len(self._levels[-1]) > _TOP:
            self._levels.append(np.zeros(_even(len(self._levels[-1]) // 2)))

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return float(self._levels[-1].sum())

    def values(self, index: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        return self._levels[0][index]

    def set(self, index: NDArray[np.int64], value: NDArray[np.float64]) -> None:
        """Leaf `index[k]` becomes `value[k]`; of an index that is named twice the last counts.  Shapes: [K], [K]."""
        self._levels[0][index] = value
        for below, above in pairwise(self._levels):
            index = index >> 1
            above[index] = below[::2][index] + below[1::2][index]

    def set_range(self, start: int, value: NDArray[np.float64]) -> None:
        """The leaves from `start` on become `value` [K]."""
        stop = start + len(value)
        self._levels[0][start:stop] = value
        for below, above in pairwise(self._levels):
            start, stop = start >> 1, (stop + 1) >> 1
            pairs = below[2 * start : 2 * stop]
            np.add(pairs[::2], pairs[1::2], out=above[start:stop])

    def sample(self, count: int) -> NDArray[np.int64]:
        """[count] leaves in rising order, each drawn in proportion to its value; one of value 0 is never drawn.

        Raises: UsageError if all are 0.
        """
        if not self.total > 0:
            raise UsageError("nothing to draw: every priority is 0")
        drawn = self._descend(count)
        while len(empty := np.flatnonzero(self._levels[0][drawn] == 0)):  # rounding at a right edge
            drawn[empty] = self._descend(len(empty))
            drawn.sort()
        return drawn

    def _descend(self, count: int) -> NDArray[Any]:
        *lower, top = self._levels
        edges = np.concatenate([[0.0], top.cumsum()])
        x = self._rng.random(count)
        x.sort()  # bisection and memory like it
        x *= edges[-1]
        node = edges.searchsorted(x, "right") - 1
        x -= edges[node]
        for level in reversed(lower):
            node <<= 1
            left = level.take(node)
            right = x >= left
            x -= left * right
            node += right
        return node


def _even(n: int) -> int:
    return n + n % 2
