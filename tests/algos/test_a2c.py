"""A2C's loss against a twin written from the paper, and what makes it A3C's and GA3C's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from rows import CONTINUOUS, DISCRETE, SMALL, B, T, assert_same_loss_and_gradient, columns, make_batch, truncating

from ddrl_bus.algos import Batch, Spaces
from ddrl_bus.algos.a2c import A2C, A2CConfig
from ddrl_bus.errors import UsageError


def config(**changes: Any) -> A2CConfig:
    return A2CConfig(**{**SMALL, **changes})


def slow_loss(learner: A2C, batch: Batch) -> torch.Tensor:
    """Algorithm S3 of A3C, backwards down each column; with λ < 1 the mixture of its returns."""
    c, total = learner.config, torch.zeros((), dtype=torch.float64)
    for rows in columns(learner, batch):
        following = None  # A of the next row
        for row in reversed(rows):
            delta = row.reward + c.gamma * row.successor - row.value.item()
            advantage = delta if row.ends or following is None else delta + c.gamma * c.gae_lambda * following
            following = advantage
            log_pi = row.log_pi
            if c.log_eps:
                log_pi = torch.log(torch.clamp(log_pi.exp(), min=c.log_eps))
            target = advantage + row.value.item()
            total = total - advantage * log_pi + c.value_cost * (target - row.value) ** 2
            total = total - c.entropy_cost * row.pi.entropy()
    return total / (T * B) if c.reduction == "mean" else total


@pytest.mark.parametrize("spaces", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "changes",
    [
        {"entropy_cost": 0.01},
        {"reduction": "sum", "gamma": 0.9, "gae_lambda": 0.8, "entropy_cost": 0.1, "value_cost": 2.0},
        {"log_eps": 0.2, "reward_scale": 0.3, "shared_torso": False, "activation": "tanh"},
    ],
)
def test_loss_and_gradient_equal_the_paper_row_by_row(changes: dict[str, Any], spaces: Spaces) -> None:
    learner = A2C(config(**{"reward_scale": 1.0, **changes}), spaces, seed=0)
    learner.net.double()
    assert_same_loss_and_gradient(learner, make_batch(dtype=np.float64, spaces=spaces).to("cpu"), slow_loss)


def test_returns_reach_to_the_end_of_the_unroll_and_no_further() -> None:
    """By hand: γ = ½, V = 0 but for 8 of the bootstrap row, so R = 1 + ½·(1 + ½·8) = 3.5, 5, and 1 before a death."""
    learner = A2C(config(unroll=2, batch=2, hidden=(), gamma=0.5, reward_scale=1.0, value_cost=1.0), DISCRETE, seed=0)
    with torch.no_grad():
        learner.net.value.weight[:] = torch.tensor([8.0, 0, 0, 0])
        learner.net.policy.weight.zero_()
    obs = np.zeros((3, 2, 4), np.float32)
    obs[2, :, 0] = 1
    terminated = np.array([[False, False], [False, True]])
    batch = Batch(
        obs=obs,
        action=np.zeros((2, 2), np.int64),
        reward=np.ones((2, 2), np.float32),
        terminated=terminated,
        truncated=np.zeros((2, 2), bool),
        record={"policy": np.zeros((2, 2, 3), np.float32)},
        version=np.zeros((2, 2), np.int64),
        final_obs=obs[0, :0],
        final_index=np.zeros(0, np.int64),
    )
    _, report = learner.loss(batch.to("cpu"))
    expected = torch.tensor([[3.5, 1.5], [5.0, 1.0]])
    torch.testing.assert_close(report["value_loss"], expected.square())
    torch.testing.assert_close(report["policy_loss"], expected * math.log(3))


def test_below_log_eps_an_action_has_no_gradient() -> None:
    batch = make_batch().to("cpu")
    batch.action[:] = 0

    def policy_gradient(log_eps: float) -> float:
        learner = A2C(config(log_eps=log_eps, value_cost=0.0, entropy_cost=0.0, reward_scale=1.0), DISCRETE, seed=0)
        with torch.no_grad():
            learner.net.policy.bias[:] = torch.tensor([-30.0, 0.0, 0.0])
        learner.loss(batch)[0].backward()  # type: ignore[no-untyped-call]
        return float(learner.net.policy.bias.grad.abs().max())

    assert policy_gradient(0.0) > 0.01
    assert policy_gradient(1e-6) == 0.0


def test_a_state_that_only_truncates_learns_the_value_of_going_on() -> None:
    """V must become 1/(1-γ) = 5, not what three rows pay."""
    learner = A2C(
        config(gamma=0.8, lr=0.05, hidden=(), reward_scale=1.0, entropy_cost=0.0, value_cost=0.5, anneal_steps=0),
        DISCRETE,
        seed=0,
    )

    def value_after(batch: Batch) -> float:
        for _ in range(200):
            learner.step(batch)
        return float(learner.net(torch.ones(1, 4)).value.item())

    assert value_after(truncating()) == pytest.approx(5.0, abs=0.05)
    assert value_after(truncating(dead=True)) < 2.5


def test_final_observations_count() -> None:
    learner = A2C(config(), DISCRETE, seed=0)
    batch = make_batch().to("cpu")
    loss = learner.loss(batch)[0].item()
    moved = dataclasses.replace(batch, final_obs=batch.final_obs + 1.0)
    assert learner.loss(moved)[0].item() != pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gae_lambda": 1.5}, r"algo.gae_lambda: 1.5, expected a number from 0 to 1"),
        ({"log_eps": 1.0}, r"algo.log_eps: 1.0, expected a number from 0 to below 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)
