"""Policy heads: what a network's last layer means as a distribution over actions, in numpy for acting and in torch for
learning. `params [..., width]` are the last layer's outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.spaces import Spaces


class Distribution(ABC):
    """Distributions over actions, one for each leading index of `params [..., width]`."""

    @abstractmethod
    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        """[...] of actions as they were recorded."""

    @abstractmethod
    def entropy(self) -> torch.Tensor:
        """[...] in nats."""

    @abstractmethod
    def kl(self, other: Self) -> torch.Tensor:
        """[...] KL(self ‖ other) in nats."""


class Head(ABC):
    width: int
    """numbers per row that describe a policy"""

    @abstractmethod
    def sample(self, params: NDArray[np.float32], noise: Noise, greedy: bool) -> NDArray[Any]:
        """[N, width] -> actions [N] int64 or [N, D] float32; the likeliest ones if `greedy`."""

    @abstractmethod
    def of(self, params: torch.Tensor) -> Distribution: ...


class Categorical(Head):
    """`params` are logits."""

    def __init__(self, num_actions: int) -> None:
        self.width = num_actions

    def sample(self, params: NDArray[np.float32], noise: Noise, greedy: bool) -> NDArray[Any]:
        scores = params if greedy else params + noise.gumbel(params.shape)  # argmax is then a sample of the softmax
        action: NDArray[Any] = scores.argmax(axis=1)
        return action

    def of(self, params: torch.Tensor) -> Distribution:
        return _Categorical(params)


class _Categorical(Distribution):
    def __init__(self, logits: torch.Tensor) -> None:
        self._log_p = torch.log_softmax(logits, dim=-1)

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        return self._log_p.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> torch.Tensor:
        return -(self._log_p.exp() * self._log_p).sum(-1)

    def kl(self, other: Self) -> torch.Tensor:
        return (self._log_p.exp() * (self._log_p - other._log_p)).sum(-1)


class Gaussian(Head):
    """`params` are means and log standard deviations, D each; components are independent. Actions are recorded as they
    were drawn; the environment clips them to its bounds."""

    def __init__(self, components: int) -> None:
        self.components = components
        self.width = 2 * components

    def sample(self, params: NDArray[np.float32], noise: Noise, greedy: bool) -> NDArray[Any]:
        mean, log_std = np.split(params, 2, axis=1)
        if greedy:
            return mean.astype(np.float32)
        drawn: NDArray[Any] = mean + np.exp(log_std) * noise.normal(mean.shape)
        return drawn

    def of(self, params: torch.Tensor) -> Distribution:
        return _Gaussian(*params.chunk(2, dim=-1))


class _Gaussian(Distribution):
    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor) -> None:
        self._mean, self._log_std = mean, log_std

    def log_prob(self, action: torch.Tensor) -> torch.Tensor:
        z = (action - self._mean) * torch.exp(-self._log_std)
        return (-0.5 * z.square() - self._log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> torch.Tensor:
        return (self._log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, other: Self) -> torch.Tensor:
        log_ratio = other._log_std - self._log_std
        spread = torch.exp(-2 * log_ratio) + ((self._mean - other._mean) * torch.exp(-other._log_std)).square()
        return (log_ratio + 0.5 * (spread - 1)).sum(-1)


def head_of(spaces: Spaces) -> Head:
    """Categorical for discrete action spaces, Gaussian for continuous ones."""
    return Categorical(spaces.num_actions) if spaces.action_kind == "discrete" else Gaussian(spaces.num_actions)
