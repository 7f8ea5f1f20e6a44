"""`paced_envs:Paced-v0`: each step takes SLOW_S in processes whose node's name says slow, and no time in others."""

import sys
import time
from typing import Any

import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv

SLOW_S = 0.03


class Paced(CartPoleEnv):
    _slow = any("slow-" in word for word in sys.argv)

    def step(self, action: Any) -> Any:
        if self._slow:
            time.sleep(SLOW_S)
        return super().step(action)


gym.register("Paced-v0", Paced, max_episode_steps=200)
