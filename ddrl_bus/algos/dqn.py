"""DQN as Ape-X has it, double, dueling, with n steps and priorities; without these it is Gorila's.

The item of replay is a window of n rows. Its first row is trained on; the rest say what came of it, to the first end.

Sources: Horgan et al. 2018, "Distributed Prioritized Experience Replay" (arXiv 1803.00933); Nair et al. 2015,
"Massively Parallel Methods for Deep Reinforcement Learning" (Gorila, arXiv 1507.04296). First priorities come from the
actor's own Q, so that what is new is not drawn for being new.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import inputs
from ddrl_bus.algos.base import Array, Batch, Windows
from ddrl_bus.algos.config import QLearningConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.q_learning import QLearning


@dataclass(frozen=True, kw_only=True)
class DqnConfig(QLearningConfig):
    """Settings of DQN. Published for Atari, at reward scale 1, rewards clipped to ±1:
    Ape-X (paper): n 3, batch 512, rmsprop_centred with lr 6.25e-5, rms_decay .95 and ε 1.5e-7, clip norm 40, target
    every 2500 updates, α .6, β .4, ε .4 with spread 7;
    Gorila (paper): n 1, not double, not dueling, α 0, adagrad, ε from 1 to .1 over 1M updates with spread 0, target
    every 60,000 of the server's updates."""

    unroll: int = 16
    """new env steps per message and environment; each begins a window of n_step rows"""
    batch: int = 128
    """B, windows per update; Ape-X has 512"""

    def __post_init__(self) -> None:
        super().__post_init__()
        why = "a window begins anywhere in an unroll, and what an agent carries is kept for its first row"
        self.need(self.core == "none", "core", f"none ({why}; r2d2 learns with a core)")
        self.need(not self.last_inputs, "last_inputs", f"false ({why})")


class Dqn(QLearning[DqnConfig]):
    name = "dqn"
    acting = "float16"
    Config = DqnConfig

    @classmethod
    def windows(cls, config: DqnConfig) -> Windows:
        n = config.n_step
        return Windows(config.unroll + n, n, n, config.unroll, config.alpha, config.beta)

    @classmethod
    def priorities(
        cls, config: DqnConfig, rows: Mapping[str, NDArray[Any]], record: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        return cls.acting_errors(config, rows, record)[: config.unroll]

    @classmethod
    def priority(cls, config: DqnConfig, errors: Array) -> Array:
        return errors[0]

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        reward, seen = batch.reward, inputs.of_batch(self.spaces, batch)
        columns = reward.shape[1]
        over = (batch.terminated | batch.truncated).cumsum(0) > 0
        last = (~over).sum(0).clamp(max=len(reward) - 1)  # row of the first end, or of the window
        with torch.no_grad():
            later = seen.at(inputs.successors(batch).gather(0, last.unsqueeze(0))[0])
            target_q = self.target(later)
            best = self.best(self.net(later) if self.config.double else target_q, target_q)
            target = self.targets(self.config, reward, best.expand_as(reward), batch.terminated, batch.truncated)[:1]
        chosen = self.net(seen.at(slice(columns))).gather(1, batch.action[0].unsqueeze(1))
        return self.weighted(chosen.t(), target, batch)
