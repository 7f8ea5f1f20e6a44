"""Policies of flat observations, in numpy.

A forward of a small MLP costs tens of microseconds in numpy and several times that in torch, and an actor that needs no
torch starts in a fraction of the time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import memory
from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.memory import CORES, LAST_ACTION, LAST_REWARD, State
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_heads import NumpyHeads, load_linear
from ddrl_bus.algos.policy import Acted, Explore, fitting
from ddrl_bus.algos.spaces import Spaces

Array = NDArray[Any]
ACTIVATIONS: Final[dict[str, Callable[..., Any]]] = {
    "tanh": np.tanh,
    "relu": lambda x, out: np.maximum(x, 0, out=out),
}


class NumpyPolicy:
    """What of `nets` acts, with an MLP torso, equal to 1e-5.

    It works on [features, N], one column per environment. Each layer's input keeps a last row of ones, so that the
    bias is one more column of the weights, and a layer is one matrix product and one activation into buffers that
    are kept between calls. The heads are one layer.
    """

    def __init__(
        self,
        algorithm: type[Algorithm[Any]],
        config: Any,
        spaces: Spaces,
        seed: int | np.random.SeedSequence,
        heads: Callable[[int], NumpyHeads],
    ) -> None:
        self._algorithm, self._config, self._spaces, self._noise = algorithm, config, spaces, Noise(seed)
        self._activation = ACTIVATIONS[config.activation]
        widths = [spaces.obs_shape[0], *config.hidden]
        self._layers = [np.zeros((o, i + 1), np.float32) for i, o in pairwise(widths)]
        self._features = widths[-1]
        joint = self._features + (spaces.num_actions + 1 if config.last_inputs else 0)
        self._core = None if config.core == "none" else NumpyCore(config.core, joint, config.core_size)
        self._heads = heads(config.core_size if self._core else joint)
        self._choices = np.arange(1, spaces.num_actions + 1)[:, None]
        self._buffers(0)

    def load(self, weights: Mapping[str, Array]) -> None:
        for index, layer in enumerate(self._layers):
            load_linear(layer, weights, f"torso.{index}")
        if self._core:
            self._core.load(weights)
        self._heads.load(weights)

    def initial_state(self, n: int) -> State:
        return memory.initial(self._config, self._spaces, n)

    def act(self, obs: Array, state: State, explore: Explore | None) -> Acted:
        if len(obs) != self._n:
            self._buffers(len(obs))
        self._input[...] = obs.T
        for layer, (x, y) in zip(self._layers, self._hidden, strict=True):
            self._activation(np.dot(layer, x, out=y), out=y)
        if LAST_ACTION in state:
            last = state[LAST_ACTION].T
            self._last[:-1] = last if self._spaces.action_kind == "continuous" else last == self._choices
            self._last[-1] = state[LAST_REWARD]
        if self._core:
            state = self._core.step(self._joint, state)
            self._top[:-1] = state["h"].T
        np.dot(self._heads.matrix, self._top, out=self._out)
        action, record = self._algorithm.act(self._config, self._spaces, self._outputs, self._noise, explore)
        return Acted(action, record, state)

    def _buffers(self, n: int) -> None:
        fed = [*self._layers, *([self._core.matrix] if self._core else []), self._heads.matrix]
        ones = [np.ones((layer.shape[1], n), np.float32) for layer in fed]
        joint = len(self._layers)
        self._n, self._input = n, ones[0][: self._spaces.obs_shape[0]]
        self._hidden = [(x, y[: len(layer)]) for layer, (x, y) in zip(self._layers, pairwise(ones), strict=False)]
        self._joint, self._top = ones[joint], ones[-1]
        self._last = self._joint[self._features :][: self._spaces.num_actions + 1]
        self._out = np.empty((len(self._heads.matrix), n), np.float32)
        self._outputs = self._heads.outputs(self._out)


class NumpyCore:
    """One step of `cores.Core`. All gates are one product with [inputs, state, 1], and the sigmoids are made of the
    hyperbolic tangent: σ(x) = ½ + ½ tanh(x/2), the inner ½ being in the weights."""

    def __init__(self, kind: str, inputs: int, size: int) -> None:
        self._names, self._inputs, self._size = CORES[kind], inputs, size
        self.matrix = np.zeros((4 * size, inputs + size + 1), np.float32)

    def load(self, weights: Mapping[str, Array]) -> None:
        lstm, size, inputs = len(self._names) == 2, self._size, self._inputs
        rows = (4 if lstm else 3) * size
        shapes = {"weight_ih": (rows, inputs), "weight_hh": (rows, size), "bias_ih": (rows,), "bias_hh": (rows,)}
        w_x, w_h, b_x, b_h = (fitting(weights, f"core.rnn.{name}_l0", shape) for name, shape in shapes.items())
        x, h = np.zeros_like(self.matrix[:rows]), np.zeros_like(self.matrix[:rows])
        x[:, :inputs], x[:, -1] = w_x, b_x
        h[:, inputs:-1], h[:, -1] = w_h, b_h
        if lstm:  # gates i, f, g, o
            self.matrix[:] = x + h
            for gate in (0, 1, 3):
                self.matrix[gate * size :][:size] *= 0.5
        else:  # r, z, and the two parts of n, of which r weighs the second
            self.matrix[: 2 * size] = 0.5 * (x + h)[: 2 * size]
            self.matrix[2 * size :] = np.concatenate([x[2 * size :], h[2 * size :]])

    def step(self, joint: Array, state: State) -> State:
        """Shapes: joint [inputs + size + 1, N], whose state rows are written to."""
        before = {name: state[name].T for name in self._names}
        joint[self._inputs : -1] = before["h"]
        gates = (self.matrix @ joint).reshape(4, self._size, -1)
        if len(self._names) == 2:
            i, f, g, o = np.tanh(gates, out=gates)
            c = (0.5 + 0.5 * f) * before["c"] + (0.5 + 0.5 * i) * g
            return {**state, "h": ((0.5 + 0.5 * o) * np.tanh(c)).T, "c": c.T}
        r, z = 0.5 + 0.5 * np.tanh(gates[:2])
        n = np.tanh(gates[2] + r * gates[3])
        return {**state, "h": (n + z * (before["h"] - n)).T}
