"""A policy whose network has no numpy forward. This module imports torch for real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddrl_bus.algos import memory
from ddrl_bus.algos.base import Algorithm, torch_device
from ddrl_bus.algos.memory import State
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.policy import Acted, Explore, fitting
from ddrl_bus.algos.spaces import Spaces


class TorchPolicy:
    """Acts by the learner's own network."""

    def __init__(
        self,
        algorithm: type[Algorithm[Any]],
        config: Any,
        spaces: Spaces,
        seed: int | np.random.SeedSequence,
        device: str = "cpu",
    ) -> None:
        """Sets torch to one thread: the cores are the other processes'.

        Raises: UsageError for spaces that the network does not cover, or a device that is not there.
        """
        torch.set_num_threads(1)
        self._algorithm, self._config, self._spaces, self._noise = algorithm, config, spaces, Noise(seed)
        self._device = torch_device(device)
        self._net: Any = algorithm.network(config, spaces, None).to(self._device)
        self._parameters: dict[str, torch.Tensor] = self._net.state_dict()

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        arrays = {name: fitting(weights, name, tuple(p.shape)) for name, p in self._parameters.items()}
        for name, array in arrays.items():
            self._parameters[name].copy_(torch.tensor(array))

    def initial_state(self, n: int) -> State:
        return memory.initial(self._config, self._spaces, n)

    def act(self, obs: NDArray[Any], state: State, explore: Explore | None) -> Acted:
        with torch.inference_mode():
            outputs, carried = self._net.step(
                self._tensor(obs), {name: self._tensor(array) for name, array in state.items()}
            )
        said = {name: tensor.cpu().numpy() for name, tensor in outputs._asdict().items()}
        action, record = self._algorithm.act(self._config, self._spaces, said, self._noise, explore)
        return Acted(action, record, {name: tensor.cpu().numpy() for name, tensor in carried.items()})

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        if not array.flags.writeable:  # torch has no read-only tensors, and warns
            array = array.copy()
        return torch.from_numpy(array).to(self._device)
