"""What policy-gradient rules have in common besides the loss: how they act, and their reduction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from numpy.typing import NDArray

from ddrl_bus.algos.base import Algorithm
from ddrl_bus.algos.config import PolicyGradientConfig
from ddrl_bus.algos.heads import Head, head_of
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_heads import NumpyHeads, PolicyHeads
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.spaces import Spaces

LOCK_STEP: Final[Mapping[str, Mapping[str, object]]] = {
    "trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 1, "max_lag": 0},
    "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
}
"""The wiring of rules that learn from their newest policy alone: a round of all actors, an update, new weights."""
ConfigT = TypeVar("ConfigT", bound=PolicyGradientConfig)


class PolicyGradient(Algorithm[ConfigT]):
    """Acts by sampling the policy head and records its parameters: those of the behaviour policy cannot be recomputed
    later. A rule adds `loss`."""

    def __init__(self, config: ConfigT, spaces: Spaces, *, seed: int, device: str = "cpu") -> None:
        super().__init__(config, spaces, seed=seed, device=device)
        self.head: Head = head_of(spaces)

    @property
    def mean_loss(self) -> bool:
        return bool(self.config.reduction == "mean")

    @classmethod
    def record(cls, config: ConfigT, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"policy": ("float32", (head_of(spaces).width,))}

    @classmethod
    def act(
        cls, config: ConfigT, spaces: Spaces, outputs: Mapping[str, NDArray[Any]], noise: Noise, explore: Explore | None
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        policy = outputs["policy"]
        return head_of(spaces).sample(policy, noise, greedy=explore is None), {"policy": policy}

    @classmethod
    def numpy_heads(cls, config: ConfigT, spaces: Spaces) -> Callable[[int], NumpyHeads] | None:
        value = "value" in cls.record(config, spaces)
        return partial(PolicyHeads, spaces, value) if config.shared_torso or not value else None

    @classmethod
    def network(cls, config: ConfigT, spaces: Spaces, generator: torch.Generator | None) -> Any:
        from ddrl_bus.algos import nets

        return nets.ActorCritic(config, spaces, generator)


def reduced(loss: torch.Tensor, config: PolicyGradientConfig) -> torch.Tensor:
    """Mean or sum over rows."""
    return loss.sum() if config.reduction == "sum" else loss.mean()
