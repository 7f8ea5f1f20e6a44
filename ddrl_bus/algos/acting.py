"""Which policy acts for an algorithm: in numpy where that is possible, else in torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.policy import Policy
from ddrl_bus.algos.spaces import Spaces


def make_policy(
    algorithm: type[Algorithm[Any]],
    config: Any,
    spaces: Spaces,
    seed: int | np.random.SeedSequence,
    device: str = "cpu",
) -> Policy:
    """The policy of `algorithm` in these spaces. Until weights are loaded all of them are zero.

    Args:
        device: `cpu`, `cuda` or `auto`, for networks that act in torch; others act in numpy, on the CPU.

    Raises: UsageError where the algorithm or its network does not cover the spaces.
    """
    flat = len(spaces.obs_shape) == 1 and spaces.stack == 1 and config.net in ("auto", "mlp")
    if flat and (heads := algorithm.numpy_heads(config, spaces)):
        from ddrl_bus.algos.numpy_policy import NumpyPolicy

        return NumpyPolicy(algorithm, config, spaces, seed, heads)
    from ddrl_bus.algos.torch_policy import TorchPolicy  # imports torch for real

    return TorchPolicy(algorithm, config, spaces, seed, device)
