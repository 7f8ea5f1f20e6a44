"""How fast the machine is just now: a short fixed load on all of its cores at once.

On a shared machine one and the same core does half as much again a minute later: whoever shares its silicon comes and
goes.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from types import TracebackType
from typing import Final, Self

import numpy as np

LOAD_S: Final = 0.25
"""Processor time of each core."""


class Pace:
    """Processes that wait for being asked, one for each core; a context."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self._pool = ProcessPoolExecutor(self._cores, multiprocessing.get_context("spawn"))

    def __enter__(self) -> Self:
        self._did(0.02)  # started, and all imported
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def now(self) -> float:
        """Pieces of the load that a core does in a second of its time, the mean of all."""
        return self._did(LOAD_S)

    def _did(self, seconds: float) -> float:
        return statistics.fmean(self._pool.map(_load, [seconds] * self._cores))


def _load(seconds: float) -> float:
    """Pieces a second, each half numpy, half Python."""
    a, b = np.ones((32, 64), np.float32), np.ones((64, 64), np.float32)
    pieces, began, spent = 0, time.process_time(), 0.0
    while spent < seconds:
        np.tanh(a @ b, out=a)
        sum(range(60))
        pieces, spent = pieces + 1, time.process_time() - began
    return pieces / spent
