"""Networks. This module imports torch for real: only learners reach it.

Naming is part of the contract with `acting.py`: `torso.<i>` are the hidden layers, `policy` and `value` the heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


class Outputs(NamedTuple):
    logits: torch.Tensor
    """[N, num_actions]"""
    value: torch.Tensor
    """[N]"""


class Mlp(nn.Module):
    """Policy and value heads on fully connected hidden layers, shared or one stack each.

    Shapes: obs [N, features] of any dtype; returns Outputs.
    Source: orthogonal initialisation, gain √2 in the torso, 0.01 in the policy and 1 in the value head
    (openai/baselines; Andrychowicz et al. 2020, arXiv 2006.05990), so that the first policy is nearly uniform.
    """

    def __init__(
        self,
        features: int,
        num_actions: int,
        hidden: Sequence[int],
        *,
        activation: str,
        shared_torso: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._activation = ACTIVATIONS[activation]()
        widths = [features, *hidden]

        def stack() -> nn.ModuleList:
            return nn.ModuleList(_linear(i, o, math.sqrt(2), generator) for i, o in pairwise(widths))

        self.torso = stack()
        self.value_torso = None if shared_torso else stack()
        self.policy = _linear(widths[-1], num_actions, 0.01, generator)
        self.value = _linear(widths[-1], 1, 1.0, generator)

    def forward(self, obs: torch.Tensor) -> Outputs:
        x = obs.to(self.policy.weight.dtype)
        policy_features = self._features(self.torso, x)
        value_features = policy_features if self.value_torso is None else self._features(self.value_torso, x)
        return Outputs(self.policy(policy_features), self.value(value_features).squeeze(-1))

    def _features(self, layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x = self._activation(layer(x))
        return x


def actor_critic(
    spaces: Spaces, *, hidden: Sequence[int], activation: str, shared_torso: bool, generator: torch.Generator
) -> Mlp:
    """The network for these spaces, initialised from `generator` alone.

    Raises: UsageError for observations that are not flat.
    """
    if len(spaces.obs_shape) != 1:
        raise UsageError(
            f"no network for observations of shape {spaces.obs_shape} yet: the MLP takes flat ones, (features,)"
        )
    return Mlp(
        spaces.obs_shape[0],
        spaces.num_actions,
        hidden,
        activation=activation,
        shared_torso=shared_torso,
        generator=generator,
    )


def _linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    # On the meta device nothing is initialised: nn.Linear's own way would draw from torch's global generator.
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(outputs, inputs), gain, generator=generator))
    layer.bias = nn.Parameter(torch.zeros(outputs))
    return layer
