"""Settings that learning rules share; a rule's own Config adds its own and changes defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ddrl_bus.errors import UsageError

NetName = Literal["auto", "mlp", "minatar", "nature", "impala_shallow", "impala_deep"]
Core = Literal["none", "lstm", "gru"]
RewardClip = Literal["none", "sign", "one", "soft_asymmetric"]
Precision = Literal["float32", "bfloat16"]
OptimizerName = Literal["adam", "rmsprop_tf", "rmsprop", "sgd", "rmsprop_centred", "adagrad"]
Activation = Literal["tanh", "relu"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What all rules share. Defaults marked [tuned] were chosen on CartPole-v1."""

    unroll: int = 20
    """T, env steps per unroll and column"""
    batch: int = 32
    """B, columns per update (one column is one environment's unroll)"""
    gamma: float = 0.99
    """discount per env step"""
    reward_scale: float = 0.01
    """factor on rewards in learning, after `reward_clip` [tuned]: 1 - gamma brings the values of unit rewards to
    about 1, which shared layers learn sooner than values of 100"""
    reward_clip: RewardClip = "none"
    """of rewards in learning: their sign; clipped to ±1; or 5·tanh(r/5), negatives × .3 (IMPALA on DMLab)"""
    optimizer: OptimizerName = "adam"
    """rmsprop_tf has ε inside the root (A3C, TensorFlow), rmsprop is torch's (TorchBeast), rmsprop_centred subtracts
    the squared mean (DQN, Ape-X); Gorila has adagrad"""
    lr: float = 1e-3
    """learning rate [tuned] for mean losses and Adam"""
    eps: float = 1e-5
    """ε of the optimiser, in its own dialect"""
    rms_decay: float = 0.99
    """α, decay of RMSProp's mean square per update (all three RMSProps)"""
    adam_beta1: float = 0.9
    """β1, decay of Adam's momentum per update; SEED RL has none, 0"""
    max_grad_norm: float = 40.0
    """global norm that gradients are clipped to"""
    anneal_steps: int = 0
    """env steps over which lr falls linearly to 0; 0 keeps it constant"""
    net: NetName = "auto"
    """mlp: `hidden`; minatar: one small convolution; nature: DQN's three; impala_*: the paper's, deep is the ResNet.
    auto: mlp for flat observations, minatar for small images, nature for larger ones"""
    hidden: tuple[int, ...] = (64, 64)
    """units of the fully connected layers (mlp)"""
    activation: Activation = "relu"
    """between the layers of the mlp; relu costs a quarter less per update and per action on a CPU"""
    precision: Precision = "float32"
    """of the layers below core and heads, where they run in torch; weights, core, heads and losses stay float32.
    bfloat16 is faster on a GPU or a CPU that computes in it, and many times slower on a CPU that does not"""
    core: Core = "none"
    """recurrent layer between torso and heads; its state is zero at the start of an episode"""
    core_size: int = 64
    """units of the core"""
    last_inputs: bool = False
    """feeds the last action (one-hot) and the last reward (clipped to ±1) in, after the torso; as IMPALA does"""

    def __post_init__(self) -> None:
        for name in ("unroll", "batch", "core_size"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("gamma", "rms_decay"):
            self.need(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1")
        self.need(0 <= self.adam_beta1 < 1, "adam_beta1", "a number from 0 to below 1")
        for name in ("lr", "eps", "max_grad_norm", "reward_scale"):
            self.need(getattr(self, name) > 0, name, "a number above 0")
        self.need(self.anneal_steps >= 0, "anneal_steps", "a number not below 0")
        self.need(all(units >= 1 for units in self.hidden), "hidden", "sizes of at least 1")
        for name, choices in _CHOICES.items():
            self.need(getattr(self, name) in choices, name, f"one of {', '.join(choices)}")

    def need(self, ok: bool, name: str, expected: str) -> None:
        """Raises: UsageError naming the setting and what was expected, unless `ok`."""
        if not ok:
            raise UsageError(f"algo.{name}: {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(AgentConfig):
    """What policy-gradient rules share."""

    reduction: Reduction = "mean"
    """of the losses over T·B rows; sums are T·B times larger, and a published lr, eps and clip norm belong to one"""
    value_cost: float = 0.5
    """weight of the value loss"""
    entropy_cost: float = 0.001
    """weight of the policy's entropy, per nat, against scaled rewards [tuned]"""
    shared_torso: bool = True
    """policy and value heads share the layers, or have a stack each (half as dear again); with a core they share"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value_cost", "entropy_cost"):
            self.need(getattr(self, name) >= 0, name, "a number not below 0")
        self.need(self.shared_torso or self.core == "none", "shared_torso", f"true with a core ({self.core})")
        self.need(self.reduction in get_args(Reduction), "reduction", f"one of {', '.join(get_args(Reduction))}")


@dataclass(frozen=True, kw_only=True)
class QLearningConfig(AgentConfig):
    """What rules that learn Q share."""

    n_step: int = 3
    """n, rows whose rewards a target sums; Ape-X"""
    target_every: int = 200
    """updates after which the target network becomes a copy of the network [tuned]: values travel n rows each time.
    Those of a parameter server where it applies the gradients. Ape-X, R2D2: 2500"""
    double: bool = True
    """the network chooses the action that the target network values (van Hasselt et al. 2016); off: the target network
    does both (DQN, Gorila)"""
    dueling: bool = True
    """Q = V + A - mean A (Wang et al. 2016); off: one layer for Q"""
    epsilon: float = 0.4
    """ε, probability of an action drawn uniformly; the most that an environment has. Ape-X"""
    epsilon_spread: float = 7.0
    """environment i of N explores with ε^(1 + spread · i/(N-1)), for life; Ape-X. 0: all alike"""
    epsilon_steps: int = 0
    """env steps over which ε falls linearly from 1 to its value; 0: it has it from the start (Ape-X)"""
    alpha: float = 0.6
    """exponent of priorities: drawn with probability ∝ p^α; 0: uniformly. Ape-X"""
    beta: float = 0.4
    """exponent of the importance weights that undo it: 1 altogether, 0 not at all. Ape-X"""
    huber: float = 0.0
    """|error| beyond which the loss is linear, in learning's units (after `reward_scale`); 0: squares. DQN has 1"""
    rescale: bool = False
    """Q is learnt as h(Q) = sign(Q)(√(|Q|+1) - 1) + .001 Q (Pohlen et al. 2018), for returns of any size"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_step", "target_every"):
            self.need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("epsilon", "alpha", "beta"):
            self.need(0 <= getattr(self, name) <= 1, name, "a number from 0 to 1")
        for name in ("epsilon_spread", "epsilon_steps", "huber"):
            self.need(getattr(self, name) >= 0, name, "a number not below 0")


_CHOICES: dict[str, tuple[str, ...]] = {
    "reward_clip": get_args(RewardClip),
    "optimizer": get_args(OptimizerName),
    "net": get_args(NetName),
    "activation": get_args(Activation),
    "core": get_args(Core),
    "precision": get_args(Precision),
}
