"""Both ways of making Atari environments are one decision process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddrl_bus.algos import Spaces
from ddrl_bus.envs import EnvConfig, VectorEnv, describe
from ddrl_bus.envs.atari import Vector
from ddrl_bus.envs.backends import Sync
from ddrl_bus.errors import EnvError


def make(how: Any, game: str, n: int = 2, limit: int | None = None, **kwargs: Any) -> VectorEnv:
    config = EnvConfig(f"ALE/{game}-v5", kwargs, how, "atari", limit)
    return VectorEnv(config, n, np.random.SeedSequence([7]))


def test_single_frames_of_84_by_84_to_be_stacked_by_four() -> None:
    assert describe(EnvConfig("ALE/Pong-v5", preset="atari")) == Spaces((84, 84), "uint8", "discrete", 6, stack=4)
    every = EnvConfig("ALE/Pong-v5", {"full_action_space": True}, preset="atari")
    assert describe(every).num_actions == 18
    assert isinstance(make("auto", "Pong")._vector, Vector)
    assert isinstance(make("sync", "Pong")._vector, Sync)


@pytest.mark.parametrize(
    ("game", "limit", "options"),
    [
        ("Pong", None, {}),
        ("Breakout", None, {"episodic_life": True}),
        ("SpaceInvaders", 70, {"fire_reset": False, "frameskip": 3}),
    ],
)
def test_frames_rewards_and_ends_are_the_same_step_by_step(game: str, limit: int | None, options: Any) -> None:
    native, sync = (make(how, game, limit=limit, noop_max=0, **options) for how in ("native", "sync"))
    alike(native.reset(), sync.reset())
    rng = np.random.default_rng(0)
    rewards, ended = 0.0, 0
    for _ in range(200):
        action = rng.integers(0, native.spaces.num_actions, 2)
        ours, theirs = native.step(action), sync.step(action)
        alike(ours.obs, theirs.obs)
        died = ours.terminated[ours.final_index]  # of those cut by the limit the vector class misses the last screen
        alike(ours.final_obs[died], theirs.final_obs[died])
        for name in ("reward", "terminated", "truncated", "final_index"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert list(ours.episodes) == list(theirs.episodes)
        rewards += np.abs(ours.reward).sum()
        ended += len(ours.episodes)
    assert rewards > 0
    assert ended > 0 or game == "Pong"


def alike(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal where both resize with the same OpenCV; another build may round the other way."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max(initial=0) <= 1


def test_episodes_start_after_the_same_random_frames() -> None:
    def starts(how: Any) -> set[bytes]:
        env = make(how, "SpaceInvaders", 6, limit=1, noop_max=4)
        env.reset()
        return {obs.tobytes() for _ in range(4) for obs in env.step(np.zeros(6, np.int64)).obs}

    native = starts("native")
    assert len(native) > 1
    assert native == starts("sync")


@pytest.mark.parametrize("how", ["native", "sync"])
def test_rewards_are_not_clipped(how: Any) -> None:
    env, rng = make(how, "SpaceInvaders"), np.random.default_rng(0)
    env.reset()
    assert max(env.step(rng.integers(0, 6, 2)).reward.max() for _ in range(150)) >= 5


@pytest.mark.parametrize("how", ["native", "sync"])
def test_runs_follow_from_their_seeds(how: Any) -> None:
    def run() -> list[bytes]:
        env, rng = make(how, "Breakout", repeat_action_probability=0.25), np.random.default_rng(0)
        return [env.reset().tobytes()] + [env.step(rng.integers(0, 4, 2)).obs.tobytes() for _ in range(60)]

    assert run() == run()


def test_options_that_it_has_not_are_refused() -> None:
    with pytest.raises(EnvError, match=r"ALE/Pong-v5: cannot be made: .*'colour'"):
        describe(EnvConfig("ALE/Pong-v5", {"colour": True}, preset="atari"))
