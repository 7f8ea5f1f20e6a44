from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from ddrl_bus.algos import REGISTRY
from ddrl_bus.algos.a2c import A2C, A2CConfig
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.bench.control import Training, evaluate, run_control
from ddrl_bus.envs import EnvConfig, VectorEnv
from ddrl_bus.nodes.base import node_seeds


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


class Pays(gym.Env[np.ndarray, int]):
    """1 a step, whatever is done; `lives`: steps after which the episode is over."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, lives: int = 0) -> None:
        self._lives = lives

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return np.ones(1, np.float32), 1.0, self._steps == self._lives, False, {}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    gym.register("Bandit-v0", entry_point=Bandit, max_episode_steps=3)
    gym.register("Pays-v0", entry_point=Pays, max_episode_steps=3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    del gym.registry["Bandit-v0"], gym.registry["Pays-v0"]


BANDIT = EnvConfig("Bandit-v0")
SETTINGS = ImpalaConfig(unroll=5, batch=16, hidden=(8,), lr=0.01)
A2C_SETTINGS = A2CConfig(unroll=5, batch=16, hidden=(8,), lr=0.01)


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


def test_late_gradients_are_applied_as_many_updates_late() -> None:
    """As in A3C: rows and gradient belong to one version, and the server applies it to a newer one."""
    training = Training(BANDIT, A2C, A2C_SETTINGS, envs=8, seed=0, lag=2, late_gradients=True)
    weights = [training.learner.weights()]
    for _ in range(5):
        assert training.update()["rho"] == pytest.approx(1.0, abs=1e-5)
        weights.append(training.learner.weights())
    training.close()
    moved = [not np.array_equal(a["value.bias"], b["value.bias"]) for a, b in pairwise(weights)]
    assert moved == [False, False, True, True, True]
    assert (training.learner.updates, len(training.actors)) == (3, 3 * 2)


def test_gradients_that_are_not_late_are_steps() -> None:
    late, steps = (Training(BANDIT, A2C, A2C_SETTINGS, envs=8, seed=0, late_gradients=late) for late in (True, False))
    for training in (late, steps):
        for _ in range(5):
            training.update()
        training.close()
    expected = steps.learner.state()
    assert all(np.array_equal(array, expected[name]) for name, array in late.learner.state().items())


@pytest.mark.parametrize("rule", sorted(name for name, cls in REGISTRY.items() if not cls.windows(cls.Config())))
def test_every_rule_of_fresh_unrolls_learns_a_bandit(rule: str) -> None:
    cls = REGISTRY[rule]
    settings = cls.Config(unroll=5, batch=16, hidden=(8,), lr=0.01)
    result = run_control(BANDIT, cls, settings, envs=8, steps=20_000, seed=0, lag=1, target=3.0, evaluate_every=800)
    assert result.solved_at is not None


def test_an_end_by_a_time_limit_is_no_death() -> None:
    """From the environment through vectors and unrolls to V: 1/(1-γ) where episodes are only cut short."""

    def value(**kwargs: int) -> float:
        config = A2CConfig(unroll=5, batch=16, hidden=(), lr=0.05, gamma=0.8, reward_scale=1.0, anneal_steps=0)
        training = Training(EnvConfig("Pays-v0", kwargs=kwargs), A2C, config, envs=16, seed=0)
        for _ in range(150):
            training.update()
        training.close()
        return float(training.learner.net(torch.ones(1, 1)).value.item())

    assert value() == pytest.approx(5.0, abs=0.2)
    assert value(lives=2) < 2.5


def test_columns_are_in_the_order_of_the_actors_names() -> None:
    """`actor-10` comes before `actor-2`, as a learner sorts them."""
    settings = A2CConfig(unroll=1, batch=11, hidden=(8,))
    training = Training(EnvConfig("CartPole-v1"), A2C, settings, envs=1, seed=0)
    training.update()
    training.close()
    for column, index in enumerate([0, 1, 10, 2, 3]):
        env = VectorEnv(EnvConfig("CartPole-v1"), 1, node_seeds(0, "actor", index))
        np.testing.assert_array_equal(training.batch.obs[0, column], env.reset()[0])
        env.close()


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


def test_a_sampled_evaluation_plays_the_policy_as_it_acts() -> None:
    weights = Impala(SETTINGS, run_spaces(), seed=0).weights()
    weights["policy.bias"][:] = [1.0, 0.0]  # prefers one action whatever it sees
    weights["policy.weight"][:] = 0.0
    greedy, sampled = (
        evaluate(BANDIT, Impala, SETTINGS, weights, episodes=200, seed=0, greedy=greedy) for greedy in (True, False)
    )
    assert np.mean(greedy) == pytest.approx(1.5, abs=0.2)
    assert np.mean(sampled) == pytest.approx(1.5, abs=0.2)
    assert greedy != sampled


def run_spaces() -> Any:
    from ddrl_bus.envs import describe

    return describe(BANDIT)


def test_a_batch_that_actors_cannot_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="batch 16 is not a multiple of 5 environments"):
        run_control(BANDIT, Impala, SETTINGS, envs=5, steps=100, seed=0)
