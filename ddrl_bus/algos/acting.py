"""Policies: observations in, actions and what to record out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.memory import State
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError


class Acted(NamedTuple):
    """`action` and `record` are valid until the next `act`: whoever keeps them copies them."""

    action: NDArray[Any]
    """[N] int64 or [N, D] float32"""
    record: dict[str, NDArray[Any]]
    """{name: [N, ...]}, as the algorithm's `record` declares"""
    state: State
    """what the agent carries on, to be completed by `memory.carry`; {} for most"""


class Policy(Protocol):
    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Acts by `weights` from now on; the arrays may be read-only views of a message.

        Raises: UsageError if a name is missing or a shape is another.
        """

    def initial_state(self, n: int) -> State:
        """What the agent carries at the start of n episodes; {} for most."""

    def act(self, obs: NDArray[Any], state: State, *, greedy: bool = False) -> Acted:
        """One step of N environments.  Shapes: obs [N, ...]."""


def make_policy(
    algorithm: type[Algorithm[Any]],
    config: Any,
    spaces: Spaces,
    seed: int | np.random.SeedSequence,
    device: str = "cpu",
) -> Policy:
    """The policy of `algorithm` in these spaces. It acts uniformly until weights are loaded (all weights are zero).

    Args:
        device: `cpu`, `cuda` or `auto`, for networks that act in torch; others act in numpy, on the CPU.

    Raises: UsageError where the algorithm or its network does not cover the spaces.
    """
    if _has_numpy_forward(algorithm, config, spaces):
        from ddrl_bus.algos.numpy_policy import NumpyPolicy

        return NumpyPolicy(algorithm, config, spaces, seed)
    from ddrl_bus.algos.torch_policy import TorchPolicy  # imports torch for real

    return TorchPolicy(algorithm, config, spaces, seed, device)


def _has_numpy_forward(algorithm: type[Algorithm[Any]], config: Any, spaces: Spaces) -> bool:
    flat = len(spaces.obs_shape) == 1 and spaces.stack == 1 and config.net in ("auto", "mlp")
    return flat and (config.shared_torso or "value" not in algorithm.record(config, spaces))


def fitting(weights: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """`weights[name]`.  Raises: UsageError if it is missing or of another shape."""
    found = weights[name].shape if name in weights else None
    if found != shape:
        raise UsageError(f"weights: {name} has shape {found}, expected {shape}")
    return weights[name]
