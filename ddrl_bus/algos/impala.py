"""IMPALA: actors send unrolls, one learner trains on them a little later, V-trace corrects for the difference.

Source: Espeholt et al. 2018, "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures" (arXiv 1802.01561), and its code, deepmind/scalable_agent. Each actor takes the latest weights before
an unroll of T steps; the learner takes B columns first come, first served, with no barrier. The lag is the number of
the learner's updates between the two. SEED RL and TorchBeast learn by the same rule over other wirings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ddrl_bus.algos import policy_gradient, returns
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.config import PolicyGradientConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.policy_gradient import PolicyGradient
from ddrl_bus.algos.rewards import learnt_reward


@dataclass(frozen=True, kw_only=True)
class ImpalaConfig(PolicyGradientConfig):
    """Settings of IMPALA and of those who learn by its rule. Published, at reward scale 1, lr annealed over the run:
    IMPALA (paper, Atari): unroll 20, batch 32, sums, rmsprop_tf with lr 6e-4 and ε .01 to .1, entropy .01, clip norm
    40, rewards clipped to ±1;
    TorchBeast (monobeast): unroll 80, batch 8, sums, rmsprop with lr 4.8e-4 and ε .01, entropy .0006, clip norm 40,
    rewards clipped to ±1;
    SEED RL: unroll 100, batch 32, means, adam with lr 4.8e-4, adam_beta1 0 and ε 3.125e-7, entropy .00025."""

    lam: float = 1.0
    """λ, multiplies the trace coefficients c of V-trace: 1 is the paper's estimator, less trades variance for bias"""
    rho_bar: float = 1.0
    """ρ̄, clips the importance weights of the TD errors and the policy gradient; sets the policy that V is of; paper"""
    c_bar: float = 1.0
    """c̄ ≤ ρ̄, clips the traces: speed of convergence only, not its limit; paper"""
    correct: bool = True
    """off: all importance weights are 1, as if no actor lagged; for experiments on staleness"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(0 <= self.lam <= 1, "lam", "a number from 0 to 1")
        for name in ("rho_bar", "c_bar"):
            self.need(getattr(self, name) > 0, name, "a number above 0")
        self.need(self.c_bar <= self.rho_bar, "c_bar", f"at most rho_bar, {self.rho_bar}")


class Impala(PolicyGradient[ImpalaConfig]):
    name = "impala"
    acting = "float16"
    Config = ImpalaConfig
    wiring: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 2},
        "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
    }

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        policy, value, successor = self.net.unroll(batch)
        pi = self.head.of(policy)
        log_prob = pi.log_prob(batch.action)
        with torch.no_grad():
            ratio = torch.exp(log_prob - self.head.of(batch.record["policy"]).log_prob(batch.action))
            targets = returns.vtrace(
                ratio if config.correct else torch.ones_like(ratio),
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
        policy_loss = -(targets.rho * targets.advantage) * log_prob
        value_loss = 0.5 * (targets.target - value).square()
        entropy = pi.entropy()
        loss = policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy
        return policy_gradient.reduced(loss, config), {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "value": value,
            "rho": ratio,
            "rho_clipped": ratio > 1.001 * config.rho_bar,  # the same policy differs by rounding
            "c_clipped": ratio > 1.001 * config.c_bar,
        }
