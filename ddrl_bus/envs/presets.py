"""Named ways to make the environments of one family ready for learning: `env.preset`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec

from ddrl_bus.envs import atari
from ddrl_bus.envs.backends import Array, Backend, Native, Observed
from ddrl_bus.errors import EnvError

Env: TypeAlias = gym.Env[Any, Any]


class Flat(gym.ObservationWrapper[Any, Any, Any]):
    """The one rule for observations that are no Box: gymnasium's `flatten`, in float32."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        space = gym.spaces.flatten_space(env.observation_space)
        if not isinstance(space, gym.spaces.Box):
            raise NotImplementedError
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, space.shape, np.float32)

    def observation(self, observation: Any) -> Array:
        return np.asarray(gym.spaces.flatten(self.env.observation_space, observation), np.float32)


def _made(spec: EnvSpec, **kwargs: Any) -> Env:
    # We step in order and in range: gymnasium's wrappers that watch over it take a fifth of a fast environment's time.
    return gym.make(replace(spec, order_enforce=False), disable_env_checker=True, **kwargs)


def make_one(spec: EnvSpec, **kwargs: Any) -> Env:
    """One environment that observes a Box."""
    env = _made(spec, **kwargs)
    if isinstance(env.observation_space, gym.spaces.Box):
        return env
    try:
        return Flat(env)
    except NotImplementedError:
        raise EnvError(f"observation space {env.observation_space} does not flatten to a vector") from None


def make_many(spec: EnvSpec, n: int, **kwargs: Any) -> Backend:
    """The environment's own vector class. Raises: EnvError if it cannot be brought to the normal form."""
    native = Native(gym.make_vec(spec, num_envs=n, vectorization_mode="vector_entry_point", **kwargs))
    if native.obstacle is not None:
        native.close()
        raise EnvError(native.obstacle)
    return native


@dataclass(frozen=True)
class Preset:
    """How the environments of one family are made, and how their observations are seen."""

    family: str
    """what it is for, in words"""
    fits: Callable[[EnvSpec], bool]
    one: Callable[..., Env] = make_one
    """(spec, **kwargs) → one environment"""
    many: Callable[..., Backend] = make_many
    """(spec, n, **kwargs) → a vector class in the normal form"""
    view: Callable[[EnvSpec, Backend], Backend] = lambda _, backend: backend
    stack: int = 1
    """observations that the agent sees at once"""
    max_episode_steps: int | None = None
    """truncates episodes after so many steps unless the configuration says otherwise"""


def _bits(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(0, 1, shape, np.bool_)  # type: ignore[arg-type]


# ---- MinAtar


def _channels_first(_: EnvSpec, backend: Backend) -> Backend:
    """[10, 10, C] → [C, 10, 10] bool."""
    space: Any = backend.observation_space
    height, width, channels = space.shape
    return Observed(backend, _bits(channels, height, width), lambda obs: np.ascontiguousarray(np.moveaxis(obs, -1, 1)))


# ---- MiniGrid

_KINDS: Final = 11, 6, 3
"""How many objects, colours and states a cell may show (minigrid/core/constants.py)."""
_DIRECTIONS: Final = 4


class _Partial(gym.ObservationWrapper[Any, Any, Any]):
    """The agent's view and direction [H·W·3 + 1] uint8; the mission is left out: within most tasks it never changes."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        cells = int(np.prod(env.observation_space["image"].shape))  # type: ignore[index]
        self.observation_space = gym.spaces.Box(0, 255, (cells + 1,), np.uint8)

    def observation(self, observation: Any) -> Array:
        return np.append(observation["image"], np.uint8(observation["direction"]))


def _make_minigrid(spec: EnvSpec, **kwargs: Any) -> Env:
    return _Partial(_made(spec, **kwargs))


def _one_hot(_: EnvSpec, backend: Backend) -> Backend:
    """Object, colour and state of each cell and the direction, each one-hot: [H·W·20 + 4] bool."""
    space: Any = backend.observation_space
    cells = space.shape[0] // len(_KINDS)
    sizes = np.array([*_KINDS * cells, _DIRECTIONS])
    starts = np.cumsum(sizes) - sizes
    width = int(sizes.sum())

    def view(obs: Array) -> Array:
        hot = np.zeros((len(obs), width), np.bool_)
        np.put_along_axis(hot, starts + obs, True, axis=1)
        return hot

    return Observed(backend, _bits(width), view)


# ---- velocities hidden

POSITIONS: Final = {
    "CartPole-v0": (0, 2),
    "CartPole-v1": (0, 2),
    "Pendulum-v1": (0, 1),
    "Acrobot-v1": (0, 1, 2, 3),
    "MountainCar-v0": (0,),
    "MountainCarContinuous-v0": (0,),
}
"""Components of the observation that are no velocities."""


def _positions(spec: EnvSpec, backend: Backend) -> Backend:
    space: Any = backend.observation_space
    kept = list(POSITIONS[spec.id])
    return Observed(backend, gym.spaces.Box(space.low[kept], space.high[kept]), lambda obs: obs[:, kept])


# ---- by name

PLAIN: Final = Preset("any environment", lambda _: True)
PRESETS: Final = {
    "atari": Preset(
        "ALE/… environments",
        lambda spec: spec.entry_point == "ale_py.env:AtariEnv",
        one=atari.one,
        many=atari.Vector,
        stack=4,
        max_episode_steps=27_000,  # 30 minutes
    ),
    "minatar": Preset(
        "MinAtar/… environments",
        lambda spec: spec.namespace == "MinAtar",
        view=_channels_first,
        max_episode_steps=5_000,  # all but Freeway go on for ever
    ),
    "minigrid": Preset(
        "MiniGrid-… and BabyAI-… environments",
        lambda spec: spec.id.startswith(("MiniGrid-", "BabyAI-")),
        one=_make_minigrid,
        view=_one_hot,
    ),
    "no_velocity": Preset(", ".join(POSITIONS), lambda spec: spec.id in POSITIONS, view=_positions),
}


def find(name: str | None) -> Preset:
    """The preset of that name, or none at all.

    Raises: EnvError naming the nearest and all.
    """
    if name is None:
        return PLAIN
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise EnvError(f"no preset named {name!r}; {hint}have {', '.join(PRESETS)}")
    return PRESETS[name]
