"""Random batches, and what slow twins of the losses are made of: rows, one forward each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributions

from ddrl_bus.algos import Batch, Spaces

DISCRETE = Spaces((4,), "float32", "discrete", 3)
CONTINUOUS = Spaces((4,), "float32", "continuous", 2, (-1.0, -1.0), (1.0, 1.0))
T, B = 6, 5
SMALL = {"hidden": (8,), "unroll": T, "batch": B}


def make_batch(seed: int = 0, *, dtype: type = np.float32, spaces: Spaces = DISCRETE) -> Batch:
    """Random rows with terminations, truncations and their final observations."""
    rng = np.random.default_rng(seed)
    end = rng.random((T, B))
    terminated, truncated = end < 0.1, (end > 0.1) & (end < 0.3)
    terminated[0, 0], truncated[1, 1] = True, True
    index = np.flatnonzero(truncated)
    discrete = spaces.action_kind == "discrete"
    return Batch(
        obs=rng.normal(size=(T + 1, B, 4)).astype(dtype),
        action=rng.integers(0, 3, (T, B)) if discrete else rng.normal(size=(T, B, 2)).astype(dtype),
        reward=rng.normal(size=(T, B)).astype(dtype),
        terminated=terminated,
        truncated=truncated,
        record={
            "policy": 0.5 * rng.normal(size=(T, B, 3 if discrete else 4)).astype(dtype),
            "value": np.zeros((T, B), dtype),
        },
        version=np.zeros((T, B), np.int64),
        final_obs=rng.normal(size=(len(index), 4)).astype(dtype),
        final_index=index,
    )


def truncating(every: int = 3, *, dead: bool = False) -> Batch:
    """One state, reward 1, and a time limit after every third row; `dead` takes it for a termination."""
    truncated = np.zeros((T, B), bool)
    truncated[every - 1 :: every] = True
    index = np.flatnonzero(truncated)
    if dead:
        index = index[:0]
    one = np.ones((T + 1, B, 4), np.float32)
    return Batch(
        obs=one,
        action=np.zeros((T, B), np.int64),
        reward=np.ones((T, B), np.float32),
        terminated=truncated if dead else np.zeros((T, B), bool),
        truncated=np.zeros((T, B), bool) if dead else truncated,
        record={"policy": np.zeros((T, B, 3), np.float32)},
        version=np.zeros((T, B), np.int64),
        final_obs=np.ones((len(index), 4), np.float32),
        final_index=index,
    )


class Row(NamedTuple):
    pi: distributions.Distribution
    value: torch.Tensor
    successor: float
    """V of the true successor; 0 where the row terminated"""
    mu: distributions.Distribution
    action: torch.Tensor
    reward: float
    """scaled"""
    ends: bool
    obs: torch.Tensor

    @property
    def log_pi(self) -> torch.Tensor:
        return self.pi.log_prob(self.action)

    @property
    def ratio(self) -> float:
        return float((self.log_pi - self.mu.log_prob(self.action)).exp().item())


def distribution(params: torch.Tensor, spaces: Spaces) -> distributions.Distribution:
    """torch's own, so that ours is checked too."""
    if spaces.action_kind == "discrete":
        return distributions.Categorical(logits=params)
    mean, log_std = params.chunk(2, dim=-1)
    return distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)


def columns(learner: Any, batch: Batch) -> Iterator[list[Row]]:
    """The rows of each column, every forward on its own."""
    final = dict(zip(batch.final_index.tolist(), batch.final_obs, strict=True))

    def value_of(obs: torch.Tensor) -> float:
        return float(learner.net(obs[None]).value.item())

    def row(t: int, b: int) -> Row:
        policy, value = learner.net(batch.obs[t, b][None])
        successor = final[t * B + b] if batch.truncated[t, b] else batch.obs[t + 1, b]
        return Row(
            pi=distribution(policy[0], learner.spaces),
            value=value[0],
            successor=0.0 if batch.terminated[t, b] else value_of(successor),
            mu=distribution(batch.record["policy"][t, b], learner.spaces),
            action=batch.action[t, b],
            reward=learner.config.reward_scale * float(batch.reward[t, b]),
            ends=bool(batch.terminated[t, b] | batch.truncated[t, b]),
            obs=batch.obs[t, b],
        )

    for b in range(B):
        yield [row(t, b) for t in range(T)]


def assert_same_loss_and_gradient(learner: Any, batch: Batch, slow_loss: Any) -> None:
    """Of the rule's `loss` and its twin `slow_loss(learner, batch)`, on double precision."""
    parameters = list(learner.net.parameters())
    slow, (fast, _) = slow_loss(learner, batch), learner.loss(batch)
    assert abs(fast.item() - slow.item()) <= 1e-6 * abs(slow.item())
    theirs = torch.autograd.grad(slow, parameters)
    for mine, other in zip(torch.autograd.grad(fast, parameters), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
    assert any(gradient.abs().max() > 1e-3 for gradient in theirs)
