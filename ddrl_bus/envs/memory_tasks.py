"""Two tasks that only a memory can solve, N at once in numpy, in the normal form.

In both the mean return is a rate of success, and the best that an agent without memory can reach is known exactly.
"""

from __future__ import annotations

from typing import Any, Final

import gymnasium as gym
import numpy as np

from ddrl_bus.envs.backends import Array, Stepped


class _Task:
    """Episodes of N environments: `_begin` starts some of them, `_advance` moves all by a step."""

    def __init__(self, n: int, symbols: int, actions: int, max_episode_steps: int) -> None:
        self.observation_space = gym.spaces.Box(0.0, 1.0, (symbols,), np.float32)
        self.action_space = gym.spaces.Discrete(actions)
        self._n, self._limit = n, max_episode_steps
        self._steps = np.zeros(n, np.int64)
        self._rng = np.random.default_rng()

    def reset(self, seeds: list[int] | None) -> Array:
        if seeds is not None:
            self._rng = np.random.default_rng(seeds)
        self._steps[:] = 0
        return self._begin(np.arange(self._n))

    def step(self, action: Array) -> Stepped:
        obs, reward, terminated = self._advance(action)
        self._steps += 1
        truncated = (self._steps >= self._limit) & ~terminated
        index = np.flatnonzero(terminated | truncated)
        final = obs[index]
        if len(index):
            self._steps[index] = 0
            obs[index] = self._begin(index)
        return obs, reward, terminated, truncated, index, final

    def close(self) -> None:
        """Holds nothing."""

    def _begin(self, index: Array) -> Array:
        """Starts new episodes in the rows `index` [K] and returns their first observations [K, symbols]."""
        raise NotImplementedError

    def _advance(self, action: Array) -> tuple[Array, Array, Array]:
        """obs [N, symbols], reward [N] and terminated [N] after `action` [N]; `_steps` counts those before it."""
        raise NotImplementedError


class TMaze(_Task):
    """A corridor with a junction at its end; the first observation alone says which way to turn there.

    Bakker, "Reinforcement learning with long short-term memory", NIPS 2001: actions north, east, south, west; the
    observation is 011 or 110 (turn north, turn south) at first, 101 in the corridor, 010 at the junction. Reward 1 for
    the right turn and 0 else (Bakker: 4, -0.1), so that the mean return is the rate of success; without a memory it is
    at most 1/2. Walking into a wall costs a step.

    Args:
        length: steps from the start to the junction.
        max_episode_steps: truncates those who never turn; 10 · (length + 1) unless told.
    """

    NORTH, EAST, SOUTH, WEST = range(4)
    CUES: Final = np.array([[0, 1, 1], [1, 1, 0]], np.float32)
    CORRIDOR: Final = np.array([1, 0, 1], np.float32)
    JUNCTION: Final = np.array([0, 1, 0], np.float32)

    def __init__(self, n: int, *, length: int = 10, max_episode_steps: int | None = None) -> None:
        if length < 1:
            raise ValueError(f"length {length}, expected at least 1")
        super().__init__(n, 3, 4, max_episode_steps or 10 * (length + 1))
        self._length = length
        self._place = np.zeros(n, np.int64)
        self._south = np.zeros(n, np.int64)

    def _begin(self, index: Array) -> Array:
        self._place[index] = 0
        south = self._south[index] = self._rng.integers(0, 2, len(index))
        return self.CUES[south]

    def _advance(self, action: Array) -> tuple[Array, Array, Array]:
        turned = (self._place == self._length) & ((action == self.NORTH) | (action == self.SOUTH))
        right = action == np.where(self._south, self.SOUTH, self.NORTH)
        moved = self._place + (action == self.EAST) - (action == self.WEST)
        np.clip(moved, 0, self._length, out=self._place)
        obs = np.where((self._place == self._length)[:, None], self.JUNCTION, self.CORRIDOR)
        return obs, (turned & right).astype(np.float32), turned


class RepeatPrevious(_Task):
    """Symbols come one by one, uniformly at random; the action is to name the one that was shown `k` steps before.

    After POPGym's task of that name (Morad et al., ICLR 2023). An episode asks `length - k` times, and each right
    answer is worth 1 / (length - k), so that the return is the accuracy; without a memory it is 1 / symbols at most.

    Args:
        k: how long to remember, in steps.
        symbols: how many there are; observations are one-hot.
        length: steps of an episode.
    """

    def __init__(
        self, n: int, *, k: int = 4, symbols: int = 4, length: int = 64, max_episode_steps: int | None = None
    ) -> None:
        if not 1 <= k < length or symbols < 2:
            raise ValueError(f"k {k}, symbols {symbols}, length {length}: expected 1 ≤ k < length and symbols ≥ 2")
        super().__init__(n, symbols, symbols, max_episode_steps or length)
        self._k, self._length = k, length
        self._hot = np.eye(symbols, dtype=np.float32)
        self._shown = np.zeros((n, length + 1), np.int64)
        self._rows = np.arange(n)

    def _begin(self, index: Array) -> Array:
        self._shown[index] = self._rng.integers(0, len(self._hot), (len(index), self._length + 1))
        first: Array = self._hot[self._shown[index, 0]]
        return first

    def _advance(self, action: Array) -> tuple[Array, Array, Array]:
        asked = self._steps >= self._k
        right = action == self._shown[self._rows, self._steps - self._k]
        obs = self._hot[self._shown[self._rows, self._steps + 1]]
        reward: Array = (asked & right) / np.float32(self._length - self._k)
        return obs, reward, self._steps + 1 == self._length


TASKS: Final[dict[str, Any]] = {"ddrl_bus/TMaze-v0": TMaze, "ddrl_bus/RepeatPrevious-v0": RepeatPrevious}
