"""What a policy is: observations in, actions and what to record out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.memory import State
from ddrl_bus.errors import UsageError


class Explore(NamedTuple):
    """What exploration depends on besides the network's outputs."""

    place: NDArray[np.float32]
    """[N] of each environment among all that the run's actors step, from 0 to 1; it keeps it for life"""
    env_steps: int = 0
    """that the acting weights were trained on"""


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

    def act(self, obs: NDArray[Any], state: State, explore: Explore | None) -> Acted:
        """One step of N environments; greedily without `explore`.  Shapes: obs [N, ...]."""


def fitting(weights: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """`weights[name]`.  Raises: UsageError if it is missing or of another shape."""
    found = weights[name].shape if name in weights else None
    if found != shape:
        raise UsageError(f"weights: {name} has shape {found}, expected {shape}")
    return weights[name]
