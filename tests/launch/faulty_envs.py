"""Environments that misbehave: `faulty_envs:Raises-v0`, with this folder on the path."""

from typing import Any

import gymnasium as gym
import numpy as np


class Raises(gym.Env[Any, Any]):
    """Raises in its fifth step."""

    observation_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 5:
            raise RuntimeError("the simulator lost its licence")
        return np.zeros(4, np.float32), 1.0, False, False, {}


gym.register("Raises-v0", Raises)
