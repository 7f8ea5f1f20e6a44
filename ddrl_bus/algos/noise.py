"""Random numbers for acting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Noise:
    """Random numbers for acting, drawn in blocks: a small draw costs more for the call than for the numbers."""

    _BLOCK = 1 << 14

    def __init__(self, seed: int | np.random.SeedSequence) -> None:
        self._rng = np.random.default_rng(seed)
        self._gumbel = np.empty(0, np.float32)
        self._next = 0

    def normal(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard normal numbers, float32."""
        return self._rng.standard_normal(shape, dtype=np.float32)

    def uniform(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Numbers from 0 to below 1."""
        return self._rng.random(shape)

    def gumbel(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Standard Gumbel numbers, -log E with E ~ Exp(1), float32; read-only by convention."""
        size = 1
        for length in shape:
            size *= length
        start, self._next = self._next, self._next + size
        if self._next > len(self._gumbel):
            exponential = self._rng.standard_exponential(max(self._BLOCK, size), dtype=np.float32)
            np.maximum(exponential, np.finfo(np.float32).tiny, out=exponential)  # 0 comes once in 2^32
            self._gumbel = np.negative(np.log(exponential, out=exponential), out=exponential)
            start, self._next = 0, size
        return self._gumbel[start : self._next].reshape(shape)
