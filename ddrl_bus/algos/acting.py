"""Policies: observations in, actions and what to record out, in numpy.

A forward of a small MLP costs tens of microseconds in numpy and several times that in torch, and an actor that needs no
torch starts in a fraction of the time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError

State = dict[str, NDArray[Any]]
_ACTIVATIONS: dict[str, Callable[..., Any]] = {"tanh": np.tanh, "relu": lambda x, out: np.maximum(x, 0, out=out)}


class Acted(NamedTuple):
    """`action` and `record` are valid until the next `act`: whoever keeps them copies them."""

    action: NDArray[Any]
    """[N] int64 or [N, D] float32"""
    record: dict[str, NDArray[Any]]
    """{name: [N, ...]}, as the algorithm's `record` declares"""
    state: State
    """the recurrent state after this step"""


class Policy(Protocol):
    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Acts by `weights` from now on; the arrays may be read-only views of a message.

        Raises: UsageError if a name is missing or a shape is another.
        """

    def initial_state(self, n: int) -> State:
        """The state at the start of n episodes; {} for feed-forward networks."""

    def act(self, obs: NDArray[Any], state: State, *, greedy: bool = False) -> Acted:
        """One step of N environments.  Shapes: obs [N, ...]."""


class MlpPolicy:
    """The policy stack of `nets.Mlp`, equal to it to 1e-5.

    It works on [features, N], one column per environment. Each layer's input keeps a last row of ones, so that the
    bias is one more column of the weights, and a layer is one matrix product and one activation into buffers that
    are kept between calls.
    """

    def __init__(
        self, algorithm: type[Algorithm[Any]], config: Any, spaces: Spaces, seed: int | np.random.SeedSequence
    ) -> None:
        self._algorithm, self._config, self._noise = algorithm, config, Noise(seed)
        self._activation = _ACTIVATIONS[config.activation]
        widths = [spaces.obs_shape[0], *config.hidden, spaces.num_actions]
        names = [f"torso.{i}" for i in range(len(config.hidden))] + ["policy"]
        self._shapes = {name: (o, i) for name, i, o in zip(names, widths[:-1], widths[1:], strict=True)}
        self._layers = [np.zeros((o, i + 1), np.float32) for o, i in self._shapes.values()]
        self._buffers(0)

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        for layer, (name, shape) in zip(self._layers, self._shapes.items(), strict=True):
            for part, expected in ((f"{name}.weight", shape), (f"{name}.bias", shape[:1])):
                found = weights[part].shape if part in weights else None
                if found != expected:
                    raise UsageError(f"weights: {part} has shape {found}, expected {expected}")
            layer[:, :-1] = weights[f"{name}.weight"]
            layer[:, -1] = weights[f"{name}.bias"]

    def initial_state(self, n: int) -> State:
        return {}

    def act(self, obs: NDArray[Any], state: State, *, greedy: bool = False) -> Acted:
        if len(obs) != self._n:
            self._buffers(len(obs))
        self._input[...] = obs.T
        for layer, (x, y) in zip(self._layers, self._hidden, strict=False):
            self._activation(np.dot(layer, x, out=y), out=y)
        np.dot(self._layers[-1], self._last, out=self._logits)
        action, record = self._algorithm.act(self._config, self._outputs, self._noise, greedy)
        return Acted(action, record, state)

    def _buffers(self, n: int) -> None:
        ones = [np.ones((layer.shape[1], n), np.float32) for layer in self._layers]
        self._n, self._input, self._last = n, ones[0][:-1], ones[-1]
        self._hidden = [(x, y[:-1]) for x, y in pairwise(ones)]
        self._logits = np.empty((len(self._layers[-1]), n), np.float32)
        self._outputs = {"logits": self._logits.T}


def make_policy(
    algorithm: type[Algorithm[Any]], config: Any, spaces: Spaces, seed: int | np.random.SeedSequence
) -> Policy:
    """The policy of `algorithm` in these spaces. It acts uniformly until weights are loaded (all weights are zero).

    Raises: UsageError where there is no numpy forward for the network, or the algorithm does not cover the spaces.
    """
    algorithm.record(config, spaces)
    if len(spaces.obs_shape) != 1:
        raise UsageError(f"no policy for observations of shape {spaces.obs_shape} yet: only flat ones, (features,)")
    return MlpPolicy(algorithm, config, spaces, seed)
