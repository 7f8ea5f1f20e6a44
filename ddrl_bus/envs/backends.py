"""The normal form, from one object per environment or from a vector class of any autoreset mode.

gymnasium's vector environments end an episode in one of three ways: NEXT_STEP returns the final observation and spends
the next step on a reset, a dummy row that is no transition; SAME_STEP returns the reset observation and hides the final
one in `infos`; DISABLED leaves the reset to the caller. A backend's rows are all transitions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Stepped: TypeAlias = tuple[Array, Array, Array, Array, Array, Array]
"""obs, reward, terminated, truncated: rows as in `Step`; index [K] of those that ended; their final obs [K, ...]."""

_NO_ROWS = np.zeros(0, np.int64)


class Backend(Protocol):
    """N environments in the normal form; the spaces are those of one."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    def reset(self, seeds: list[int] | None) -> Array: ...
    def step(self, action: Array) -> Stepped: ...
    def close(self) -> None: ...


class Raised(Exception):
    """An environment raised; `__cause__` says what."""

    def __init__(self, index: int) -> None:
        self.index = index


class Sync:
    """One object per environment. gymnasium's SyncVectorEnv does the same, collects infos that nobody reads, and cannot
    tell which environment raised."""

    def __init__(self, envs: list[gym.Env[Any, Any]]) -> None:
        self._envs = envs
        self.observation_space, self.action_space = envs[0].observation_space, envs[0].action_space
        space: Any = self.observation_space
        self._like = np.zeros((len(envs), *space.shape), space.dtype)

    def reset(self, seeds: list[int] | None) -> Array:
        obs = np.empty_like(self._like)
        for i, env in enumerate(self._envs):
            try:
                obs[i] = env.reset(seed=None if seeds is None else seeds[i])[0]
            except Exception as error:
                raise Raised(i) from error
        return obs

    def step(self, action: Array) -> Stepped:
        obs, n = np.empty_like(self._like), len(self._envs)
        reward = np.empty(n, np.float64)
        terminated, truncated = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
        ended: list[int] = []
        final: list[Array] = []
        for i, env in enumerate(self._envs):
            try:
                after, reward[i], terminated[i], truncated[i], _ = env.step(action[i])
                if terminated[i] or truncated[i]:
                    ended.append(i)
                    final.append(np.array(after, obs.dtype))
                    after = env.reset()[0]
                obs[i] = after
            except Exception as error:
                raise Raised(i) from error
        finals = np.stack(final) if final else obs[:0]
        return obs, reward, terminated, truncated, np.array(ended, np.int64), finals

    def close(self) -> None:
        for env in self._envs:
            env.close()


class Native:
    """An environment's own vector class, whatever its autoreset mode."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self._env = env
        self._mode = env.metadata.get("autoreset_mode")
        self._reset_rows = _ROW_RESETS.get(type(env.unwrapped))
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    @property
    def obstacle(self) -> str | None:
        """Why it cannot be brought to the normal form."""
        if not isinstance(self.observation_space, gym.spaces.Box):
            return f"its vector class observes {self.observation_space}"
        if self._reset_rows is None and self._mode not in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
            return "its vector class resets on the next step and cannot reset rows alone"
        return None

    def reset(self, seeds: list[int] | None) -> Array:
        obs: Array = self._env.reset(seed=None if seeds is None else seeds[0])[0]
        return np.array(obs)

    def step(self, action: Array) -> Stepped:
        obs, reward, terminated, truncated, infos = self._env.step(action)
        ended = terminated | truncated
        if not np.count_nonzero(ended):
            return obs, reward, terminated, truncated, _NO_ROWS, obs[:0]
        index = np.flatnonzero(ended)
        if self._reset_rows is not None:
            final = obs[index]
            obs[index] = self._reset_rows(self._env.unwrapped, index)
        elif self._mode == AutoresetMode.SAME_STEP:
            final = np.stack([infos["final_obs"][i] for i in index])
        else:
            final = np.array(obs[index])  # the reset may write into the array it gave out
            terminated, truncated = terminated.copy(), truncated.copy()
            obs = self._env.reset(options={"reset_mask": ended})[0]
        return obs, reward, terminated, truncated, index, final

    def close(self) -> None:
        self._env.close()


def _reset_cartpole_rows(env: Any, index: Array) -> Array:
    """New episodes in some rows of gymnasium's CartPoleVectorEnv: what its own step would do one step later."""
    env.state[:, index] = env.np_random.uniform(env.low, env.high, size=(4, len(index)))
    env.steps[index] = 0
    env.prev_done[index] = False
    rows: Array = env.state[:, index].T.astype(np.float32)
    return rows


# NEXT_STEP vector classes have no way to reset single rows; these functions do it in their public attributes and return
# the first observations [K, ...]. Draws come from the environment's own generator and reset distribution.
_ROW_RESETS: dict[type, Callable[[Any, Array], Array]] = {CartPoleVectorEnv: _reset_cartpole_rows}


class Observed:
    """Another backend's observations seen through `view`, a function of rows [N, ...] into `space`."""

    def __init__(self, inner: Backend, space: gym.spaces.Box, view: Callable[[Array], Array]) -> None:
        self._inner, self._view = inner, view
        self.observation_space: gym.Space[Any] = space
        self.action_space = inner.action_space

    def reset(self, seeds: list[int] | None) -> Array:
        return self._view(self._inner.reset(seeds))

    def step(self, action: Array) -> Stepped:
        obs, reward, terminated, truncated, index, final = self._inner.step(action)
        return self._view(obs), reward, terminated, truncated, index, self._view(final)

    def close(self) -> None:
        self._inner.close()
