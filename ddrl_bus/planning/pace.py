"""How fast the machine is just now: a short fixed load on all of its cores at once.

On a shared machine one and the same core does half as much again a minute later: whoever shares its silicon comes and
goes.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Final

import numpy as np

LOAD_S: Final = 0.25
"""Processor time of each core."""
Pace = Callable[[], float]
"""Measures pieces of the load that a core does in a second of its time, the mean of all."""


@contextmanager
def of_cores() -> Iterator[Pace]:
    """Processes that wait for being asked, one for each core."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:

        def did(seconds: float) -> float:
            return fmean(pool.map(_load, [seconds] * cores))

        did(LOAD_S / 10)  # all are there, and have imported what they need
        yield partial(did, LOAD_S)


def _load(seconds: float) -> float:
    """Pieces a second, each half numpy, half Python."""
    a, b = np.ones((32, 64), np.float32), np.ones((64, 64), np.float32)
    pieces, began, spent = 0, time.process_time(), 0.0
    while spent < seconds:
        np.tanh(a @ b, out=a)
        sum(range(60))
        pieces, spent = pieces + 1, time.process_time() - began
    return pieces / spent
