"""APPO's loss against a twin written from IMPACT's equations, its passes, target network and KL penalty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rows import (
    CONTINUOUS,
    DISCRETE,
    SMALL,
    B,
    T,
    assert_same_loss_and_gradient,
    columns,
    distribution,
    make_batch,
    truncating,
)
from torch import distributions

from ddrl_bus.algos import Batch, Spaces
from ddrl_bus.algos.appo import Appo, AppoConfig
from ddrl_bus.errors import UsageError


def config(**changes: Any) -> AppoConfig:
    return AppoConfig(**{**SMALL, **changes})


def with_another_target(settings: AppoConfig, spaces: Spaces) -> Appo:
    """A learner whose three policies differ: the batch's, the target network's and the one that is trained."""
    learner = Appo(settings, spaces, seed=0)
    with torch.no_grad():
        for parameter in learner.net.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=learner.generator)
    learner.net.double()
    learner.target.double()
    return learner


def slow_loss(learner: Appo, batch: Batch) -> torch.Tensor:
    c, total = learner.config, torch.zeros((), dtype=torch.float64)
    for rows in columns(learner, batch):
        correction = 0.0  # v - V of the next row
        for row in reversed(rows):
            old = distribution(learner.target(row.obs[None]).policy[0], learner.spaces)
            log_mu, log_old = row.mu.log_prob(row.action), old.log_prob(row.action)
            behaviour = float((log_old - log_mu).exp())
            value = row.value.item()
            delta = min(c.rho_bar, behaviour) * (row.reward + c.gamma * row.successor - value)
            trace = 0.0 if row.ends else c.lam * min(c.c_bar, behaviour)
            correction = delta + c.gamma * trace * correction
            r = min(1 / behaviour, c.ratio_bar) * (row.log_pi - log_mu).exp()
            surrogate = torch.min(r * correction, r.clamp(1 - c.clip, 1 + c.clip) * correction)
            total = total - surrogate + c.value_cost * 0.5 * (value + correction - row.value) ** 2
            total = total - c.entropy_cost * row.pi.entropy()
            if c.kl_target:
                total = total + float(learner.kl.cost) * distributions.kl_divergence(old, row.pi)
    return total / (T * B) if c.reduction == "mean" else total


@pytest.mark.parametrize("spaces", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reduction": "sum", "lam": 0.8, "rho_bar": 1.5, "c_bar": 1.1, "gamma": 0.9, "kl_target": 0.01},
        {"ratio_bar": 1.0, "clip": 0.05, "entropy_cost": 0.1, "value_cost": 2.0, "shared_torso": False},
    ],
)
def test_loss_and_gradient_equal_the_paper_row_by_row(changes: dict[str, Any], spaces: Spaces) -> None:
    learner = with_another_target(config(**{"reward_scale": 1.0, **changes}), spaces)
    batch = make_batch(dtype=np.float64, spaces=spaces).to("cpu")
    report = learner.loss(batch)[1]
    assert 0 < report["ratio_clipped"].float().mean() < 1
    assert 0 < report["rho_clipped"].float().mean() < 1
    assert_same_loss_and_gradient(learner, batch, slow_loss)


def test_right_after_the_target_was_refreshed_nothing_is_clipped_however_old_the_rows() -> None:
    learner = Appo(config(ratio_bar=1e6), DISCRETE, seed=0)
    _, report = learner.loss(make_batch().to("cpu"))
    assert report["rho"].std() > 0.1
    assert not report["ratio_clipped"].any()
    torch.testing.assert_close(report["kl"], torch.zeros(T, B))


def test_an_action_that_was_all_but_impossible_gives_finite_numbers() -> None:
    learner = Appo(config(), DISCRETE, seed=0)
    batch = make_batch()
    batch.record["policy"] *= 1000
    report = learner.step(batch)
    assert np.isfinite([report["loss"], report["grad_norm"]]).all()


def test_the_target_network_follows_every_so_many_updates() -> None:
    learner = Appo(config(target_every=3, passes=1), DISCRETE, seed=0)
    followed = []
    for seed in range(7):
        before = learner.weights()["policy.weight"]
        learner.step(make_batch(seed))
        followed.append(np.array_equal(learner.target.state_dict()["policy.weight"].numpy(), before))
    assert followed == [True, False, False, True, False, False, True]


@pytest.mark.parametrize(
    ("passes", "buffer", "ages"),
    [
        (1, 1, [[0]] * 3),
        (3, 1, [[0, 0, 0]] * 3),
        (2, 2, [[0, 0], [0, 1], [0, 1]]),
        (4, 2, [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]),
        (3, 3, [[0, 0, 0], [0, 1, 1], [0, 1, 2], [0, 1, 2]]),
    ],
)
def test_each_batch_is_trained_on_as_often_as_there_are_passes(passes: int, buffer: int, ages: list[list[int]]) -> None:
    learner = Appo(config(passes=passes, buffer=buffer), DISCRETE, seed=0)
    slot = make_batch()  # a learner's memory is filled anew for each batch
    for update, expected in enumerate(ages):
        slot.reward[:] = update
        seen = [update - float(each.reward[0, 0]) for each in learner.passes(slot.to("cpu"))]
        assert seen == expected


def test_passes_are_gradient_steps_away_from_one_target_and_one_update() -> None:
    learner, by_hand = (Appo(config(passes=2, optimizer="sgd", lr=0.1), DISCRETE, seed=0) for _ in range(2))
    learner.step(make_batch())
    assert (learner.updates, learner.env_steps) == (1, T * B)
    parameters = list(by_hand.net.parameters())
    for _ in range(2):
        gradients = torch.autograd.grad(by_hand.loss(make_batch().to("cpu"))[0], parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 0.1 * gradient
    for ours, theirs in zip(learner.weights().values(), by_hand.weights().values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kl", "factor"), [(0.021, 1.5), (0.019, 1.0), (0.006, 1.0), (0.004, 0.5)])
def test_the_kl_penalty_adapts(kl: float, factor: float) -> None:
    learner = Appo(config(kl_target=0.01), DISCRETE, seed=0)
    for _ in learner.passes(make_batch().to("cpu")):
        learner._measured_kl = torch.tensor(kl)
    assert float(learner.kl.cost) == factor


def test_replicas_adapt_the_kl_penalty_alike() -> None:
    """By the mean over all their rows: .021, of which ours is .004."""
    learner = Appo(config(kl_target=0.01), DISCRETE, seed=0)
    learner.all_reduce = lambda sums: sums.add_(torch.tensor([0.038, 1.0]))
    for _ in learner.passes(make_batch().to("cpu")):
        learner._measured_kl = torch.tensor(0.004)
    assert float(learner.kl.cost) == 1.5


def test_no_penalty_no_adapting() -> None:
    learner = Appo(config(), DISCRETE, seed=0)
    learner.step(make_batch())
    assert float(learner.kl.cost) == 1.0


def test_a_state_that_only_truncates_learns_the_value_of_going_on() -> None:
    """V must become 1/(1-γ) = 5, not what three rows pay."""
    settings = config(gamma=0.8, lr=0.05, hidden=(), reward_scale=1.0, entropy_cost=0.0, value_cost=1.0, anneal_steps=0)
    learner = Appo(settings, DISCRETE, seed=0)

    def value_after(batch: Batch) -> float:
        for _ in range(150):
            learner.step(batch)
        return float(learner.net(torch.ones(1, 4)).value.item())

    assert value_after(truncating()) == pytest.approx(5.0, abs=0.05)
    assert value_after(truncating(dead=True)) < 2.5


def test_its_gradient_is_not_sent_away() -> None:
    with pytest.raises(UsageError, match="appo makes several passes over a batch"):
        Appo(config(), DISCRETE, seed=0).gradients(make_batch())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": 1.0}, r"algo.clip: 1.0, expected a number above 0 and below 1"),
        ({"ratio_bar": 0.5}, r"algo.ratio_bar: 0.5, expected at least 1"),
        ({"c_bar": 2.0}, r"algo.c_bar: 2.0, expected above 0 and at most rho_bar, 1.0"),
        ({"passes": 3, "buffer": 2}, r"algo.passes: 3, expected a multiple of buffer, 2"),
        ({"target_every": 0}, r"algo.target_every: 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**changes)
