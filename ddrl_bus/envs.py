"""Vector environments in one normal form; the only module that knows gymnasium's autoreset modes.

gymnasium's vector environments end an episode in one of three ways: NEXT_STEP returns the final observation and spends
the next step on a reset, a dummy row that is no transition; SAME_STEP returns the reset observation and hides the final
one in `infos`; DISABLED leaves the reset to the caller. Here every row is a transition: `Step.obs` holds the first
observation of the next episode where one ended, and the true final observation is in `Step.final_obs`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import EnvError

Array = NDArray[Any]

# Prefix of an id (or part of its entry point) -> the extra of this package that brings it.
EXTRAS = {"ALE/": "atari", "MinAtar/": "minatar", "box2d": "box2d", "mujoco": "mujoco"}
# Namespaces that gymnasium learns of only when their package is imported, and what to call there.
NAMESPACES: dict[str, tuple[str, Callable[[Any], object]]] = {
    "ALE/": ("ale_py", gym.register_envs),
    "MinAtar/": ("minatar.gym", lambda module: module.register_envs()),
}


@dataclass(frozen=True)
class EnvConfig:
    """Which environment, and how to make many of it."""

    id: str
    """gymnasium id, `CartPole-v1`, or `module:Id-v0` to import a module that registers it"""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """arguments of the environment's constructor"""
    vectorization: Literal["auto", "native", "sync"] = "auto"
    """native: the environment's own vector class; sync: one object per environment; auto: native where it can be
    brought to the normal form, else sync"""
    preset: str | None = None
    """a named stack of wrappers (none exist yet)"""
    max_episode_steps: int | None = None
    """truncates episodes after so many steps instead of the registered limit"""


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
    """N environments stepped together, in the normal form described above.

    Seeds: everything random follows from `seed_sequence`, SeedSequence([run seed, role, index, restart]) by convention.
    Raises: EnvError, naming the id, the environment's index and the step, if an environment cannot be made, raises, or
    returns an observation or reward that is not finite.
    """

    def __init__(self, config: EnvConfig, n: int, seed_sequence: np.random.SeedSequence) -> None:
        if n < 1:
            raise EnvError(f"{config.id}: {n} environments asked for, expected at least 1")
        self.id, self.n = config.id, n
        self._vector = _make(config, n)
        self.spaces = _spaces(config.id, self._vector.observation_space, self._vector.action_space)
        self._seeds: list[int] | None = [int(seed) for seed in seed_sequence.generate_state(n)]
        self._offset = getattr(self._vector.action_space, "start", 0)  # Discrete(n, start=k) counts from k, we from 0
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
        """Shapes: action [N] int64 counted from 0, or [N, D] float32."""
        self._steps += 1
        try:
            obs, reward, terminated, truncated, index, final = self._vector.step(
                action + self._offset if self._offset else action
            )
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
        where = f"environment {error.index}, {when}" if isinstance(error, _Raised) else when
        cause = error.__cause__ if isinstance(error, _Raised) and error.__cause__ else error
        return EnvError(f"{self.id}: {where}: {type(cause).__name__}: {cause}")


def describe(config: EnvConfig) -> Spaces:
    """The spaces of the environment: makes one and closes it.

    Raises: EnvError with the nearest id if there is none of that name, the extra to install if a package is missing,
    and the reason if it cannot be made or its spaces are not supported.
    """
    env = VectorEnv(config, 1, np.random.SeedSequence(0))
    env.close()
    return env.spaces


# ---- backends: (obs, reward, terminated, truncated, ended index, their final obs)

_Stepped = tuple[Array, Array, Array, Array, Array, Array]


class _Backend(Protocol):
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    def reset(self, seeds: list[int] | None) -> Array: ...
    def step(self, action: Array) -> _Stepped: ...
    def close(self) -> None: ...


class _Raised(Exception):
    """An environment raised; `__cause__` says what."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Sync:
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
                raise _Raised(i) from error
        return obs

    def step(self, action: Array) -> _Stepped:
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
                raise _Raised(i) from error
        finals = np.stack(final) if final else obs[:0]
        return obs, reward, terminated, truncated, np.array(ended, np.int64), finals

    def close(self) -> None:
        for env in self._envs:
            env.close()


class _Native:
    """An environment's own vector class, whatever its autoreset mode."""

    def __init__(self, env: gym.vector.VectorEnv[Any, Any, Any]) -> None:
        self._env = env
        self._mode = env.metadata.get("autoreset_mode")
        self._reset_rows = _ROW_RESETS.get(type(env.unwrapped))
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space

    @property
    def has_normal_form(self) -> bool:
        return self._reset_rows is not None or self._mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)

    def reset(self, seeds: list[int] | None) -> Array:
        obs: Array = self._env.reset(seed=None if seeds is None else seeds[0])[0]
        return np.array(obs)

    def step(self, action: Array) -> _Stepped:
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


_NO_ROWS = np.zeros(0, np.int64)


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


# ---- making


def _make(config: EnvConfig, n: int) -> _Backend:
    if config.preset is not None:
        raise EnvError(f"{config.id}: no preset named {config.preset!r}; there are none yet")
    spec = _find(config.id)
    kwargs = dict(config.kwargs)
    if config.max_episode_steps is not None:
        kwargs["max_episode_steps"] = config.max_episode_steps
    if config.vectorization != "sync":
        try:
            native = _Native(gym.make_vec(spec, num_envs=n, vectorization_mode="vector_entry_point", **kwargs))
            if native.has_normal_form:
                return native
            native.close()
            reason = "its vector class resets on the next step and cannot reset rows alone"
        except Exception as error:
            reason = str(error)
        if config.vectorization == "native":
            raise EnvError(f"{config.id}: vectorization 'native' is not possible: {reason}; use 'auto' or 'sync'")
    try:
        return _Sync([gym.make(spec, disable_env_checker=True, **kwargs) for _ in range(n)])
    except Exception as error:
        raise EnvError(f"{config.id}: cannot be made: {error}{_install(spec)}") from error


def _find(id: str) -> gym.envs.registration.EnvSpec:
    for prefix, (module, register) in NAMESPACES.items():
        if id.startswith(prefix) and id not in gym.registry:
            try:
                register(importlib.import_module(module))
            except ImportError as error:
                raise EnvError(f"{id}: {error}; pip install 'ddrl-bus[{EXTRAS[prefix]}]'") from error
    module, _, name = id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module of somebody else's does
            raise EnvError(f"{id}: no such environment; cannot import {module!r}: {error}") from error
    try:
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        near = difflib.get_close_matches(id, gym.registry, n=1)
        hint = f"did you mean {near[0]!r}?" if near else str(error)
        raise EnvError(f"{id}: no such environment; {hint}") from error


def _install(spec: gym.envs.registration.EnvSpec) -> str:
    entry = str(spec.entry_point)
    extras = [extra for part, extra in EXTRAS.items() if spec.id.startswith(part) or f".{part}" in entry]
    return f"; pip install 'ddrl-bus[{extras[0]}]'" if extras else ""


def _spaces(id: str, obs: gym.Space[Any], action: gym.Space[Any]) -> Spaces:
    if not isinstance(obs, gym.spaces.Box):
        raise EnvError(f"{id}: observation space {obs} is not supported, expected a Box")
    dtype = "float32" if obs.dtype == np.float64 else str(obs.dtype)
    if isinstance(action, gym.spaces.Discrete):
        return Spaces(obs.shape, dtype, "discrete", int(action.n))
    if isinstance(action, gym.spaces.Box) and len(action.shape) == 1:
        low, high = tuple(map(float, action.low)), tuple(map(float, action.high))
        return Spaces(obs.shape, dtype, "continuous", action.shape[0], low, high)
    raise EnvError(f"{id}: action space {action} is not supported, expected Discrete or a flat Box")
