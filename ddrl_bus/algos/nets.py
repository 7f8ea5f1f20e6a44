"""Networks. This module imports torch for real: only learners, and actors whose network has no numpy forward, reach it.

    obs ─→ torso ─→ (⊕ last action and reward) ─→ core ─→ policy, value    or q (, value)

A policy sees `step` of it and a learning rule `unroll`. Names are part of the contract with `numpy_policy.py`:
`torso.<i>` are the layers of an MLP, `core.rnn` is the recurrent layer, `policy`, `value` and `q` are the heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ddrl_bus.algos import inputs
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.config import AgentConfig, PolicyGradientConfig, QLearningConfig
from ddrl_bus.algos.cores import Core
from ddrl_bus.algos.inputs import Inputs, State
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.algos.torsos import Torso, linear, torso


class Outputs(NamedTuple):
    policy: torch.Tensor
    """[N, P], what the policy head says of each row"""
    value: torch.Tensor
    """[N]"""


class Unrolled(NamedTuple):
    policy: torch.Tensor
    """[T, B, P]"""
    value: torch.Tensor
    """[T, B], of obs_t"""
    successor: torch.Tensor
    """[T, B] V of each row's true successor: of obs_{t+1}, or of the final observation where row t was truncated; any
    finite number where it terminated. Without gradient."""


class Features(NamedTuple):
    """[N, width] each, one and the same where the layers are shared."""

    policy: torch.Tensor
    value: torch.Tensor


class Body(nn.Module):
    """What networks share: all below the heads."""

    def __init__(self, config: AgentConfig, spaces: Spaces, generator: torch.Generator | None) -> None:
        """Initialised from `generator` alone; all zeros without one.

        Raises: UsageError for observations that the network does not cover.
        """
        super().__init__()
        self._spaces, self._half = spaces, config.precision == "bfloat16"
        self.torso = torso(config, inputs.shape(spaces), generator)
        self.width = self.torso.width + (spaces.num_actions + 1 if config.last_inputs else 0)
        self.core = None
        if config.core != "none":
            self.core = Core(config.core, self.width, config.core_size, generator)
            self.width = config.core_size

    def _numbers(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations as numbers of the weights' type; images of bytes from 0 to 1."""
        dtype = next(self.parameters()).dtype
        if obs.dim() == 2:
            return obs.to(dtype)
        image = obs.to(dtype, memory_format=torch.channels_last)  # convolutions take 0.7 of the time on a CPU
        return image.mul_(1 / 255) if obs.dtype == torch.uint8 else image

    def _through(self, torso: Torso, x: torch.Tensor, last: torch.Tensor | None) -> torch.Tensor:
        if self._half:
            with torch.autocast(x.device.type, torch.bfloat16):
                features = torso(x).to(x.dtype)
        else:
            features = torso(x)
        return features if last is None else torch.cat([features, last.to(x.dtype)], dim=1)

    def _unrolled(self, core: Core, features: torch.Tensor, batch: Batch, burn_in: int = 0) -> torch.Tensor:
        """The core over the rows of `inputs.of_batch`.  Shapes: [(T+1)·B + K, inputs] -> [(T+1)·B + K, width]."""
        rows = batch.obs.shape[0] * batch.obs.shape[1]
        x = features[:rows].view(*batch.obs.shape[:2], -1)
        begins, final = inputs.begins(batch), features[rows:]
        return core.unroll(x, begins, batch.state, final, batch.final_index, burn_in)


class ActorCritic(Body):
    """Policy and value heads on layers that they share, or on a torso each.

    Source: orthogonal initialisation, gain 0.01 in the policy and 1 in the value head (openai/baselines; Andrychowicz
    et al. 2020, arXiv 2006.05990), so that the first policy is nearly uniform. A Gaussian policy's log standard
    deviations are parameters of their own, 0 at first.
    """

    def __init__(self, config: PolicyGradientConfig, spaces: Spaces, generator: torch.Generator | None) -> None:
        super().__init__(config, spaces, generator)
        self.value_torso = None if config.shared_torso else torso(config, inputs.shape(spaces), generator)
        self.policy = linear(self.width, spaces.num_actions, 0.01, generator)
        continuous = spaces.action_kind == "continuous"
        self.log_std = nn.Parameter(torch.zeros(spaces.num_actions)) if continuous else None
        self.value = linear(self.width, 1, 1.0, generator)

    def forward(self, obs: torch.Tensor) -> Outputs:
        """Networks without a memory only.  Shapes: obs [N, ...]."""
        return self.step(obs, {})[0]

    def step(self, obs: torch.Tensor, state: State) -> tuple[Outputs, State]:
        """One step of N environments: what the network says, and what they carry on, to be completed by
        `memory.carry`.  Shapes: obs [N, ...], state {name: [N, ...]}."""
        seen, state = inputs.of_step(self._spaces, obs, state)
        features = self._features(seen)
        if self.core is not None:
            out, carried = self.core.step(features.policy, state)
            features, state = Features(out, out), state | carried
        return self._outputs(features), state

    def unroll(self, batch: Batch) -> Unrolled:
        """What the network says of all rows of `batch`, whose arrays are tensors on our device."""
        length, columns = batch.reward.shape
        rows = length * columns
        # One forward for the T+1 rows and the K final observations.
        features = self._features(inputs.of_batch(self._spaces, batch))
        if self.core is not None:
            out = self._unrolled(self.core, features.policy, batch)
            features = Features(out, out)
        policy, value = self._outputs(features)
        successor = value.detach()[inputs.successors(batch)]
        return Unrolled(policy[:rows].view(length, columns, -1), value[:rows].view(length, columns), successor)

    def _features(self, seen: Inputs) -> Features:
        x = self._numbers(seen.obs)
        policy = self._through(self.torso, x, seen.last)
        return Features(policy, policy if self.value_torso is None else self._through(self.value_torso, x, seen.last))

    def _outputs(self, features: Features) -> Outputs:
        policy = self.policy(features.policy)
        if self.log_std is not None:
            policy = torch.cat([policy, self.log_std.expand_as(policy)], dim=-1)
        return Outputs(policy, self.value(features.value).squeeze(-1))


class QValues(NamedTuple):
    q: torch.Tensor
    """[N, A], Q of each action"""


class QNetwork(Body):
    """Q of each action: one linear layer, or with `dueling` V + A - mean A, of a layer for V and one for A.

    Source: Wang et al. 2016 (arXiv 1511.06581), eq. 9; there each of the two has a hidden layer of its own.
    """

    def __init__(self, config: QLearningConfig, spaces: Spaces, generator: torch.Generator | None) -> None:
        super().__init__(config, spaces, generator)
        self.q = linear(self.width, spaces.num_actions, 1.0, generator)
        self.value = linear(self.width, 1, 1.0, generator) if config.dueling else None

    def forward(self, seen: Inputs) -> torch.Tensor:
        """[N, A] of N rows; networks without a core only."""
        return self._outputs(self._features(seen))

    def step(self, obs: torch.Tensor, state: State) -> tuple[QValues, State]:
        """As `ActorCritic.step`."""
        seen, state = inputs.of_step(self._spaces, obs, state)
        features = self._features(seen)
        if self.core is not None:
            features, carried = self.core.step(features, state)
            state = state | carried
        return QValues(self._outputs(features)), state

    def unroll(self, batch: Batch, burn_in: int = 0) -> torch.Tensor:
        """[(T+1)·B + K, A] of the rows of `inputs.of_batch`; no gradient flows through the first `burn_in` of T+1."""
        seen, warm = inputs.of_batch(self._spaces, batch), burn_in * batch.obs.shape[1]
        features = self._features(seen.at(slice(warm, None)))
        if burn_in:
            with torch.no_grad():
                before = self._features(seen.at(slice(warm)))
            features = torch.cat([before, features])
        if self.core is not None:
            features = self._unrolled(self.core, features, batch, burn_in)
        return self._outputs(features)

    def _features(self, seen: Inputs) -> torch.Tensor:
        return self._through(self.torso, self._numbers(seen.obs), seen.last)

    def _outputs(self, features: torch.Tensor) -> torch.Tensor:
        q: torch.Tensor = self.q(features)
        return q if self.value is None else self.value(features) + q - q.mean(-1, keepdim=True)
