"""The last layer of networks that act in numpy: all heads as one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos.heads import head_of
from ddrl_bus.algos.policy import fitting
from ddrl_bus.algos.spaces import Spaces

Array = NDArray[Any]


class NumpyHeads(Protocol):
    matrix: Array
    """[rows, width + 1], biases in the last column"""

    def load(self, weights: Mapping[str, Array]) -> None:
        """Raises: UsageError if a name is missing or a shape is another."""

    def outputs(self, product: Array) -> dict[str, Array]:
        """What the product, [rows, N], says of N environments, as views of it: {name: [N, ...]}."""


class PolicyHeads:
    """Of `nets.ActorCritic`: policy, log standard deviations as biases alone, value where it is recorded."""

    def __init__(self, spaces: Spaces, value: bool, width: int) -> None:
        self._rows = head_of(spaces).width
        self.matrix = np.zeros((self._rows + value, width + 1), np.float32)
        self._parts = {"policy": self.matrix[: spaces.num_actions]}
        if value:
            self._parts["value"] = self.matrix[self._rows :]
        self._log_std = self.matrix[spaces.num_actions : self._rows, -1]

    def load(self, weights: Mapping[str, Array]) -> None:
        for name, layer in self._parts.items():
            load_linear(layer, weights, name)
        if len(self._log_std):
            self._log_std[:] = fitting(weights, "log_std", self._log_std.shape)

    def outputs(self, product: Array) -> dict[str, Array]:
        outputs = {"policy": product[: self._rows].T}
        if len(product) > self._rows:
            outputs["value"] = product[self._rows]
        return outputs


class QHeads:
    """Of `nets.QNetwork`; V + A - mean A is linear in the features, so that dueling costs nothing here."""

    def __init__(self, spaces: Spaces, dueling: bool, width: int) -> None:
        self.matrix = np.zeros((spaces.num_actions, width + 1), np.float32)
        self._value = np.zeros((1, width + 1), np.float32) if dueling else None

    def load(self, weights: Mapping[str, Array]) -> None:
        load_linear(self.matrix, weights, "q")
        if self._value is not None:
            load_linear(self._value, weights, "value")
            self.matrix += self._value - self.matrix.mean(axis=0)

    def outputs(self, product: Array) -> dict[str, Array]:
        return {"q": product.T}


def load_linear(layer: Array, weights: Mapping[str, Array], name: str) -> None:
    """Into [outputs, inputs + 1].  Raises: UsageError if a part is missing or of another shape."""
    layer[:, :-1] = fitting(weights, f"{name}.weight", (len(layer), layer.shape[1] - 1))
    layer[:, -1] = fitting(weights, f"{name}.bias", (len(layer),))
