"""A2C, and with it A3C and GA3C: one rule over three wirings.

    R_t = Σ_{k<m} γ^k r_{t+k} + γ^m V(successor of row t+m-1), m rows to the end of the unroll or of the episode
    L = -log π(a|s)·sg(R - V) + c_v (R - V)² - β H[π]

Nothing corrects for staleness here, so the wiring decides how sound the rule is. A2C (openai/baselines): every actor
acts with θ_k, the learner waits for all of them, makes one update, and an unroll of another version is discarded.
A3C (Mnih et al. 2016, arXiv 1602.01783): workers act and differentiate at the θ they pulled, and a server applies
each gradient at once, to what θ has become. GA3C (Babaeizadeh et al. 2017, arXiv 1611.06256): one θ acts and a
slightly newer one is differentiated; `log_eps` keeps log π finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddrl_bus.algos import policy_gradient, returns
from ddrl_bus.algos.base import Batch
from ddrl_bus.algos.config import PolicyGradientConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.policy_gradient import PolicyGradient
from ddrl_bus.algos.rewards import learnt_reward


@dataclass(frozen=True, kw_only=True)
class A2CConfig(PolicyGradientConfig):
    """Settings of A2C, A3C and GA3C. Published for Atari, at reward scale 1:
    A2C (openai/baselines): unroll 5, rmsprop_tf with lr 7e-4 annealed and ε 1e-5, entropy .01, value .5, clip norm .5;
    A3C (paper, and its first author's settings): unroll 5 of 16 workers, sums, rewards clipped to ±1, rmsprop_tf with
    lr 7e-4 annealed and ε .1, entropy .01, value .5, no clipping of the norm;
    GA3C (NVlabs/GA3C): as A3C with lr 3e-4 and log_eps 1e-6."""

    batch: int = 64
    """B, columns per update; A2C: actors × envs, one round of all"""
    lr: float = 3e-3
    """learning rate [tuned] for mean losses and Adam, annealed over the run; without annealing rather 1e-3"""
    value_cost: float = 0.25
    """weight of the value loss, which has no ½ of its own [tuned]; .5 in the papers"""
    gae_lambda: float = 1.0
    """λ of generalised advantage estimation; 1 is the n-step return of all three papers, to the end of the unroll"""
    log_eps: float = 0.0
    """takes log max(π, log_eps) for log π, which has no gradient below; 0 is off, GA3C has 1e-6"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(0 <= self.gae_lambda <= 1, "gae_lambda", "a number from 0 to 1")
        self.need(0 <= self.log_eps < 1, "log_eps", "a number from 0 to below 1")


class A2C(PolicyGradient[A2CConfig]):
    name = "a2c"
    Config = A2CConfig
    wiring = policy_gradient.LOCK_STEP

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        policy, value, successor = self.net.unroll(batch)
        pi = self.head.of(policy)
        log_prob = pi.log_prob(batch.action)
        advantage = returns.gae(  # with λ = 1 it is R - V
            learnt_reward(batch.reward, config),
            value,
            successor,
            batch.terminated,
            batch.truncated,
            gamma=config.gamma,
            lam=config.gae_lambda,
        )
        with torch.no_grad():
            target = advantage + value
            ratio = torch.exp(log_prob - self.head.of(batch.record["policy"]).log_prob(batch.action))
        if config.log_eps:
            log_prob = log_prob.clamp(min=math.log(config.log_eps))
        policy_loss = -advantage * log_prob
        value_loss = (target - value).square()  # no ½: it is in the published value_cost
        entropy = pi.entropy()
        loss = policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy
        return policy_gradient.reduced(loss, config), {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "value": value,
            "rho": ratio,  # 1 where no actor lags
        }
