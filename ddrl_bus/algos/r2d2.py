"""R2D2: recurrent Q-learning from replayed sequences, with the state that the actor had before their first row.

    burn_in rows ─→ states of both networks, as they are now     no gradient
    unroll rows  ─→ Q, n-step targets within them, h-rescaled    trained on

Source: Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning" (ICLR 2019). There
sequences stay within an episode; here, as in SEED RL (Espeholt et al. 2020, arXiv 1910.06591), they run over episodes'
ends, which cut targets and zero states. A target that the sequence's end cuts short has fewer than n steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import inputs
from ddrl_bus.algos.base import Array, Batch, Windows
from ddrl_bus.algos.config import Core, QLearningConfig
from ddrl_bus.algos.lazy import library, torch
from ddrl_bus.algos.q_learning import QLearning


@dataclass(frozen=True, kw_only=True)
class R2d2Config(QLearningConfig):
    """Settings of R2D2. Published for Atari, at reward scale 1, rewards not clipped:
    paper: unroll 80, burn-in 40, n 5, γ .997, batch 64, adam with lr 1e-4 and ε 1e-3, target every 2500 updates, α .9,
    β 0, η .9, rescaled values;
    SEED RL: unroll 100, burn-in 40, batch 64, lr 4.8e-4, β .6, clip norm 40.
    Here losses are means over a sequence's rows, there sums."""

    unroll: int = 40
    """rows of a sequence that are trained on, and new env steps per message; paper: 80"""
    burn_in: int = 20
    """rows before them that only lead to a state; the last rows of the sequence before. Paper: 40"""
    batch: int = 32
    """B, sequences per update; paper: 64"""
    n_step: int = 5
    """n, rows whose rewards a target sums; paper"""
    gamma: float = 0.997
    """discount per env step; paper"""
    alpha: float = 0.9
    """exponent of priorities: drawn with probability ∝ p^α; 0: uniformly. Paper"""
    beta: float = 0.6
    """exponent of the importance weights; Acme, SEED RL. The paper found no benefit, and has none: 0"""
    eta: float = 0.9
    """η: a sequence's priority is η · max + (1 - η) · mean of its |TD errors|; paper"""
    rescale: bool = True
    """Q is learnt as h(Q) = sign(Q)(√(|Q|+1) - 1) + .001 Q; paper"""
    reward_scale: float = 1.0
    """factor on rewards in learning, after `reward_clip`; `rescale` sees to the size of values"""
    core: Core = "lstm"
    """recurrent layer between torso and heads, zero at the start of an episode; none is the memoryless control"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.burn_in >= 0, "burn_in", "a number not below 0")
        self.need(0 <= self.eta <= 1, "eta", "a number from 0 to 1")


class R2d2(QLearning[R2d2Config]):
    name = "r2d2"
    acting = "float16"
    Config = R2d2Config

    @classmethod
    def windows(cls, config: R2d2Config) -> Windows:
        rows = config.burn_in + config.unroll
        return Windows(rows, config.burn_in, rows, 1, config.alpha, config.beta)

    @classmethod
    def priorities(
        cls, config: R2d2Config, rows: Mapping[str, NDArray[Any]], record: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        errors = cls.acting_errors(config, rows, record)[config.burn_in :]
        return np.asarray(cls.priority(config, errors)[None], np.float32)

    @classmethod
    def priority(cls, config: R2d2Config, errors: Array) -> Array:
        return config.eta * library(errors).amax(errors, 0) + (1 - config.eta) * errors.mean(0)

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        burn_in, (length, columns) = self.config.burn_in, batch.reward.shape
        q = self.net.unroll(batch, burn_in)
        with torch.no_grad():
            best = self.best(q, self.target.unroll(batch, burn_in))[inputs.successors(batch)]
            target = self.targets(self.config, batch.reward, best, batch.terminated, batch.truncated)
        chosen = q[: length * columns].view(length, columns, -1).gather(2, batch.action.unsqueeze(2)).squeeze(2)
        return self.weighted(chosen[burn_in:], target[burn_in:], batch)
