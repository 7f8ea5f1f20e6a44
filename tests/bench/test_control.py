from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.bench.control import evaluate, run_control
from ddrl_bus.envs import EnvConfig


class Bandit(gym.Env[np.ndarray, int]):
    """Shows a sign; the action that matches it pays 1, and the episode goes on for three of them."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return self._show(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == (self._sign > 0))
        return self._show(), reward, False, False, {}

    def _show(self) -> np.ndarray:
        self._sign = self.np_random.choice([-1.0, 1.0])
        return np.array([self._sign], np.float32)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gym.register("Bandit-v0", entry_point=Bandit, max_episode_steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del gym.registry["Bandit-v0"]


BANDIT = EnvConfig("Bandit-v0")
SETTINGS = ImpalaConfig(unroll=5, batch=16, hidden=(8,), lr=0.01)


@pytest.mark.parametrize("lag", [0, 4])
def test_impala_learns_a_bandit(lag: int) -> None:
    result = run_control(
        BANDIT, Impala, SETTINGS, envs=8, steps=20_000, seed=0, lag=lag, target=3.0, evaluate_every=800
    )
    assert result.solved_at is not None
    assert result.evaluations[-1][2] == 3.0
    assert result.evaluations[-1][:2] == result.solved_at


def test_what_a_run_reports() -> None:
    result = run_control(BANDIT, Impala, SETTINGS, envs=16, steps=400, seed=0)
    assert (result.env_steps, result.updates) == (400, 5)
    assert result.steps_per_s == pytest.approx(400 / result.wall_s)
    assert sum(result.shares.values()) == pytest.approx(1.0)
    assert set(result.shares) == {"env", "forward", "learn", "other"}
    assert min(result.shares.values()) > 0
    assert result.report["rho"] == pytest.approx(1.0, abs=1e-5), "without lag the policy is the one that acted"


def test_lag_shows_in_the_importance_weights() -> None:
    result = run_control(BANDIT, Impala, SETTINGS, envs=16, steps=20 * 80, seed=0, lag=3)
    assert abs(result.report["rho"] - 1.0) > 1e-5


def test_a_seed_decides_a_run() -> None:
    first, again, other = (
        run_control(BANDIT, Impala, SETTINGS, envs=8, steps=800, seed=seed).report for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_evaluation_plays_the_first_episode_of_each_environment() -> None:
    weights = Impala(SETTINGS, run_spaces(), seed=0).weights()
    returns = evaluate(BANDIT, Impala, SETTINGS, weights, episodes=7, seed=0)
    assert len(returns) == 7
    assert set(returns) <= {0.0, 1.0, 2.0, 3.0}


def run_spaces() -> Any:
    from ddrl_bus.envs import describe

    return describe(BANDIT)


def test_a_batch_that_actors_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 16 is not a multiple of 5 environments"):
        run_control(BANDIT, Impala, SETTINGS, envs=5, steps=100, seed=0)
