"""Torsos: the layers between what an agent sees and the features that core and heads work on. Imports torch for real.

All weights are orthogonal with gain √2 and all biases zero, the initialisation of openai/baselines (Andrychowicz et al.
2020, arXiv 2006.05990), whatever a network's paper used. Images are [N, C, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ddrl_bus.algos.config import AgentConfig
from ddrl_bus.errors import UsageError

LayerT = TypeVar("LayerT", bound=nn.Module)

ACTIVATIONS: Final = {"tanh": torch.tanh, "relu": torch.relu}
CONVOLUTIONS: Final = {
    "minatar": (((16, 3, 1),), 128),
    "nature": (((32, 8, 4), (64, 4, 2), (64, 3, 1)), 512),
    "impala_shallow": (((16, 8, 4), (32, 4, 2)), 256),
}
"""Network → ((channels, kernel, stride) of each convolution, units of the fully connected layer after them).

Sources: Young & Tian 2019 (arXiv 1903.03176); Mnih et al. 2015 (Nature 518); Espeholt et al. 2018 (arXiv 1802.01561),
figure 3.
"""
SECTIONS: Final = 16, 32, 32
"""Channels of impala_deep's sections."""
SMALL: Final = 36
"""Least side of an image that DQN's convolutions fit on."""


class MlpTorso(nn.ModuleList):
    """Fully connected layers with an activation after each.  Shapes: [N, ...] -> [N, last width]."""

    def __init__(
        self, features: int, hidden: Sequence[int], activation: str, generator: torch.Generator | None
    ) -> None:
        super().__init__(linear(i, o, math.sqrt(2), generator) for i, o in pairwise([features, *hidden]))
        self.width = [features, *hidden][-1]
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for layer in self:
            x = self._activation(layer(x))
        return x


class ConvTorso(nn.Module):
    """Convolutions without padding and one fully connected layer, a rectifier after each."""

    def __init__(self, name: str, shape: tuple[int, ...], generator: torch.Generator | None) -> None:
        super().__init__()
        layers, self.width = CONVOLUTIONS[name]
        channels, *sides = shape
        self.convolutions = nn.ModuleList()
        for outputs, kernel, stride in layers:
            self.convolutions.append(convolution(channels, outputs, kernel, stride, 0, generator))
            channels, sides = outputs, [(side - kernel) // stride + 1 for side in sides]
            if min(sides) < 1:
                raise UsageError(f"algo.net: {name!r}, whose convolutions do not fit on images of {shape[1:]}")
        self.fc = linear(channels * math.prod(sides), self.width, math.sqrt(2), generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.convolutions:
            x = torch.relu(layer(x))
        return torch.relu(self.fc(x.flatten(1)))


class ResidualSection(nn.Module):
    """A convolution, a pool that halves the sides, and two residual blocks of two convolutions."""

    def __init__(self, inputs: int, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.entry = convolution(inputs, channels, 3, 1, 1, generator)
        self.blocks = nn.ModuleList(convolution(channels, channels, 3, 1, 1, generator) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.entry(x), kernel_size=3, stride=2, padding=1)
        for first, second in (self.blocks[:2], self.blocks[2:]):
            x = x + second(torch.relu(first(torch.relu(x))))
        return x


class ResidualTorso(nn.Module):
    """IMPALA's deep network: three residual sections and one fully connected layer.

    Source: Espeholt et al. 2018 (arXiv 1802.01561), figure 3, right.
    """

    width = 256

    def __init__(self, shape: tuple[int, ...], generator: torch.Generator | None) -> None:
        super().__init__()
        channels, *sides = shape
        self.sections = nn.Sequential(*(ResidualSection(i, o, generator) for i, o in pairwise([channels, *SECTIONS])))
        sides = [math.ceil(side / 2 ** len(SECTIONS)) for side in sides]
        self.fc = linear(SECTIONS[-1] * math.prod(sides), self.width, math.sqrt(2), generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(torch.relu(self.sections(x)).flatten(1)))


Torso = MlpTorso | ConvTorso | ResidualTorso
"""[N, ...] float -> [N, width]"""


def torso(config: AgentConfig, shape: tuple[int, ...], generator: torch.Generator | None) -> Torso:
    """The torso that `config.net` names, for observations of `shape`: (features,) or (channels, height, width).

    Raises: UsageError for a network that does not go with the shape.
    """
    name = config.net
    if name == "auto":
        name = "mlp" if len(shape) == 1 else "minatar" if min(shape[1:]) < SMALL else "nature"
    if name == "mlp":
        return MlpTorso(math.prod(shape), config.hidden, config.activation, generator)
    if len(shape) == 1:
        raise UsageError(f"algo.net: {name!r}, expected mlp (or auto) for flat observations, {shape}")
    return ResidualTorso(shape, generator) if name == "impala_deep" else ConvTorso(name, shape, generator)


def linear(inputs: int, outputs: int, gain: float, generator: torch.Generator | None) -> nn.Linear:
    """Orthogonal weights, biases of zero."""
    return initialised(nn.Linear(inputs, outputs, device="meta"), gain, generator)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int, padding: int, generator: torch.Generator | None
) -> nn.Conv2d:
    """Orthogonal weights, gain √2, biases of zero."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, device="meta")
    return initialised(layer, math.sqrt(2), generator)


def initialised(layer: LayerT, gain: float, generator: torch.Generator | None) -> LayerT:
    """`layer`, made on the meta device, with orthogonal weights and biases of zero; all zeros without a generator.

    torch's own initialisation would draw from its global generator: on the meta device it draws nothing.
    """
    for name, parameter in list(layer.named_parameters()):
        values = torch.zeros(parameter.shape)
        if parameter.dim() > 1 and generator is not None:
            nn.init.orthogonal_(values, gain, generator=generator)
        setattr(layer, name, nn.Parameter(values))
    return layer
