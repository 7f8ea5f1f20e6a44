"""PPO: several passes over one round of unrolls, each step bounded by its distance from the policy that played them.

    δ_t = r_t + γ V_old(successor of row t) - V_old(s_t),  Â by GAE,  R = Â + V_old: once per update
    r = π(a|s)/π_old(a|s)
    L = -min(r Â, clip(r, 1-ε, 1+ε) Â) + c_v ½ (R - V)² - β H[π]

π_old and V_old are what the actors recorded; actors and learner go in lock-step, so that no unroll is older than the
weights that the passes begin with. A minibatch is all rows of some columns: a recurrent agent needs them in sequence,
and their number does not depend on how many rows there are.

Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv 1707.06347); details that it leaves out
after Huang et al. 2022, "The 37 Implementation Details of PPO", and its code, CleanRL's ppo.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from numpy.typing import NDArray

from ddrl_bus.algos import policy_gradient, returns
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.config import PolicyGradientConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.policy_gradient import PolicyGradient
from ddrl_bus.algos.rewards import learnt_reward
from ddrl_bus.algos.spaces import Spaces

AdvantageNorm = Literal["minibatch", "batch", "none"]


@dataclass(frozen=True, kw_only=True)
class PpoConfig(PolicyGradientConfig):
    """Settings of PPO. CleanRL's for classic control, at reward scale 1: batch 4, unroll 128, 4 epochs of 4
    minibatches, Adam with lr 2.5e-4 annealed and ε 1e-5, λ .95, clip .2, value clip .2, value .5, entropy .01, clip
    norm .5, tanh, a stack of layers each for policy and value. DD-PPO's (arXiv 1911.00357, habitat-lab), of each
    worker: batch 4, unroll 128, 2 epochs of 2 minibatches, lr 2.5e-4, entropy .01, clip norm .2, advantages as they
    are."""

    batch: int = 64
    """B, columns per update: actors × envs, one round of all [tuned]"""
    epochs: int = 4
    """passes over the batch; CleanRL"""
    minibatches: int = 4
    """gradient steps per epoch, on B / minibatches columns each; CleanRL"""
    clip: float = 0.2
    """ε: how far the surrogate lets π/π_old leave 1; paper"""
    value_clip: float = 0.0
    """how far V may leave V_old before the value loss stops pushing it, in units of scaled reward. 0: no limit [tuned];
    CleanRL has .2 at reward scale 1"""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation; paper"""
    advantage_norm: AdvantageNorm = "minibatch"
    """brings advantages to mean 0 and standard deviation 1: of each minibatch, as CleanRL; of the whole batch, once;
    none, as DD-PPO"""
    kl_stop: float = 0.0
    """KL(π_old ‖ π) in nats, of an epoch's last minibatch, above which the update leaves its other epochs out. 0:
    never, as CleanRL; Spinning Up has .015"""
    preempt: float = 0.0
    """share of the workers that must have played their rollouts for the others to end theirs early, with links.tally.
    DD-PPO has .6; 0: never"""
    preempt_after: float = 0.25
    """share of its rollout that a worker plays in any case; habitat-lab"""
    entropy_cost: float = 0.01
    """weight of the policy's entropy, per nat, against normalised advantages; CleanRL. Less where advantage_norm is
    none: then it is against scaled rewards"""
    max_grad_norm: float = 0.5
    """global norm that gradients are clipped to; CleanRL"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.epochs >= 1, "epochs", "at least 1")
        self.need(1 <= self.minibatches <= self.batch, "minibatches", f"from 1 to batch, {self.batch}")
        self.need(0 < self.clip < 1, "clip", "a number above 0 and below 1")
        self.need(0 <= self.gae_lambda <= 1, "gae_lambda", "a number from 0 to 1")
        self.need(0 <= self.preempt <= 1, "preempt", "a number from 0 to 1")
        self.need(0 < self.preempt_after <= 1, "preempt_after", "a number above 0 and at most 1")
        for name in ("value_clip", "kl_stop"):
            self.need(getattr(self, name) >= 0, name, "a number not below 0")
        norms = get_args(AdvantageNorm)
        self.need(self.advantage_norm in norms, "advantage_norm", f"one of {', '.join(norms)}")


class Ppo(PolicyGradient[PpoConfig]):
    """Replicas that train together come equally often to what they pool: gradients, moments of advantages, the KL."""

    name = "ppo"
    acting = "float16"
    Config = PpoConfig
    wiring = policy_gradient.LOCK_STEP

    def __init__(self, config: PpoConfig, spaces: Spaces, *, seed: int, device: str = "cpu") -> None:
        super().__init__(config, spaces, seed=seed, device=device)
        self._kl = torch.zeros(1)  # [T, B] of the newest minibatch

    @classmethod
    def least_rows(cls, config: PpoConfig) -> int:
        if not config.preempt:
            return config.unroll
        return max(1, math.ceil(config.preempt_after * config.unroll - 1e-9))  # .07 of 100 are 7, which floats exceed

    @classmethod
    def record(cls, config: PpoConfig, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        return super().record(config, spaces) | {"value": ("float32", ())}

    @classmethod
    def act(
        cls,
        config: PpoConfig,
        spaces: Spaces,
        outputs: Mapping[str, NDArray[Any]],
        noise: Noise,
        explore: Explore | None,
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        action, record = super().act(config, spaces, outputs, noise, explore)
        return action, record | {"value": outputs["value"]}

    def passes(self, batch: Batch) -> Iterable[Batch]:
        """Minibatches, epoch after epoch, until the policy has strayed too far."""
        config = self.config
        batch = self._with_advantages(batch)
        for epoch in range(config.epochs):
            if epoch and config.kl_stop and float(self.pooled_mean(self._kl)) > config.kl_stop:  # waits for a GPU
                return
            minibatches = self._minibatches(batch)
            yield from self._normalised(minibatches) if config.advantage_norm == "minibatch" else minibatches

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of a minibatch of `passes`."""
        config, record = self.config, batch.record
        policy, value, _ = self.net.unroll(batch)
        pi, old = self.head.of(policy), self.head.of(record["policy"])
        ratio = torch.exp(pi.log_prob(batch.action) - old.log_prob(batch.action))
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        policy_loss = -torch.minimum(ratio * record["advantage"], clipped * record["advantage"])
        error = (record["target"] - value).square()
        if config.value_clip:
            near = record["value"] + (value - record["value"]).clamp(-config.value_clip, config.value_clip)
            error = torch.maximum(error, (record["target"] - near).square())
        value_loss = 0.5 * error
        entropy = pi.entropy()
        loss = policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy
        with torch.no_grad():
            self._kl = old.kl(pi)
        return policy_gradient.reduced(loss, config), {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "value": value,
            "kl": self._kl,
            "rho": ratio,
            "ratio_clipped": ratio.detach() != clipped.detach(),
        }

    # ---- the batch

    def _with_advantages(self, batch: Batch) -> Batch:
        """`batch` that records each row's advantage and value target, too."""
        config, value = self.config, batch.record["value"]
        with torch.no_grad():  # the actors had no value of final observations and of the bootstrap row
            successor = self.net.unroll(batch).successor
        successor[:-1] = torch.where(batch.truncated[:-1], successor[:-1], value[1:])
        advantage = returns.gae(
            learnt_reward(batch.reward, config),
            value,
            successor,
            batch.terminated,
            batch.truncated,
            gamma=config.gamma,
            lam=config.gae_lambda,
        )
        batch = replace(batch, record=batch.record | {"advantage": advantage, "target": advantage + value})
        return self._normalised([batch])[0] if config.advantage_norm == "batch" else batch

    def _minibatches(self, batch: Batch) -> list[Batch]:
        """Always `minibatches` of them, of all rows of columns drawn without replacement."""
        order = torch.randperm(batch.reward.shape[1], generator=self.generator).to(self.device)
        return [_of_columns(batch, columns) for columns in order.tensor_split(self.config.minibatches)]

    def _normalised(self, batches: list[Batch]) -> list[Batch]:
        """Each with advantages of mean 0 and standard deviation 1, over the rows that all replicas have of it."""
        advantages = [batch.record["advantage"].double() for batch in batches]  # sums of squares cancel
        moments = [torch.stack([x.sum(), x.square().sum(), torch.ones_like(x).sum()]) for x in advantages]
        normalised = []
        for batch, x, (total, squares, n) in zip(batches, advantages, self.pooled(torch.stack(moments)), strict=True):
            variance = (squares - total * total / n) / (n - 1).clamp(min=1)
            normal = (x - total / n) / (variance.clamp(min=0).sqrt() + 1e-8)
            normalised.append(replace(batch, record=batch.record | {"advantage": normal.float()}))
        return normalised


def _of_columns(batch: Batch, columns: torch.Tensor) -> Batch:
    """Without final observations: nobody asks a minibatch for values of successors."""
    return replace(
        batch,
        obs=batch.obs[:, columns],
        action=batch.action[:, columns],
        reward=batch.reward[:, columns],
        terminated=batch.terminated[:, columns],
        truncated=batch.truncated[:, columns],
        record={name: array[:, columns] for name, array in batch.record.items()},
        version=batch.version[:, columns],
        final_obs=batch.final_obs[:0],
        final_index=batch.final_index[:0],
        state={name: array[columns] for name, array in batch.state.items()},
    )
