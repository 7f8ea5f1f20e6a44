"""How many work side by side, found while they work: GA3C's dynamic adjustment of predictors and trainers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal

TUNE_S: Final = 5.0
"""How long a number is watched."""
BETTER: Final = 1.05
"""By this factor one more or one fewer has to be faster: rates of equal numbers differ by some per cent too."""
LONGEST_REST: Final = 8
"""Measurements between two trials where none helps."""


def most(number: int | Literal["auto"]) -> int:
    """How many there may come to be."""
    return (os.cpu_count() or 1) if number == "auto" else number


async def tuned(most: int, done: Callable[[], int]) -> AsyncIterator[int]:
    """The number to use from now on, each time it has been watched; it begins with 1.

    Args:
        most: the highest number there may be.
        done: counts what has been done so far.
    """
    climb = HillClimb(most)
    while True:
        before = done()
        await asyncio.sleep(TUNE_S)
        yield climb.measured((done() - before) / TUNE_S)


class HillClimb:
    """Finds the number that makes the highest rate: tries one more or one fewer, and keeps what is faster.

    It measures anew before each trial, so that rates from other times of a run are not compared. Trials cost: after
    each that did not help it rests, twice as long as before.

    Args:
        most: the highest number there may be; the lowest is 1.
    """

    def __init__(self, most: int) -> None:
        self.number = 1
        """To be used now."""
        self._most, self._step = most, 1
        self._kept: tuple[int, float] | None = None
        self._rest, self._next_rest = 0, 1

    def measured(self, rate: float) -> int:
        """The number to use next, now that `number` has made this rate."""
        if self._kept is not None:
            kept, was = self._kept
            self._kept = None
            if rate < was * BETTER:
                self._step = -self._step
                self.number = kept
                self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, LONGEST_REST)
                return self.number
            self._next_rest = 1
        if self._rest:
            self._rest -= 1
            return self.number
        if not 1 <= self.number + self._step <= self._most:
            self._step = -self._step
        if 1 <= self.number + self._step <= self._most:
            self._kept = self.number, rate
            self.number += self._step
        return self.number
