"""Losses that stand out from those before."""

from __future__ import annotations

import math
from typing import Final

RATE: Final = 0.01
"""Weight of the newest loss in the running mean and variance."""
FIRST: Final = 20
"""Losses before any is judged."""
IN_A_ROW: Final = 5
"""Outliers after which the next loss is none, whatever it is: what stays large is the new scale."""


class Outliers:
    """Judges absolute losses by the running mean and standard deviation of those that were none (Nair et al. 2015,
    Gorila, arXiv 1507.04296; the running average is exponential here).

    Args:
        limit: standard deviations above the mean; may be infinite.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._mean = self._variance = 0.0
        self._seen = self._in_a_row = 0

    def stands_out(self, loss: float) -> bool:
        """Whether this one does. One that is not finite is for others to refuse."""
        if not math.isfinite(loss):
            return False
        above = abs(loss) - self._mean
        if self._seen >= FIRST and self._in_a_row < IN_A_ROW and above > self._limit * math.sqrt(self._variance):
            self._in_a_row += 1
            return True
        self._in_a_row = 0
        self._seen += 1
        rate = max(RATE, 1 / self._seen)
        self._mean += rate * above
        self._variance = (1 - rate) * (self._variance + rate * above**2)
        return False
