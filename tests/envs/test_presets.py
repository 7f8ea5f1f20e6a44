"""Presets by name, and what each makes of its family's observations."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from ddrl_bus.algos import Spaces
from ddrl_bus.envs import EnvConfig, VectorEnv, describe
from ddrl_bus.envs.backends import Native
from ddrl_bus.envs.presets import POSITIONS
from ddrl_bus.errors import EnvError


def make(config: EnvConfig, n: int = 4) -> VectorEnv:
    return VectorEnv(config, n, np.random.SeedSequence([3]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EnvConfig("CartPole-v1", preset="atarri"), "no preset named 'atarri'; did you mean 'atari'?.*no_velocity"),
        (EnvConfig("CartPole-v1", preset="x"), "CartPole-v1: no preset named 'x'; have atari, minatar, minigrid, no_v"),
        (EnvConfig("CartPole-v1", preset="atari"), "CartPole-v1: preset 'atari' is for ALE/.*'no_velocity' fits it"),
        (EnvConfig("MinAtar/Breakout-v1", preset="atari"), "'atari' is for ALE/… environments; preset 'minatar' fits"),
        (EnvConfig("FrozenLake-v1", preset="no_velocity"), "preset 'no_velocity' is for CartPole-v0, .*Acrobot"),
        (EnvConfig("MiniGrid-Empty-5x5-v0"), "does not flatten to a vector; preset 'minigrid' fits it"),
        (EnvConfig("MinAtar/Breakout-v1", {"x": 1}, preset="minatar"), "cannot be made: .*'x'"),
        (EnvConfig("MinAtar/Breakout-v1", vectorization="native", preset="minatar"), "'native' is not possible"),
    ],
)
def test_what_is_refused(config: EnvConfig, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        describe(config)


# ---- MinAtar


@pytest.mark.parametrize(("game", "channels", "actions"), [("Breakout", 4, 3), ("SpaceInvaders", 6, 4)])
def test_minatar_has_channels_first(game: str, channels: int, actions: int) -> None:
    plain = make(EnvConfig(f"MinAtar/{game}-v1"))
    env = make(EnvConfig(f"MinAtar/{game}-v1", preset="minatar"))
    assert env.spaces == Spaces((channels, 10, 10), "bool", "discrete", actions)
    np.testing.assert_array_equal(env.reset(), plain.reset().transpose(0, 3, 1, 2))
    rng, ended = np.random.default_rng(0), 0
    for _ in range(200):
        action = rng.integers(0, actions, 4)
        ours, theirs = env.step(action), plain.step(action)
        np.testing.assert_array_equal(ours.obs, theirs.obs.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(ours.final_obs, theirs.final_obs.transpose(0, 3, 1, 2))
        assert list(ours.episodes) == list(theirs.episodes)
        assert ours.obs.flags.c_contiguous
        ended += len(ours.episodes)
    assert ended > 0


def test_minatar_episodes_are_cut_though_the_game_goes_on() -> None:
    env = make(EnvConfig("MinAtar/Asterix-v1", preset="minatar", max_episode_steps=2))
    env.reset()
    env.step(np.zeros(4, np.int64))
    assert env.step(np.zeros(4, np.int64)).truncated.all()


def test_minatar_comes_without_plots_and_says_nothing() -> None:
    code = (
        "import logging, sys; from ddrl_bus.envs import EnvConfig, describe\n"
        "describe(EnvConfig('MinAtar/Breakout-v1', preset='minatar'))\n"
        "assert not {'matplotlib', 'seaborn'} & sys.modules.keys(), 'plots'\n"
        "assert not logging.root.handlers and not logging.root.filters, 'logging'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert not logging.root.filters


# ---- MiniGrid


def test_minigrid_is_one_hot() -> None:
    from gymnasium import make as gym_make

    env = make(EnvConfig("MiniGrid-DoorKey-5x5-v0", preset="minigrid"), 1)
    single = gym_make("MiniGrid-DoorKey-5x5-v0", disable_env_checker=True)
    assert env.spaces == Spaces((7 * 7 * 20 + 4,), "bool", "discrete", 7)
    obs, seed = env.reset()[0], int(np.random.SeedSequence([3]).generate_state(1)[0])
    theirs: Any = single.reset(seed=seed)[0]
    for action in [0, 2, 1, 3, 2, 5, 2]:
        np.testing.assert_array_equal(obs, encoded(theirs))
        obs, theirs = env.step(np.array([action])).obs[0], single.step(action)[0]


def encoded(obs: dict[str, Any]) -> np.ndarray:
    """The slow twin: cell by cell."""
    bits: list[bool] = []
    for thing, colour, state in obs["image"].reshape(-1, 3):
        for value, size in ((thing, 11), (colour, 6), (state, 3)):
            bits += [value == i for i in range(size)]
    return np.array(bits + [obs["direction"] == i for i in range(4)])


# ---- velocities hidden


@pytest.mark.parametrize("id", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0"])
def test_no_velocity_shows_the_other_components_of_the_same_episode(id: str) -> None:
    plain, env = make(EnvConfig(id, max_episode_steps=30)), make(EnvConfig(id, {}, "auto", "no_velocity", 30))
    kept = list(POSITIONS[id])
    assert env.spaces.obs_shape == (len(kept),)
    np.testing.assert_array_equal(env.reset(), plain.reset()[:, kept])
    discrete, rng = env.spaces.action_kind == "discrete", np.random.default_rng(0)
    for _ in range(40):
        action = rng.integers(0, env.spaces.num_actions, 4) if discrete else rng.normal(size=(4, 1)).astype("f4")
        ours, theirs = env.step(action), plain.step(action)
        np.testing.assert_array_equal(ours.obs, theirs.obs[:, kept])
        np.testing.assert_array_equal(ours.final_obs, theirs.final_obs[:, kept])
        np.testing.assert_array_equal(ours.reward, theirs.reward)


def test_no_velocity_keeps_the_native_path() -> None:
    vector: Any = make(EnvConfig("CartPole-v1", preset="no_velocity"))._vector
    assert isinstance(vector._inner, Native)


# ---- families without a preset


@pytest.mark.parametrize(
    ("id", "spaces"),
    [
        ("LunarLander-v3", Spaces((8,), "float32", "discrete", 4)),
        ("BipedalWalker-v3", Spaces((24,), "float32", "continuous", 4, (-1.0,) * 4, (1.0,) * 4)),
    ],
)
def test_box2d_needs_no_preset(id: str, spaces: Spaces) -> None:
    env = make(EnvConfig(id))
    assert env.spaces == spaces
    env.reset()
    action = np.zeros(4, np.int64) if spaces.action_kind == "discrete" else np.full((4, 4), 9, np.float32)
    assert np.isfinite(env.step(action).obs).all()
