"""What agents carry from step to step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddrl_bus.algos import Spaces, memory
from ddrl_bus.algos.config import AgentConfig

FLAT = Spaces((3,), "float32", "discrete", 4)
SCREEN = Spaces((8, 9), "uint8", "discrete", 4, stack=4)
TORQUES = Spaces((3,), "float32", "continuous", 2, (-1.0, -1.0), (1.0, 1.0))
NOBODY = np.zeros(0, np.int64)


@pytest.mark.parametrize(
    ("spaces", "changes", "expected"),
    [
        (FLAT, {}, {}),
        (SCREEN, {}, {"frames": ("uint8", (3, 8, 9))}),
        (FLAT, {"core": "gru", "core_size": 5}, {"h": ("float32", (5,))}),
        (FLAT, {"core": "lstm", "core_size": 5}, {"h": ("float32", (5,)), "c": ("float32", (5,))}),
        (FLAT, {"last_inputs": True}, {"last_action": ("int64", ()), "last_reward": ("float32", ())}),
        (TORQUES, {"last_inputs": True}, {"last_action": ("float32", (2,)), "last_reward": ("float32", ())}),
    ],
)
def test_what_is_carried_starts_at_zero(spaces: Spaces, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = AgentConfig(**changes)
    assert memory.spec(config, spaces) == expected
    state = memory.initial(config, spaces, 7)
    assert {name: (array.dtype.name, array.shape[1:]) for name, array in state.items()} == expected
    assert all(len(array) == 7 and not array.any() for array in state.values())


@pytest.mark.parametrize("spaces", [FLAT, TORQUES])
def test_what_is_carried_keeps_its_type_and_copies(spaces: Spaces) -> None:
    config = AgentConfig(last_inputs=True, core="gru")
    state = memory.initial(config, spaces, 2)
    action = np.zeros((2, *spaces.action_shape), spaces.action_dtype)
    reward = np.array([5.0, -0.5], np.float32)
    carried = memory.carry(state, action, reward, NOBODY)
    action[...], reward[...] = 9, 9  # the policy's and the environment's buffers are used again
    types = {name: (array.dtype.name, array.shape[1:]) for name, array in carried.items()}
    assert types == memory.spec(config, spaces)
    assert carried["last_reward"].tolist() == [1.0, -0.5]
    assert (carried["last_action"] == (spaces is FLAT)).all()  # 0 is no action yet


def test_ends_of_episodes_empty_the_memory() -> None:
    config = AgentConfig(last_inputs=True, core="lstm")
    state = {name: np.ones_like(array) for name, array in memory.initial(config, SCREEN, 3).items()}
    carried = memory.carry(state, np.ones(3, np.int64), np.ones(3, np.float32), np.array([0, 2]))
    for array in carried.values():
        assert not array[[0, 2]].any()
        assert array[1].all()
