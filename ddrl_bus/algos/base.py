"""What every learning rule shares: a paper writes a documented Config, `act` and `loss`, the rest is written here.

An algorithm has two halves. The acting half is class methods on numpy arrays, so that an actor never imports torch.
The learning half is an instance: network, optimiser, and the counters that make a resumed run bit-equal to an
unbroken one. Nothing global is set: threads belong to the node, and initialisation has a generator of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from ddrl_bus.algos import memory
from ddrl_bus.algos.config import AgentConfig
from ddrl_bus.algos.lazy import torch
from ddrl_bus.algos.noise import Noise
from ddrl_bus.algos.numpy_heads import NumpyHeads
from ddrl_bus.algos.policy import Explore
from ddrl_bus.algos.spaces import Spaces
from ddrl_bus.errors import RefusedFileError, UsageError

Array: TypeAlias = Any
"""A numpy array as the learner stacks it, or the torch tensor that `Batch.to` makes of it."""


_REST = {"rng", "counters"}  # of a state, besides networks and optimizer.*
ConfigT = TypeVar("ConfigT", bound=AgentConfig)
Precision: TypeAlias = Literal["float16", "float32"]


@dataclass
class Batch:
    """B columns of T consecutive rows, time-major.

    Row t holds obs_t, the action taken *from* it, and the reward and end flags that action led to; row T of `obs` is
    the bootstrap row. After an end, obs_{t+1} is the first observation of the next episode; the true final observation
    of a *truncated* row is in `final_obs`, at the position where `final_index` has t·B + b.
    """

    obs: Array
    """[T+1, B, ...]"""
    action: Array
    """[T, B] int64, or [T, B, D] float32"""
    reward: Array
    """[T, B] float32"""
    terminated: Array
    """[T, B] bool"""
    truncated: Array
    """[T, B] bool"""
    record: dict[str, Array]
    """what the algorithm's `act` recorded, {name: [T, B, ...]}"""
    version: Array
    """[T, B] int64, version of the weights that chose the action"""
    final_obs: Array
    """[K, ...]"""
    final_index: Array
    """[K] int64"""
    state: dict[str, Array] = field(default_factory=dict)
    """recurrent state before row 0, {name: [B, ...]}"""
    weight: Array | None = None
    """[B] float32, importance weights of replayed columns, at most 1; None where all count alike"""

    def to(self, device: str | torch.device) -> Batch:
        """The same rows as torch tensors on `device`; numpy arrays are shared, not copied, where that is the CPU."""
        return self.map(lambda array: torch.as_tensor(array, device=device))

    def map(self, function: Callable[[Array], Array]) -> Batch:
        """The batch whose arrays are `function` of ours."""

        def mapped(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: function(array) for name, array in value.items()}
            return None if value is None else function(value)

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})


class Windows(NamedTuple):
    """What is replayed of a column of an unroll: windows of consecutive rows, each an item of its own."""

    rows: int
    """of an unroll"""
    overlap: int
    """rows at the end of an unroll with which the next one begins"""
    length: int
    """rows of a window"""
    starts: int
    """windows, one from each of the first rows"""
    alpha: float = 0.0
    """exponent of priorities: drawn with probability ∝ p^α; 0: uniformly"""
    beta: float = 0.0
    """exponent of the importance weights (N·P)^-β that undo it; 0: none"""


class Algorithm(ABC, Generic[ConfigT]):
    """One learning rule. Units: counters and `anneal_steps` are environment steps of trained rows."""

    name: ClassVar[str]
    Config: ClassVar[type]
    """a frozen dataclass; the docstring under a field says its unit and where its default comes from"""
    wiring: ClassVar[Mapping[str, Mapping[str, object]]]
    """the links this rule learns over, in the words of a topology file"""
    acting: ClassVar[Precision] = "float32"
    """precision of the weights that actors play by, where a topology does not say: float16 for a rule that takes the
    policy that acted to be another than its own, for actors recorded what theirs said, or explore anyway"""
    report_every: ClassVar[int] = 10
    """updates between two reports of `step`"""

    def __init__(self, config: ConfigT, spaces: Spaces, *, seed: int, device: str = "cpu") -> None:
        """Builds network and optimiser from `seed`.

        Raises: UsageError for spaces that the algorithm or its network does not cover, or a device that is not there.
        """
        from ddrl_bus.algos import optim  # imports torch for real

        self.record(config, spaces)  # refuses spaces that this rule cannot act in
        self.config = config
        self.spaces = spaces
        self.device = torch_device(device)
        self.updates = 0
        self.env_steps = 0
        self.gradient_steps = 0  # the optimiser's: one or more an update
        self.all_reduce: Callable[[torch.Tensor], None] | None = None
        """Sums a tensor in place over all replicas that train together; None where there is one."""
        self.generator = torch.Generator().manual_seed(seed)
        self.net: Any = self.network(config, spaces, self.generator).to(self.device)
        self._params = list(self.net.parameters())
        self._weights: dict[str, torch.Tensor] = self.net.state_dict()  # those themselves, under their names
        self.optimizer = optim.make(
            config.optimizer,
            self._params,
            lr=config.lr,
            eps=config.eps,
            alpha=config.rms_decay,
            beta1=config.adam_beta1,
        )

    # ---- the paper

    @classmethod
    @abstractmethod
    def network(cls, config: ConfigT, spaces: Spaces, generator: torch.Generator | None) -> Any:
        """The network (a torch.nn.Module), initialised from `generator` alone; all zeros without one."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss to minimise, and tensors of any shape whose means are worth reporting; `batch` is on our device."""

    @classmethod
    @abstractmethod
    def record(cls, config: ConfigT, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What an actor records per row besides obs, action, reward and ends: {name: (dtype, shape)}.

        Raises: UsageError for spaces that this rule does not cover.
        """

    @classmethod
    @abstractmethod
    def act(
        cls, config: ConfigT, spaces: Spaces, outputs: Mapping[str, NDArray[Any]], noise: Noise, explore: Explore | None
    ) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        """Actions [N] or [N, D] and the record {name: [N, ...]}, from the network's `outputs` {name: [N, ...]}; the
        best known actions without `explore`."""

    @classmethod
    @abstractmethod
    def numpy_heads(cls, config: ConfigT, spaces: Spaces) -> Callable[[int], NumpyHeads] | None:
        """Makes what acts of the network's heads, in numpy, from the number of features below them; None for a
        network that acts in torch only."""

    @classmethod
    def carried(cls, config: ConfigT, spaces: Spaces) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What the agent carries from step to step: {name: (dtype, shape of one environment's)}."""
        return memory.spec(config, spaces)

    @classmethod
    def least_rows(cls, config: ConfigT) -> int:
        """Fewest rows of an unroll that may end early; `unroll` where none may."""
        return int(config.unroll)

    @classmethod
    def windows(cls, config: ConfigT) -> Windows | None:
        """What a replay node keeps for this rule; None for one that learns from unrolls as they come."""
        return None

    @classmethod
    def priorities(
        cls, config: ConfigT, rows: Mapping[str, NDArray[Any]], record: Mapping[str, NDArray[Any]]
    ) -> NDArray[np.float32]:
        """[starts, N] first priorities of an unroll's windows, from what the actors recorded of its rows; for rules
        with `windows`. `rows` has reward, terminated and truncated [rows, N], `record` what `act` recorded."""
        raise NotImplementedError

    @property
    def errors(self) -> NDArray[np.float32] | None:
        """[B] priorities of the columns of the newest `loss`, None where nobody needs them; to read them waits for a
        GPU."""
        return None

    def passes(self, batch: Batch) -> Iterable[Batch]:
        """The batches to train on now that `batch` came, one after the other; its memory is used again afterwards."""
        yield batch

    def networks(self) -> dict[str, Any]:
        """Everything with parameters, by the prefix of its names in `state`."""
        return {"net": self.net}

    # ---- written once

    def step(self, batch: Batch, env_steps: int | None = None) -> dict[str, float]:
        """One update: for each of its `passes` a gradient, clipped to a global norm, and applied.

        It counts for `env_steps` more of the run; default: for its rows, each of which is trained on once.

        Returns {name: mean} for every `report_every`-th update, else {}: reading numbers out of torch takes time, and
        on a GPU it waits for the whole update.
        """
        batch = batch.to(self.device)
        tensors: dict[str, torch.Tensor] = {}
        for each in self.passes(batch):
            tensors = self._backward(each)
            self._descend()
        self.count(batch.reward.numel() if env_steps is None else env_steps)
        return {} if (self.updates - 1) % self.report_every else _means(tensors)

    def gradients(self, batch: Batch) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """The clipped gradient of the loss, for somebody else to `apply`: ({parameter: array}, report as of `step`).

        Raises: UsageError for a rule that takes several gradients of a batch, which are not one another's.
        """
        if type(self).passes is not Algorithm.passes:
            raise UsageError(f"{self.name} makes several passes over a batch: no single gradient to send away")
        report = _means(self._backward(batch.to(self.device)))
        return {name: _numpy(p.grad) for name, p in self.net.named_parameters() if p.grad is not None}, report

    def apply(self, gradients: Mapping[str, NDArray[Any]], env_steps: int) -> None:
        """One update by a gradient that was computed, and clipped, elsewhere and counts for `env_steps`; of some
        parameters or of all.

        Raises: UsageError if its names or shapes are not those of our parameters; nothing is changed then.
        """
        params = dict(self.net.named_parameters())
        expected = {name: tuple(p.shape) for name, p in params.items()}
        found = {name: tuple(array.shape) for name, array in gradients.items()}
        if unknown := {name: shape for name, shape in found.items() if expected.get(name) != shape}:
            raise UsageError(f"gradients {unknown} do not fit the parameters {expected}")
        for name, p in params.items():
            p.grad = torch.tensor(gradients[name], device=self.device) if name in gradients else None
        self._descend()
        self.count(env_steps)

    def load(self, weights: Mapping[str, NDArray[Any]], updates: int = 0) -> None:
        """Takes `weights` as another instance gave them out after so many updates."""
        self.net.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})

    def _backward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Leaves the gradient, of all replicas and clipped to a global norm, in the parameters; returns what is worth
        reporting."""
        self.optimizer.zero_grad(set_to_none=True)
        loss, report = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self._pool_gradients(batch.reward.numel())
        norm = torch.nn.utils.clip_grad_norm_(self._params, self.config.max_grad_norm)
        return {"loss": loss, **report, "grad_norm": norm}

    def pooled(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of all replicas, from those over our own."""
        if self.all_reduce is not None:
            self.all_reduce(sums := sums.clone())
        return sums

    def pooled_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Over the rows of all replicas, which so agree on what follows from it."""
        total, n = self.pooled(torch.stack([x.sum(), torch.ones_like(x).sum()]))
        return torch.div(total, n)

    def _pool_gradients(self, rows: int) -> None:
        """Makes the gradients that the parameters hold, of the loss over `rows` of ours, those of the loss over the
        rows of all replicas; in one piece, for many small ones take longer."""
        if self.all_reduce is None:
            return
        held = [p for p in self._params if p.grad is not None]
        sizes = [p.numel() for p in held]
        flat = held[0].new_empty(sum(sizes) + 1)
        *gradients, total = torch.split(flat, [*sizes, 1])
        for p, gradient in zip(held, gradients, strict=True):
            p.grad = torch.mul(p.grad, rows if self.mean_loss else 1, out=gradient.view_as(p))
        total.fill_(rows)
        self.all_reduce(flat)
        if self.mean_loss:
            flat[:-1] /= total

    @property
    def mean_loss(self) -> bool:
        """Whether `loss` is a mean over rows, and no sum."""
        return True

    def _descend(self) -> None:
        """Applies the gradient that the parameters hold."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.gradient_steps += 1

    def count(self, env_steps: int) -> None:
        """An update is over, and counts for `env_steps`."""
        self.updates += 1
        self.env_steps += env_steps

    @property
    def learning_rate(self) -> float:
        """lr of the next update: constant, or linear to 0 over `anneal_steps` env steps."""
        if not self.config.anneal_steps:
            return self.config.lr
        return self.config.lr * max(0.0, 1.0 - self.env_steps / self.config.anneal_steps)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """A float32 snapshot of the network under the names of its state_dict."""
        return {name: tensor.float().cpu().numpy().copy() for name, tensor in self._weights.items()}

    def copy_weights(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes the weights to arrays of any float type, under the names of `weights`; of some of them or of all."""
        for name, array in arrays.items():
            torch.from_numpy(array).copy_(self._weights[name])  # numpy takes 20 times as long to make halves

    def digest(self) -> int:
        """xxHash of the parameters, XXH3 in the 63 bits of an int64: replicas whose parameters differ have others."""
        found = xxhash.xxh3_64()
        for p in self._params:
            found.update(p.detach().cpu().numpy())
        return found.intdigest() >> 1

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that the next update depends on: network, optimiser, generator and counters, as a flat mapping."""
        arrays = {
            f"{prefix}.{name}": _numpy(value)
            for prefix, module in self.networks().items()
            for name, value in module.state_dict().items()
        }
        for index, slots in self.optimizer.state_dict()["state"].items():
            arrays |= {f"optimizer.{index}.{name}": _numpy(value) for name, value in slots.items()}
        arrays["rng"] = _numpy(self.generator.get_state())
        arrays["counters"] = np.array([self.updates, self.env_steps, self.gradient_steps], np.int64)
        return arrays

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Continues from `state()`, bit-equal.

        Raises: RefusedFileError if it belongs to another network or optimiser; nothing is changed then.
        """
        from ddrl_bus.algos import optim

        modules: dict[str, dict[str, torch.Tensor]] = {prefix: {} for prefix in self.networks()}
        slots: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind in modules:
                modules[kind][rest] = torch.tensor(value)
            elif kind == "optimizer":
                index, _, slot = rest.partition(".")
                slots.setdefault(int(index), {})[slot] = torch.tensor(value)
        expected = {prefix: _shapes(module.state_dict()) for prefix, module in self.networks().items()}
        saved = {prefix: _shapes(tensors) for prefix, tensors in modules.items()}
        names = optim.SLOTS[self.config.optimizer]
        if expected != saved or any(slot.keys() != names for slot in slots.values()) or not state.keys() >= _REST:
            raise RefusedFileError(
                f"state does not fit algorithm {self.name!r} with these settings: it holds {sorted(state)} with "
                f"{saved}, expected {expected} and {self.config.optimizer}'s {sorted(names)}"
            )
        for prefix, module in self.networks().items():
            module.load_state_dict(modules[prefix])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.generator.set_state(torch.tensor(state["rng"]))
        self.updates, self.env_steps, self.gradient_steps = (int(n) for n in state["counters"])


def torch_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one.  Raises: UsageError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} asked for, but torch {torch.__version__} finds no CUDA device")
    return torch.device(name)


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _means(tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    with torch.no_grad():
        means = torch.stack([tensor.detach().float().mean() for tensor in tensors.values()])
    return dict(zip(tensors, means.tolist(), strict=True))


def _numpy(value: torch.Tensor) -> NDArray[Any]:
    array: NDArray[Any] = value.detach().cpu().numpy().copy()
    return array
