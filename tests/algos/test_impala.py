"""IMPALA's loss against a plain re-implementation, and the published settings of those who learn by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from rows import CONTINUOUS, DISCRETE, SMALL, B, T, assert_same_loss_and_gradient, columns, make_batch, truncating
from torch.nn import functional as F

from ddrl_bus.algos import Batch, Spaces, make_policy, returns
from ddrl_bus.algos.impala import Impala, ImpalaConfig
from ddrl_bus.algos.policy import Explore
from ddrl_bus.errors import UsageError

EXPLORE = Explore(np.zeros(1, np.float32))


def config(**changes: Any) -> ImpalaConfig:
    return ImpalaConfig(**{**SMALL, **changes})


def slow_loss(learner: Impala, batch: Batch) -> torch.Tensor:
    """The paper's three terms, row by row, every forward on its own."""
    c, total = learner.config, torch.zeros((), dtype=torch.float64)
    for rows in columns(learner, batch):
        correction = 0.0  # v_{s+1} - V_{s+1}
        for row in reversed(rows):
            ratio = row.ratio if c.correct else 1.0
            rho, trace = min(c.rho_bar, ratio), c.lam * min(c.c_bar, ratio)
            following = 0.0 if row.ends else correction
            value = row.value.item()
            advantage = row.reward + c.gamma * (row.successor + following) - value
            delta = rho * (row.reward + c.gamma * row.successor - value)
            correction = delta + c.gamma * trace * following
            total = total - rho * advantage * row.log_pi + c.value_cost * 0.5 * (value + correction - row.value) ** 2
            total = total - c.entropy_cost * row.pi.entropy()
    return total / (T * B) if c.reduction == "mean" else total


@pytest.mark.parametrize("spaces", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "sum", "lam": 0.8, "rho_bar": 1.5, "c_bar": 1.1, "gamma": 0.9},
        {"shared_torso": False, "activation": "tanh", "entropy_cost": 0.1, "value_cost": 2.0},
        {"correct": False},
    ],
)
def test_loss_and_gradient_equal_the_paper_row_by_row(changes: dict[str, Any], spaces: Spaces) -> None:
    learner = Impala(config(**{"reward_scale": 0.3, **changes}), spaces, seed=0)
    learner.net.double()
    assert_same_loss_and_gradient(learner, make_batch(dtype=np.float64, spaces=spaces).to("cpu"), slow_loss)


def torchbeast_loss(learner: Impala, batch: Batch) -> torch.Tensor:
    """As monobeast writes it: three sums over T and B, ½ in the baseline's, costs .5 and .0006, V-trace's bars 1."""
    policy, value, successor = learner.net.unroll(batch)
    log_p = torch.log_softmax(policy, -1)
    log_pi = -F.nll_loss(log_p.flatten(0, 1), batch.action.flatten(), reduction="none").view(T, B)
    log_mu = torch.log_softmax(batch.record["policy"], -1).gather(-1, batch.action[..., None]).squeeze(-1)
    targets = returns.vtrace(
        torch.exp(log_pi - log_mu),
        batch.reward.clamp(-1, 1),
        value,
        successor,
        batch.terminated,
        batch.truncated,
        gamma=0.99,
    )
    pg_loss = torch.sum(-log_pi * targets.rho * targets.advantage)
    baseline_loss = 0.5 * torch.sum((targets.target - value) ** 2)
    entropy_loss = torch.sum(log_p.exp() * log_p)
    return pg_loss + 0.5 * baseline_loss + 0.0006 * entropy_loss


def test_published_settings_of_torchbeast_transfer() -> None:
    """Three updates of monobeast with torch's own optimiser, schedule and clipping, and ours of the same settings."""
    settings = config(
        reduction="sum",
        optimizer="rmsprop",
        lr=4.8e-4,
        eps=0.01,
        rms_decay=0.99,
        entropy_cost=0.0006,
        value_cost=0.5,
        max_grad_norm=40.0,
        reward_clip="one",
        reward_scale=1.0,
        anneal_steps=10 * T * B,
    )
    learner, beast = (Impala(settings, DISCRETE, seed=0) for _ in range(2))
    optimizer = torch.optim.RMSprop(beast.net.parameters(), lr=4.8e-4, momentum=0, eps=0.01, alpha=0.99)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / 10)
    for seed in range(3):
        learner.step(make_batch(seed))
        loss = torchbeast_loss(beast, make_batch(seed).to("cpu"))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(beast.net.parameters(), 40.0)
        optimizer.step()
        scheduler.step()
    for ours, theirs in zip(learner.weights().values(), beast.weights().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_rows_that_the_actor_just_chose_have_ratio_one() -> None:
    settings = config(hidden=(64, 64))
    learner = Impala(settings, DISCRETE, seed=3)
    policy = make_policy(Impala, settings, DISCRETE, seed=0)
    policy.load(learner.weights())
    batch = make_batch()
    acted = policy.act(batch.obs[:T].reshape(T * B, 4), {}, EXPLORE)
    batch.action = acted.action.reshape(T, B)
    batch.record = {"policy": acted.record["policy"].reshape(T, B, 3)}
    _, report = learner.loss(batch.to("cpu"))
    torch.testing.assert_close(report["rho"], torch.ones(T, B), atol=1e-5, rtol=0)
    assert not report["rho_clipped"].any()


def test_final_observations_count_at_truncated_rows_only() -> None:
    learner = Impala(config(), DISCRETE, seed=0)
    batch = make_batch().to("cpu")
    loss = learner.loss(batch)[0].item()
    moved = dataclasses.replace(batch, final_obs=batch.final_obs + 1.0)
    assert learner.loss(moved)[0].item() != pytest.approx(loss, rel=1e-6)
    alone = dataclasses.replace(batch, truncated=torch.zeros_like(batch.truncated))
    alone.final_obs, alone.final_index = batch.final_obs[:0], batch.final_index[:0]
    assert np.isfinite(learner.loss(alone)[0].item())


def test_a_state_that_only_truncates_learns_the_value_of_going_on() -> None:
    """V must become 1/(1-γ) = 5, not what three rows pay."""
    settings = config(gamma=0.8, lr=0.05, hidden=(), reward_scale=1.0, entropy_cost=0.0, value_cost=1.0, anneal_steps=0)
    learner = Impala(settings, DISCRETE, seed=0)

    def value_after(batch: Batch) -> float:
        for _ in range(150):
            learner.step(batch)
        return float(learner.net(torch.ones(1, 4)).value.item())

    assert value_after(truncating()) == pytest.approx(5.0, abs=0.05)
    assert value_after(truncating(dead=True)) < 2.5


def test_no_truncation_at_all() -> None:
    learner = Impala(config(), DISCRETE, seed=0)
    batch = make_batch()
    batch.truncated[:] = False
    batch.final_obs, batch.final_index = batch.final_obs[:0], batch.final_index[:0]
    assert np.isfinite(learner.step(batch)["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c_bar": 2.0}, r"algo.c_bar: 2.0, expected at most rho_bar, 1.0"),
        ({"rho_bar": 0.0}, r"algo.rho_bar: 0.0, expected a number above 0"),
        ({"lam": 1.5}, r"algo.lam: 1.5, expected a number from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)
