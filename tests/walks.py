"""Environments for tests: `import walks`, or id `walks:Walk-v0` where the process of a node has to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

WALK = "Walk-v0"


class Walk(gym.Env[NDArray[np.float32], int]):
    """Walks from 0, one a step, whatever the action: obs [position, 10 · position], reward = position.

    Args:
        length: steps of an episode.
        truncates: whether an episode's end is a truncation, else it is a termination.
        fault: what goes wrong: `raise`, `nan` (observation), `reward` (not finite), `reset` (raises).
        at: at which step of an object's life; 0: at every one.
        times: how often, over all objects of the process that share `key`; 0: always.
        once: a file that the first fault of all processes makes; with it, no further ones come.
    """

    faults: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        length: int = 4,
        truncates: bool = True,
        fault: str = "",
        at: int = 0,
        times: int = 0,
        key: str = "",
        once: str = "",
    ) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self._length, self._truncates = length, truncates
        self._fault, self._at, self._times, self._key, self._once = fault, at, times, key, once
        self._position = self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if self._fault == "reset" and self._steps and self._is_due():
            raise RuntimeError("cannot get up")
        self._position = 0
        return self._obs(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        self._position += 1
        faulty = self._fault != "reset" and (not self._at or self._steps == self._at) and self._is_due()
        if faulty and self._fault == "raise":
            raise RuntimeError("fell over")
        ends = self._position == self._length
        obs = self._obs() * (np.nan if faulty and self._fault == "nan" else 1)
        reward = np.inf if faulty and self._fault == "reward" else float(self._position)
        return obs.astype(np.float32), reward, ends and not self._truncates, ends and self._truncates, {}

    def _obs(self) -> NDArray[np.float32]:
        return np.array([self._position, 10 * self._position], np.float32)

    def _is_due(self) -> bool:
        if not self._fault:
            return False
        if self._once:
            try:
                Path(self._once).touch(exist_ok=False)
            except FileExistsError:
                return False
            return True
        had = self.faults[self._key] = self.faults.get(self._key, 0) + 1
        return not self._times or had <= self._times


gym.register(WALK, Walk)
