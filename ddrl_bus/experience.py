"""How experience lies in memory: unrolls as actors write them, batches as learners fill them. numpy only.

Row t of an unroll holds obs_t, the action taken *from* it, and the reward and end flags that action led to; row T of
`obs` is the bootstrap row. After an end, obs_{t+1} is the first observation of the next episode. The true final
observations of *truncated* rows follow in `final_obs`, at the rows that `final_index` names as t·N + n; a terminated
row needs none. `version` [T] names the weights that chose each row's actions, and `state.*` [N, ...] is what the agents
carried before row 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ddrl_bus.messages import Trajectory
from ddrl_bus.transport.wire import Arena, Array, Layout, Message, Spec

RECORD: Final = "record."
"""Prefix of the arrays that the algorithm's `act` recorded."""
STATE: Final = "state."
"""Prefix of the arrays that agents carry from step to step, as they were before row 0."""
FINAL: Final = ("final_index", "final_obs")

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""name → (dtype, shape of one row of one environment)"""


class UnrollSchema:
    """The arrays of one unroll: T rows of N environments, as one literal.

    Args:
        obs, action: (dtype, shape) of one observation and one action.
        record: what the algorithm records per row.
        unroll: T.
        state: what an agent carries from step to step.
    """

    def __init__(self, obs: Spec, action: Spec, record: Shapes, unroll: int, state: Shapes | None = None) -> None:
        self.unroll = unroll
        self.obs = obs
        self.state: dict[str, Spec] = {STATE + name: spec for name, spec in (state or {}).items()}
        self.rows: dict[str, Spec] = {
            "action": action,
            "reward": ("float32", ()),
            "terminated": ("bool", ()),
            "truncated": ("bool", ()),
            **{RECORD + name: spec for name, spec in record.items()},
        }

    def specs(self, envs: int) -> dict[str, Spec]:
        """name → (dtype, shape) of what an unroll of `envs` environments and a batch of as many columns both hold."""
        dtype, shape = self.obs
        return {
            "obs": (dtype, (self.unroll + 1, envs, *shape)),
            **{name: (dtype, (self.unroll, envs, *shape)) for name, (dtype, shape) in self.rows.items()},
            **{name: (dtype, (envs, *shape)) for name, (dtype, shape) in self.state.items()},
        }

    def unroll_specs(self, envs: int) -> dict[str, Spec]:
        return {**self.specs(envs), "version": ("int64", (self.unroll,))}

    def layout(self, envs: int) -> Layout:
        return Layout(Trajectory.KIND, self.unroll_specs(envs))

    def check(self, message: Message) -> str | None:
        """Why a receiver refuses this unroll (`schema`, `non_finite`), or None. Any number of environments will do."""
        arrays = message.arrays
        obs = arrays.get("obs")
        if obs is None or obs.ndim < 2:
            return "schema"
        envs = obs.shape[1]
        for name, (dtype, shape) in self.unroll_specs(envs).items():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype.name != dtype:
                return "schema"
        if not self._final_fits(arrays, envs):
            return "schema"
        floats = (array for array in arrays.values() if array.dtype.kind == "f")
        return None if all(np.isfinite(array).all() for array in floats) else "non_finite"

    def _final_fits(self, arrays: Mapping[str, Array], envs: int) -> bool:
        index, obs = (arrays.get(name) for name in FINAL)
        if index is None or obs is None:
            return index is obs and not arrays["truncated"].any()
        dtype, shape = self.obs
        return (
            index.dtype == np.int64
            and index.ndim == 1
            and obs.dtype.name == dtype
            and obs.shape == (len(index), *shape)
            and np.array_equal(index, np.flatnonzero(arrays["truncated"]))
        )


class Unroll:
    """One unroll being written, straight into the bytes that will travel."""

    def __init__(self, layout: Layout) -> None:
        self.arena: Arena = layout.arena()
        self.rows = self.arena.arrays
        self._final: list[tuple[Array, Array]] = []

    def truncated(self, t: int, envs: Array, obs: Array) -> None:
        """True final observations of the environments that row t truncated, in the order of `envs`."""
        self._final.append((t * self.rows["reward"].shape[1] + np.asarray(envs, np.int64), obs))

    def finish(self) -> Arena:
        """The arena to send."""
        if not self._final:
            return self.arena
        index = np.concatenate([index for index, _ in self._final])
        obs = np.concatenate([obs for _, obs in self._final])
        return self.arena.extended({"final_index": index, "final_obs": obs})


Allocate = Callable[[str, tuple[int, ...]], Array]
"""(dtype, shape) → array: plain memory, or memory pinned for a GPU."""


@dataclass(slots=True)
class Slot:
    """A batch being filled: `rows` are [T(+1), B, ...], time-major, one column per environment's unroll; what agents
    carried before row 0 is among them, [B, ...]."""

    rows: dict[str, Array]
    version: Array
    """[T, B] int64: the updates at the weights that chose the action."""
    columns: int = 0
    messages: int = 0
    """Messages whose last column is in here."""
    final: list[tuple[Array, Array]] = field(default_factory=list)

    @property
    def width(self) -> int:
        return int(self.version.shape[1])

    @property
    def full(self) -> bool:
        return self.columns == self.width

    def final_rows(self, obs: Spec) -> tuple[Array, Array]:
        """(final_index [K], final_obs [K, ...]) of the whole batch; K may be 0."""
        if not self.final:
            return np.empty(0, np.int64), np.empty((0, *obs[1]), obs[0])
        return np.concatenate([i for i, _ in self.final]), np.concatenate([o for _, o in self.final])

    def clear(self) -> None:
        self.columns = self.messages = 0
        self.final = []


def _plain(dtype: str, shape: tuple[int, ...]) -> Array:
    return np.empty(shape, dtype)


class BatchSlots:
    """A few batches' worth of memory, filled column by column: each unroll is copied once, to where it is trained on.

    Args:
        batch: B, columns.
        slots: how many batches exist: one is filled, one waits, one is trained on.
    """

    def __init__(self, schema: UnrollSchema, batch: int, slots: int = 3, allocate: Allocate = _plain) -> None:
        self.schema = schema
        specs = schema.specs(batch)
        self.free = [
            Slot({name: allocate(*spec) for name, spec in specs.items()}, allocate("int64", (schema.unroll, batch)))
            for _ in range(slots)
        ]

    def copy(self, slot: Slot, message: Message, start: int) -> int:
        """Copy the unroll's columns from `start` on, as many as fit; returns the first column left over."""
        arrays = message.arrays
        envs = int(arrays["obs"].shape[1])
        stop = min(envs, start + slot.width - slot.columns)
        to = slice(slot.columns, slot.columns + stop - start)
        for name, rows in slot.rows.items():
            if name in self.schema.state:
                rows[to] = arrays[name][start:stop]
            else:
                rows[:, to] = arrays[name][:, start:stop]
        slot.version[:, to] = arrays["version"][:, None]
        self._copy_final(slot, arrays, envs, start, stop)
        slot.columns += stop - start
        if stop == envs:
            slot.messages += 1
        return stop

    def _copy_final(self, slot: Slot, arrays: Mapping[str, Array], envs: int, start: int, stop: int) -> None:
        index = arrays.get("final_index")
        if index is None:
            return
        t, column = np.divmod(index, envs)
        here = (column >= start) & (column < stop)
        slot.final.append((t[here] * slot.width + column[here] - start + slot.columns, arrays["final_obs"][here]))


def under(prefix: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays whose names begin with `prefix` (RECORD, STATE), under the algorithm's own names."""
    return {name.removeprefix(prefix): array for name, array in rows.items() if name.startswith(prefix)}
