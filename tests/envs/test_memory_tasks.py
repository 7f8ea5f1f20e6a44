"""The memory tasks: one with a memory solves them, the best without one is at the stated ceiling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddrl_bus.algos import Spaces
from ddrl_bus.envs import EnvConfig, VectorEnv, describe
from ddrl_bus.envs.memory_tasks import TMaze
from ddrl_bus.errors import EnvError

NORTH, EAST, SOUTH, WEST = range(4)


def make(id: str, n: int = 64, seed: int = 0, limit: int | None = None, **kwargs: Any) -> VectorEnv:
    return VectorEnv(EnvConfig(id, kwargs, max_episode_steps=limit), n, np.random.SeedSequence([seed]))


def test_spaces() -> None:
    assert describe(EnvConfig("ddrl_bus/TMaze-v0")) == Spaces((3,), "float32", "discrete", 4)
    repeat = EnvConfig("ddrl_bus/RepeatPrevious-v0", {"symbols": 5})
    assert describe(repeat) == Spaces((5,), "float32", "discrete", 5)


def test_who_remembers_the_cue_always_turns_right() -> None:
    env = make("ddrl_bus/TMaze-v0", length=5)
    cue, episodes = env.reset(), []
    for t in range(1, 61):
        turn = np.where((cue == TMaze.CUES[0]).all(axis=1), NORTH, SOUTH)
        step = env.step(turn if t % 6 == 0 else np.full(64, EAST))
        episodes += step.episodes
        if t % 6 == 0:
            assert step.terminated.all()
            cue = step.obs
            assert {tuple(row) for row in cue.tolist()} == {(0, 1, 1), (1, 1, 0)}
        else:  # on the way nothing tells the two apart
            assert step.obs.tolist() == [[0, 1, 0] if t % 6 == 5 else [1, 0, 1]] * 64
            assert not step.reward.any()
    assert set(episodes) == {(1.0, 6)}


def test_without_a_memory_half_the_turns_are_right() -> None:
    env, episodes = make("ddrl_bus/TMaze-v0", 200, length=1), list[tuple[float, int]]()
    env.reset()
    for t in range(100):
        episodes += env.step(np.full(200, NORTH if t % 2 else EAST)).episodes
    assert {total for total, _ in episodes} == {0.0, 1.0}
    assert np.mean([total for total, _ in episodes]) == pytest.approx(0.5, abs=0.02)


def test_the_cue_is_not_shown_again_and_walls_only_cost_time() -> None:
    env = make("ddrl_bus/TMaze-v0", 2, length=2, limit=4)
    env.reset()
    for action, seen in ((WEST, [1, 0, 1]), (NORTH, [1, 0, 1]), (EAST, [1, 0, 1])):
        assert env.step(np.full(2, action)).obs.tolist() == [seen] * 2
    step = env.step(np.full(2, EAST))
    assert (step.truncated.all(), step.terminated.any()) == (True, False)
    assert step.final_obs.tolist() == [[0, 1, 0]] * 2
    assert list(step.episodes) == [(0.0, 4)] * 2


def test_rows_end_on_their_own() -> None:
    env = make("ddrl_bus/TMaze-v0", 2, length=1)
    env.reset()
    env.step(np.array([EAST, WEST]))
    step = env.step(np.array([NORTH, EAST]))
    assert step.final_index.tolist() == [0]
    assert step.obs[1].tolist() == [0, 1, 0]
    assert env.step(np.array([EAST, SOUTH])).final_index.tolist() == [1]


@pytest.mark.parametrize(("k", "symbols", "length"), [(1, 2, 8), (4, 4, 64), (7, 3, 20)])
def test_repeating_what_was_shown_k_steps_ago_is_worth_one(k: int, symbols: int, length: int) -> None:
    env = make("ddrl_bus/RepeatPrevious-v0", k=k, symbols=symbols, length=length)
    shown, episodes = [env.reset().argmax(axis=1)], []
    for t in range(length):
        step = env.step(shown[t - k] if t >= k else shown[0])
        assert (step.obs.sum(axis=1) == 1).all()
        np.testing.assert_allclose(step.reward, 1 / (length - k) if t >= k else 0.0)
        shown.append(step.obs.argmax(axis=1))
        episodes += step.episodes
    assert step.terminated.all()
    np.testing.assert_allclose(episodes, [(1.0, length)] * 64, rtol=1e-5)


def test_repeating_the_present_is_worth_one_in_symbols() -> None:
    env, episodes = make("ddrl_bus/RepeatPrevious-v0", 100, k=2, symbols=3), list[tuple[float, int]]()
    obs = env.reset()
    for _ in range(128):
        step = env.step(obs.argmax(axis=1))
        obs, episodes = step.obs, episodes + list(step.episodes)
    assert np.mean([total for total, _ in episodes]) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("id", ["ddrl_bus/TMaze-v0", "ddrl_bus/RepeatPrevious-v0"])
def test_runs_follow_from_their_seeds(id: str) -> None:
    def run(seed: int) -> list[Any]:
        env, rng = make(id, 4, seed), np.random.default_rng(0)
        return [env.reset().tolist()] + [env.step(rng.integers(0, 4, 4)).obs.tolist() for _ in range(300)]

    assert run(1) == run(1)
    assert run(1) != run(2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EnvConfig("ddrl_bus/TMaze-v0", {"length": 0}), "TMaze-v0: cannot be made: length 0, expected at least 1"),
        (EnvConfig("ddrl_bus/TMaze-v0", {"width": 1}), "TMaze-v0: cannot be made: .*width"),
        (EnvConfig("ddrl_bus/RepeatPrevious-v0", {"k": 64}), "cannot be made: k 64, .* expected 1 ≤ k < length"),
        (EnvConfig("ddrl_bus/TMaze-v0", vectorization="sync"), "TMaze-v0: vectorization 'sync' is not possible"),
        (EnvConfig("ddrl_bus/TMaze-v0", preset="atari"), "TMaze-v0: preset 'atari' is for ALE/"),
    ],
)
def test_what_is_refused(config: EnvConfig, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        describe(config)
