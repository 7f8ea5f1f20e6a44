"""APPO in the form of IMPACT: PPO's clipped surrogate around a target network, on V-trace advantages.

Three policies: μ acted, π_old is the target network, π is trained. V-trace corrects from μ to π_old, whose value the
critic therefore learns; the surrogate lets π leave π_old by 1 ± ε before it stops pushing, however old μ is.

    Â = v - V,  v the V-trace targets of the importance weights π_old/μ, from the values V that are being trained
    r = min(μ/π_old, r̄) · π/μ
    L = -min(r Â, clip(r, 1-ε, 1+ε) Â) + c_v ½ (v - V)² - β H[π] + c_kl KL(π_old ‖ π)

Source: Luo et al. 2020, "IMPACT: Importance Weighted Asynchronous Architectures with Clipped Target Networks" (arXiv
1912.00167), and RLlib's APPO. With λ = 1 and ρ̄ = c̄, Â is RLlib's ρ (r + γ v' - V); λ < 1 makes it GAE's. Plain PPO's
ratio to μ, several versions old, would neither bound the step nor leave the advantage unbiased.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ddrl_bus.algos import policy_gradient, returns
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.config import PolicyGradientConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.policy_gradient import PolicyGradient
from ddrl_bus.algos.rewards import learnt_reward
from ddrl_bus.algos.spaces import Spaces


@dataclass(frozen=True, kw_only=True)
class AppoConfig(PolicyGradientConfig):
    """Settings of APPO. RLlib's: clip .4, unroll 50 and 500 rows per update, Adam with lr 5e-4, value .5, entropy .01,
    clip norm 40, KL off."""

    batch: int = 64
    """B, columns per update"""
    clip: float = 0.2
    """ε: how far the surrogate lets π/π_old leave 1; RLlib has .4"""
    ratio_bar: float = 2.0
    """r̄, clips μ/π_old in the surrogate; RLlib"""
    passes: int = 4
    """K, gradient steps per batch that comes [tuned]; RLlib has 1"""
    buffer: int = 1
    """N, batches that the K passes are spread over: the newest and N - 1 before it. Each batch is trained on K times
    in all: at once if N is 1, as further ones come if it is more"""
    target_every: int = 1
    """updates after which the target network becomes a copy of the network; 1 is PPO's π_old; IMPACT: about K·N"""
    lam: float = 0.95
    """λ, multiplies the trace coefficients c of V-trace [tuned]; 1 in RLlib"""
    rho_bar: float = 1.0
    """ρ̄, clips the importance weights of the TD errors; IMPALA's"""
    c_bar: float = 1.0
    """c̄ ≤ ρ̄, clips the traces; IMPALA's"""
    kl_target: float = 0.0
    """KL(π_old ‖ π) in nats that the weight of the KL penalty is adapted to: ×1.5 above twice of it, ×.5 below half.
    0: no penalty. RLlib, where it is on: .01"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(0 < self.clip < 1, "clip", "a number above 0 and below 1")
        self.need(self.ratio_bar >= 1, "ratio_bar", "at least 1")
        self.need(0 <= self.lam <= 1, "lam", "a number from 0 to 1")
        self.need(0 < self.c_bar <= self.rho_bar, "c_bar", f"above 0 and at most rho_bar, {self.rho_bar}")
        for name in ("passes", "buffer", "target_every"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        self.need(self.passes % self.buffer == 0, "passes", f"a multiple of buffer, {self.buffer}")
        self.need(self.kl_target >= 0, "kl_target", "a number not below 0")


class Appo(PolicyGradient[AppoConfig]):
    name = "appo"
    acting = "float16"
    Config = AppoConfig
    wiring: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 2, "max_lag": 8},
        "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
    }

    def __init__(self, config: AppoConfig, spaces: Spaces, *, seed: int, device: str = "cpu") -> None:
        super().__init__(config, spaces, seed=seed, device=device)
        self.target: Any = copy.deepcopy(self.net).requires_grad_(False)
        self.kl: Any = torch.nn.Module()
        self.kl.register_buffer("cost", torch.ones((), device=self.device))
        self._measured_kl = torch.zeros(())
        self._older: deque[Batch] = deque(maxlen=config.buffer - 1)  # not saved: a resumed run begins without

    def networks(self) -> dict[str, Any]:
        return {"net": self.net, "target": self.target, "kl": self.kl}

    def passes(self, batch: Batch) -> Iterable[Batch]:
        """K batches, the newest first: each of those kept K/N times, so that a batch has had K when it leaves."""
        config = self.config
        if self.updates % config.target_every == 0:
            self.target.load_state_dict(self.net.state_dict())
        kept = [batch, *self._older]
        for k in range(config.passes):
            yield kept[min(k * config.buffer // config.passes, len(kept) - 1)]
        if config.buffer > 1:
            self._older.appendleft(batch.map(torch.clone))
        if config.kl_target:
            self._adapt_kl_cost()

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, action = self.config, batch.action
        policy, value, successor = self.net.unroll(batch)
        pi, mu = self.head.of(policy), self.head.of(batch.record["policy"])
        with torch.no_grad():
            old = self.head.of(self.target.unroll(batch).policy)
            log_rho = old.log_prob(action) - mu.log_prob(action)
            targets = returns.vtrace(
                torch.exp(log_rho),
                learnt_reward(batch.reward, config),
                value,
                successor,
                batch.terminated,
                batch.truncated,
                gamma=config.gamma,
                lam=config.lam,
                rho_bar=config.rho_bar,
                c_bar=config.c_bar,
            )
            advantage = targets.target - value
            # log of min(μ/π_old, r̄)/μ: as a product it could be 0·∞
            log_weight = (-log_rho).clamp(max=math.log(config.ratio_bar)) - mu.log_prob(action)
        ratio = torch.exp(log_weight + pi.log_prob(action))
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        policy_loss = -torch.minimum(ratio * advantage, clipped * advantage)
        value_loss = 0.5 * (targets.target - value).square()
        entropy, kl = pi.entropy(), old.kl(pi)
        loss = policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy
        if config.kl_target:
            loss = loss + self.kl.cost * kl
            self._measured_kl = kl.detach()
        return policy_gradient.reduced(loss, config), {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "value": value,
            "kl": kl,
            "kl_cost": self.kl.cost,
            "rho": log_rho.exp(),  # of the target policy, as V-trace has it
            "rho_clipped": log_rho > math.log(1.001 * config.rho_bar),  # the same policy differs by rounding
            "ratio_clipped": ratio.detach() != clipped.detach(),
        }

    def _adapt_kl_cost(self) -> None:
        """On the device: looking at the number would wait for the update."""
        relative = self.pooled_mean(self._measured_kl) / self.config.kl_target
        self.kl.cost *= torch.where(relative > 2, 1.5, torch.where(relative < 0.5, 0.5, 1.0))
        self.kl.cost.clamp_(1e-4, 1e4)  # from 0 it would never come back
