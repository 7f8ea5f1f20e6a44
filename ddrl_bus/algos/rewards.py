"""Rewards as rules learn from them."""

from __future__ import annotations

from ddrl_bus.algos.base import Array
from ddrl_bus.algos.config import AgentConfig
from ddrl_bus.algos.lazy import library


def learnt_reward(reward: Array, config: AgentConfig) -> Array:
    """Clipped, then scaled.  Shapes: any, the same; numpy or torch."""
    lib = library(reward)
    match config.reward_clip:
        case "sign":
            reward = lib.sign(reward)
        case "one":
            reward = reward.clip(-1, 1)
        case "soft_asymmetric":
            squeezed = lib.tanh(reward / 5.0)
            reward = 5.0 * lib.where(reward < 0, 0.3 * squeezed, squeezed)
    return reward * config.reward_scale
