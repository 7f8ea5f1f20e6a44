"""N environments stepped together, in one normal form whatever makes them: `Step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.envs.backends import Array, Raised
from ddrl_bus.envs.config import EnvConfig
from ddrl_bus.envs.making import make
from ddrl_bus.errors import EnvError


class Step(NamedTuple):
    """What one step of N environments led to. The arrays are valid until the next step."""

    obs: Array
    """[N, ...] next observations; the first of the new episode where one ended"""
    reward: NDArray[np.float32]
    """[N]"""
    terminated: NDArray[np.bool_]
    """[N]"""
    truncated: NDArray[np.bool_]
    """[N]"""
    final_index: NDArray[np.int64]
    """[K] environments whose episode ended"""
    final_obs: Array
    """[K, ...] the true final observation of each"""
    episodes: Sequence[tuple[float, int]]
    """K pairs (return, length): undiscounted, unclipped, counted here"""


class VectorEnv:
    """N environments stepped together, in the normal form of `Step`.

    Seeds: everything random follows from `seed_sequence`, SeedSequence([run seed, role, index, restart]) by convention.
    Raises: EnvError, naming the id, the environment's index and the step, if an environment cannot be made, raises, or
    returns an observation or reward that is not finite.
    """

    def __init__(self, config: EnvConfig, n: int, seed_sequence: np.random.SeedSequence) -> None:
        if n < 1:
            raise EnvError(f"{config.id}: {n} environments asked for, expected at least 1")
        self.id, self.n = config.id, n
        self._vector, stack = make(config, n)
        self.spaces = _spaces(config.id, self._vector.observation_space, self._vector.action_space, stack)
        self._seeds: list[int] | None = [int(seed) for seed in seed_sequence.generate_state(n)]
        self._taken = _taken(self._vector.action_space)
        self._dtype = np.dtype(self.spaces.obs_dtype)
        self._checked = self._dtype.kind == "f"
        self._steps = 0
        self._returns = np.zeros(n, np.float64)
        self._lengths = np.zeros(n, np.int64)
        self._none = (np.zeros(0, np.int64), np.zeros((0, *self.spaces.obs_shape), self._dtype))

    def reset(self) -> Array:
        """First observations [N, ...] of new episodes everywhere. Only the first call seeds."""
        seeds, self._seeds = self._seeds, None
        try:
            obs = self._vector.reset(seeds)
        except Exception as error:
            raise self._failed("reset", error) from error
        self._returns[:] = 0
        self._lengths[:] = 0
        return self._finite(obs)

    def step(self, action: Array) -> Step:
        """Shapes: action [N] int64 counted from 0, or [N, D] float32, which is clipped to the action space's bounds."""
        self._steps += 1
        try:
            obs, reward, terminated, truncated, index, final = self._vector.step(self._taken(action))
        except Exception as error:
            raise self._failed(f"step {self._steps}", error) from error
        self._returns += reward
        self._lengths += 1
        obs, reward = self._finite(obs), reward.astype(np.float32, copy=False)
        if not len(index):
            return Step(obs, self._real(reward), terminated, truncated, *self._none, ())
        episodes = list(zip(self._returns[index].tolist(), self._lengths[index].tolist(), strict=True))
        self._real(reward)
        self._returns[index] = 0
        self._lengths[index] = 0
        return Step(obs, reward, terminated, truncated, index, self._finite(final, index), episodes)

    def close(self) -> None:
        self._vector.close()

    def _finite(self, obs: Array, index: Array | None = None) -> Array:
        if not self._checked:
            return obs
        obs = obs.astype(self._dtype, copy=False)
        if not np.isfinite(obs).all():
            row = int(np.nonzero(~np.isfinite(obs.reshape(len(obs), -1)).all(axis=1))[0][0])
            env = row if index is None else int(index[row])
            raise EnvError(f"{self.id}: environment {env}, step {self._steps}: observation {obs[row]} is not finite")
        return obs

    def _real(self, reward: NDArray[np.float32]) -> NDArray[np.float32]:
        if not np.isfinite(reward).all():
            env = int(np.nonzero(~np.isfinite(reward))[0][0])
            raise EnvError(f"{self.id}: environment {env}, step {self._steps}: reward {reward[env]} is not finite")
        return reward

    def _failed(self, when: str, error: Exception) -> EnvError:
        where = f"environment {error.index}, {when}" if isinstance(error, Raised) else when
        cause = error.__cause__ if isinstance(error, Raised) and error.__cause__ else error
        return EnvError(f"{self.id}: {where}: {type(cause).__name__}: {cause}")


def describe(config: EnvConfig) -> Spaces:
    """The spaces of the environment: makes one and closes it.

    Raises: EnvError with the nearest id if there is none of that name, the extra to install if a package is missing,
    and the reason if it cannot be made or its spaces are not supported.
    """
    env = VectorEnv(config, 1, np.random.SeedSequence(0))
    env.close()
    return env.spaces


def _taken(space: gym.Space[Any]) -> Callable[[Array], Array]:
    """From the actions that agents choose to those that the environment takes."""
    if isinstance(space, gym.spaces.Box):
        low, high = space.low, space.high
        return lambda action: np.clip(action, low, high)
    start = getattr(space, "start", 0)  # Discrete(n, start=k) counts from k, we from 0
    return (lambda action: action + start) if start else (lambda action: action)


def _spaces(id: str, obs: gym.Space[Any], action: gym.Space[Any], stack: int) -> Spaces:
    if not isinstance(obs, gym.spaces.Box):
        raise EnvError(f"{id}: observation space {obs} is not supported, expected a Box")
    dtype = "float32" if obs.dtype == np.float64 else str(obs.dtype)
    if isinstance(action, gym.spaces.Discrete):
        return Spaces(obs.shape, dtype, "discrete", int(action.n), stack=stack)
    if isinstance(action, gym.spaces.Box) and len(action.shape) == 1:
        low, high = tuple(map(float, action.low)), tuple(map(float, action.high))
        return Spaces(obs.shape, dtype, "continuous", action.shape[0], low, high, stack)
    raise EnvError(f"{id}: action space {action} is not supported, expected Discrete or a flat Box")
