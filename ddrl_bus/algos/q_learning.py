"""What rules that learn Q from replayed windows have in common: how they act and explore, targets, the target network.

    y = Σ_{k<m} γ^k r_{t+k} + γ^m Q(s_{t+m}, argmax_a Q(s_{t+m}, a; θ); θ⁻),  m ≤ n rows to an end
    L = w · ½(y - Q(s_t, a_t; θ))²,  w = (N · P)^-β / max over the batch

s_{t+m} is the true final observation where the last row was truncated, and the bootstrap is dropped where it
terminated. θ⁻ is θ as it was at the last multiple of `target_every` updates.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.algos import returns
from ddrl_bus.algos.base import Algorithm, Array, Batch, Windows
from ddrl_bus.algos.config import QLearningConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_heads import NumpyHeads, QHeads
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.rewards import learnt_reward
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError

ConfigT = TypeVar("ConfigT", bound=QLearningConfig)


class QLearning(Algorithm[ConfigT]):
    """Acts ε-greedily, and records Q of the action taken and of the best one: first priorities are made of them. A rule
    adds `loss`, and `windows` and `priorities` that go with it."""

    wiring: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "trajectories": {"kind": "queue", "from": "actor", "to": "replay", "window": 2},
        "samples": {"kind": "request", "from": "learner", "to": "replay"},
        "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
    }

    def __init__(self, config: ConfigT, spaces: Spaces, *, seed: int, device: str = "cpu") -> None:
        super().__init__(config, spaces, seed=seed, device=device)
        self.target: Any = copy.deepcopy(self.net).requires_grad_(False)
        self._errors: torch.Tensor | None = None
        self._loaded = -1  # updates at the weights that were loaded last

    def networks(self) -> dict[str, Any]:
        return {"net": self.net, "target": self.target}

    @classmethod
    def network(cls, config: ConfigT, spaces: Spaces, generator: torch.Generator | None) -> Any:
        from ddrl_bus.algos import nets

        return nets.QNetwork(config, spaces, generator)

    @classmethod
    def numpy_heads(cls, config: ConfigT, spaces: Spaces) -> Callable[[int], NumpyHeads] | None:
        return partial(QHeads, spaces, config.dueling)

    # ---- acting

    @classmethod
    def record(cls, config: ConfigT, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        if spaces.action_kind != "discrete":
            raise UsageError(
                f"algo.name: {cls.name!r} takes the best of a number of actions; this environment's are continuous, "
                f"of {spaces.num_actions} components: expected a discrete action space, or another rule"
            )
        return {"q": ("float32", ()), "max_q": ("float32", ())}

    @classmethod
    def act(
        cls, config: ConfigT, spaces: Spaces, outputs: Mapping[str, NDArray[Any]], noise: Noise, explore: Explore | None
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        q = outputs["q"]
        action = q.argmax(axis=1)  # the lowest of equal ones
        if explore is not None:
            chance, which = noise.uniform((2, len(q)))
            action = np.where(chance < epsilons(config, explore), (which * spaces.num_actions).astype(np.int64), action)
        return action, {"q": q[np.arange(len(q)), action], "max_q": q.max(axis=1)}

    @classmethod
    @abstractmethod
    def windows(cls, config: ConfigT) -> Windows: ...

    @classmethod
    def acting_errors(
        cls, config: ConfigT, rows: Mapping[str, NDArray[Any]], record: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """[rows, N] |n-step TD error| of each row by the acting network alone, in both roles.

        It never saw the final observations of truncated rows, nor the one after the last row: there it bootstraps from
        the row before.
        """
        best = record["max_q"]
        following = np.where(rows["truncated"], best, np.concatenate([best[1:], best[-1:]]))
        target = cls.targets(config, rows["reward"], following, rows["terminated"], rows["truncated"])
        errors: NDArray[np.float32] = abs(target - record["q"])
        return errors

    # ---- learning

    @classmethod
    def targets(cls, config: ConfigT, reward: Array, next_q: Array, terminated: Array, truncated: Array) -> Array:
        """y of each row.  Shapes: all [T, B]; `next_q` is Q of what follows the row, as the network says it."""
        return returns.n_step_returns(
            learnt_reward(reward, config),
            next_q,
            terminated,
            truncated,
            gamma=config.gamma,
            n=config.n_step,
            rescaled=config.rescale,
        )

    def best(self, q: torch.Tensor, target_q: torch.Tensor) -> torch.Tensor:
        """What the target network says of the best action.  Shapes: [N, A] each -> [N]."""
        chosen = (q if self.config.double else target_q).argmax(-1, keepdim=True)
        return target_q.gather(-1, chosen).squeeze(-1)

    def weighted(
        self, chosen: torch.Tensor, target: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`loss` of Q of the actions taken: means over rows, then over columns by their weight.

        Shapes: chosen, target [rows, B].
        """
        errors = (target - chosen.detach()).abs()
        if self.config.huber:
            loss = torch.nn.functional.huber_loss(chosen, target, reduction="none", delta=self.config.huber)
        else:
            loss = 0.5 * (target - chosen).square()
        loss = loss.mean(0)
        if batch.weight is not None:
            loss = loss * batch.weight
        self._errors = self.priority(self.config, errors)
        return loss.mean(), {"q": chosen, "target": target, "td_error": errors}

    @classmethod
    @abstractmethod
    def priority(cls, config: ConfigT, errors: Array) -> Array:
        """[B] of windows, from their |TD errors| [rows, B]; numpy or torch."""

    @property
    def errors(self) -> NDArray[np.float32] | None:
        if self._errors is None or not self.config.alpha:
            return None
        errors: NDArray[np.float32] = self._errors.float().cpu().numpy()
        return errors

    # ---- the target network

    def load(self, weights: Mapping[str, NDArray[Any]], updates: int = 0) -> None:
        """As the base's; they become the target network's too, each time `updates` has left another multiple of
        `target_every` behind."""
        super().load(weights, updates)
        every = self.config.target_every
        if updates // every != self._loaded // every:
            self._refresh()
        self._loaded = updates

    def count(self, env_steps: int) -> None:
        super().count(env_steps)
        if self.updates % self.config.target_every == 0:
            self._refresh()

    def _refresh(self) -> None:
        self.target.load_state_dict(self.net.state_dict())


def epsilons(config: QLearningConfig, explore: Explore) -> NDArray[np.float64]:
    """[N] probabilities of an action drawn uniformly.

    Source: Horgan et al. 2018 (arXiv 1803.00933), section 4.1: ε^(1 + i·α/(N-1)); a single environment has ε. The
    decay from 1 is DQN's.
    """
    least = config.epsilon ** (1 + config.epsilon_spread * explore.place.astype(np.float64))
    if not config.epsilon_steps:
        return least
    left = max(0.0, 1 - explore.env_steps / config.epsilon_steps)
    return least + (1 - least) * left
