"""IMPALA: actors send unrolls, one learner trains on them a little later, V-trace corrects for the difference.

Source: Espeholt et al. 2018, "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
Architectures" (arXiv 1802.01561), and its code, deepmind/scalable_agent. Each actor takes the latest weights before
an unroll of T steps; the learner takes B columns first come, first served, with no barrier. The lag is the number of
the learner's updates between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray

from ddrl_bus.algos import returns
from ddrl_bus.algos.base import Algorithm, Batch
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import UsageError


@dataclass(frozen=True)
class ImpalaConfig:
    """Settings of IMPALA. Defaults marked [tuned] were chosen on CartPole-v1; see ddrl_bus/bench/control.py."""

    unroll: int = 20
    """T, env steps per unroll and column; 20 in the paper's Atari table, 100 on DMLab"""
    batch: int = 32
    """B, columns per update (one column is one environment's unroll); paper, Atari table"""
    gamma: float = 0.99
    """discount per env step; paper"""
    lam: float = 1.0
    """λ, multiplies the trace coefficients c of V-trace: 1 is the paper's estimator, less trades variance for bias"""
    rho_bar: float = 1.0
    """ρ̄, clips the importance weights of the TD errors and the policy gradient; sets the policy that V is of; paper"""
    c_bar: float = 1.0
    """c̄ ≤ ρ̄, clips the traces: speed of convergence only, not its limit; paper"""
    reduction: Literal["mean", "sum"] = "mean"
    """of the losses over T·B rows. The paper sums, and its lr, eps and clip norm of 40 belong to sums, which are T·B
    times larger; with means, lr does not depend on the size of a batch"""
    reward_scale: float = 0.01
    """factor on rewards in learning [tuned]: 1 - gamma brings the values of unit rewards to about 1, which shared
    layers learn sooner than values of 100. Paper: 1, with rewards clipped to ±1"""
    value_cost: float = 0.5
    """weight of ½(v - V)² in the loss; paper"""
    entropy_cost: float = 0.001
    """weight of the policy's entropy in the loss, per nat, against scaled rewards [tuned]; paper .01 at scale 1"""
    optimizer: Literal["adam", "rmsprop_tf", "rmsprop"] = "adam"
    """rmsprop_tf is the paper's (ε inside the root), rmsprop is torch's as in TorchBeast"""
    lr: float = 1e-3
    """learning rate [tuned] for mean losses and Adam; the paper's 6e-4 is for sums and RMSProp"""
    eps: float = 1e-5
    """ε of the optimiser, in its own dialect; the paper's .01 to .1 belong to rmsprop_tf and sums"""
    rms_decay: float = 0.99
    """α, decay of RMSProp's mean square per update (not used by adam); paper"""
    max_grad_norm: float = 40.0
    """global norm that gradients are clipped to; paper, for sums"""
    anneal_steps: int = 0
    """env steps over which lr falls linearly to 0; 0 keeps it constant. The paper anneals over the whole run"""
    hidden: tuple[int, ...] = (64, 64)
    """units of the fully connected layers"""
    activation: Literal["tanh", "relu"] = "relu"
    """between the layers; relu costs a quarter less per update and per action on a CPU"""
    shared_torso: bool = True
    """policy and value heads share the layers, as in the paper, or have a stack each (half as dear again)"""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UsageError(f"algo.{name}: {getattr(self, name)!r}, expected {expected}")

        for name in ("unroll", "batch"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("gamma", "lam", "rms_decay"):
            need(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1")
        for name in ("lr", "eps", "max_grad_norm", "rho_bar", "c_bar", "reward_scale"):
            need(getattr(self, name) > 0, name, "a number above 0")
        for name in ("value_cost", "entropy_cost", "anneal_steps"):
            need(getattr(self, name) >= 0, name, "a number not below 0")
        need(self.c_bar <= self.rho_bar, "c_bar", f"at most rho_bar, {self.rho_bar}")
        need(all(units >= 1 for units in self.hidden), "hidden", "sizes of at least 1")
        for name, choices in CHOICES.items():
            need(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")


CHOICES = {
    "reduction": ("mean", "sum"),
    "optimizer": ("adam", "rmsprop_tf", "rmsprop"),
    "activation": ("tanh", "relu"),
}


class Impala(Algorithm[ImpalaConfig]):
    name = "impala"
    Config = ImpalaConfig
    wiring: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "trajectories": {"kind": "queue", "from": "actor", "to": "learner", "window": 2},
        "weights": {"kind": "latest", "from": "learner", "to": ["actor", "evaluator"]},
    }

    @classmethod
    def record(cls, config: ImpalaConfig, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        if spaces.action_kind != "discrete":
            raise UsageError(f"algorithm {cls.name!r} acts in discrete action spaces, not in {spaces.action_kind} ones")
        return {"logits": ("float32", (spaces.num_actions,))}

    @classmethod
    def act(
        cls, config: ImpalaConfig, outputs: Mapping[str, NDArray[Any]], noise: Noise, greedy: bool
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        logits = outputs["logits"]
        scores = logits if greedy else logits + noise.gumbel(logits.shape)  # Gumbel-max: argmax is a sample of softmax
        return scores.argmax(axis=1), {"logits": logits}

    def network(self, generator: torch.Generator) -> torch.nn.Module:
        from ddrl_bus.algos import nets

        return nets.actor_critic(
            self.spaces,
            hidden=self.config.hidden,
            activation=self.config.activation,
            shared_torso=self.config.shared_torso,
            generator=generator,
        )

    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, (length, columns) = self.config, batch.reward.shape
        rows = length * columns

        # One forward for the T+1 rows and the K final observations.
        logits, values = self.net(torch.cat([batch.obs.flatten(0, 1), batch.final_obs]))
        log_pi = torch.log_softmax(logits[:rows].view(length, columns, -1), dim=-1)
        value = values[:rows].view(length, columns)
        log_prob = _of_action(log_pi, batch.action)

        with torch.no_grad():
            log_mu = _of_action(torch.log_softmax(batch.record["logits"], dim=-1), batch.action)
            ratio = torch.exp(log_prob - log_mu)
            successors = values[: rows + columns].view(length + 1, columns)
            next_value = returns.next_values(successors, values[rows + columns :], batch.final_index)
            targets = returns.vtrace(
                ratio,
                batch.reward * config.reward_scale,
                value,
                next_value,
                batch.terminated,
                batch.truncated,
                gamma=config.gamma,
                lam=config.lam,
                rho_bar=config.rho_bar,
                c_bar=config.c_bar,
            )

        policy_loss = -(targets.rho * targets.advantage) * log_prob
        value_loss = 0.5 * (targets.target - value).square()
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        loss = (policy_loss + config.value_cost * value_loss - config.entropy_cost * entropy).sum()
        return loss if config.reduction == "sum" else loss / rows, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "value": value,
            "rho": ratio,
            "rho_clipped": ratio > 1.001 * config.rho_bar,  # the same policy differs by rounding
            "c_clipped": ratio > 1.001 * config.c_bar,
        }


def _of_action(log_probs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """[T, B, A], [T, B] -> [T, B]"""
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
