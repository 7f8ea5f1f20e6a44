"""What an agent carries from step to step: frames to stack, a recurrent core's state, its last action and reward.

All of it is a `State`: {name: [N, ...]}, zero at the start of an episode. An unroll carries the state before its first
row; the learner makes the later ones anew.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.config import AgentConfig
from ddrl_bus.algos.spaces import Spaces

State = dict[str, NDArray[Any]]

FRAMES: Final = "frames"
"""[N, stack - 1, ...] the observations before this one, oldest first"""
LAST_ACTION: Final = "last_action"
"""[N] int64, 1 + the last action, 0 where there was none; or [N, D] float32"""
LAST_REWARD: Final = "last_reward"
"""[N] float32, clipped to ±1"""
CORES: Final = {"none": (), "lstm": ("h", "c"), "gru": ("h",)}
"""Recurrent core → names of its states, each [N, core_size] float32."""


def spec(config: AgentConfig, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape of one environment's)} of what an agent of these settings carries; {} for most."""
    carried: dict[str, tuple[str, tuple[int, ...]]] = {}
    if spaces.stack > 1:
        carried[FRAMES] = (spaces.obs_dtype, (spaces.stack - 1, *spaces.obs_shape))
    for name in CORES[config.core]:
        carried[name] = ("float32", (config.core_size,))
    if config.last_inputs:
        carried[LAST_ACTION] = (spaces.action_dtype, spaces.action_shape)
        carried[LAST_REWARD] = ("float32", ())
    return carried


def initial(config: AgentConfig, spaces: Spaces, n: int) -> State:
    """The state at the start of `n` episodes."""
    return {name: np.zeros((n, *shape), dtype) for name, (dtype, shape) in spec(config, spaces).items()}


def carry(state: State, action: NDArray[Any], reward: NDArray[Any], ended: NDArray[np.int64]) -> State:
    """The state before the next step: what a policy's `act` left, what came of it, and zeros where episodes ended.

    Shapes: action [N] or [N, D], reward [N], ended [K] environments whose episode is over. `state` is written to.
    """
    if LAST_ACTION in state:
        state[LAST_ACTION] = action + 1 if action.dtype.kind == "i" else action.copy()
        state[LAST_REWARD] = reward.clip(-1, 1)
    if len(ended):
        for array in state.values():
            array[ended] = 0
    return state
