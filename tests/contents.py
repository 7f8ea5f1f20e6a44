"""What a replay buffer holds, for tests that compare it."""

from __future__ import annotations

import numpy as np

from ddrl_bus.replay_buffer import ReplayBuffer
from ddrl_bus.transport.wire import Array


def contents(buffer: ReplayBuffer) -> dict[str, Array]:
    """All of it, as a checkpoint would give it back."""
    snapshot = buffer.snapshot()
    obs = np.concatenate([np.empty((0, *snapshot.shape[1:]), snapshot.dtype), *snapshot.obs()])
    buffer.release()
    return {**snapshot.arrays, "ring.obs": obs}
