"""How experience lies in memory: unrolls as actors write them, batches as learners fill them. numpy only.

Row t of an unroll holds obs_t, the action taken *from* it, and the reward and end flags that action led to; row T of
`obs` is the bootstrap row. After an end, obs_{t+1} is the first observation of the next episode. The true final
observations of *truncated* rows follow in `final_obs`, at the rows that `final_index` names as t·N + n; a terminated
row needs none. `version` [T] names the weights that chose each row's actions, and `state.*` [N, ...] is what the agents
carried before row 0.

Where windows of unrolls are replayed, the last `overlap` rows of one are the first of the next, so that a window may
begin at any row, and `priority` [starts, N] says how much there is to learn from the windows that begin at its first
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
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
PRIORITY: Final = "priority"

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]
"""name → (dtype, shape of one row of one environment)"""
Priorities = Callable[[Mapping[str, Array], Mapping[str, Array]], Array]
"""(rows, record) of an unroll → [starts, N] first priorities of its windows"""


class UnrollSchema:
    """The arrays of one unroll: T rows of N environments, as one literal.

    Args:
        obs, action: (dtype, shape) of one observation and one action.
        record: what the algorithm records per row.
        unroll: T.
        state: what an agent carries from step to step.
        overlap: rows with which an unroll ends and the next one begins.
        starts: windows that are replayed, one from each of the first rows; 0 where none are.
        least: fewest rows of an unroll that ended early; default: none does.
    """

    def __init__(
        self,
        obs: Spec,
        action: Spec,
        record: Shapes,
        unroll: int,
        state: Shapes | None = None,
        overlap: int = 0,
        starts: int = 0,
        least: int | None = None,
    ) -> None:
        self.unroll, self.overlap, self.starts = unroll, overlap, starts
        self.least = unroll if least is None else least
        self.obs = obs
        self._drawn = False
        self.state: dict[str, Spec] = {STATE + name: spec for name, spec in (state or {}).items()}
        self.rows: dict[str, Spec] = {
            "action": action,
            "reward": ("float32", ()),
            "terminated": ("bool", ()),
            "truncated": ("bool", ()),
            **{RECORD + name: spec for name, spec in record.items()},
        }

    def windows(self, length: int) -> UnrollSchema:
        """Of the windows of `length` rows that a replay node draws from such unrolls: each is a column with versions of
        its own, `version` [length, N], and without what `act` recorded."""
        windows = copy(self)
        windows.unroll = windows.least = length
        windows.overlap, windows.starts, windows._drawn = 0, 0, True
        windows.rows = {name: spec for name, spec in self.rows.items() if not name.startswith(RECORD)}
        return windows

    def specs(self, envs: int, rows: int | None = None) -> dict[str, Spec]:
        """name → (dtype, shape) of what an unroll of `envs` environments and a batch of as many columns both hold."""
        dtype, shape = self.obs
        rows = rows or self.unroll
        return {
            "obs": (dtype, (rows + 1, envs, *shape)),
            **{name: (dtype, (rows, envs, *shape)) for name, (dtype, shape) in self.rows.items()},
            **{name: (dtype, (envs, *shape)) for name, (dtype, shape) in self.state.items()},
        }

    def unroll_specs(self, envs: int, rows: int | None = None) -> dict[str, Spec]:
        rows = rows or self.unroll
        specs = {**self.specs(envs, rows), "version": ("int64", (rows, envs) if self._drawn else (rows,))}
        return specs if not self.starts else {**specs, PRIORITY: ("float32", (self.starts, envs))}

    def layout(self, envs: int) -> Layout:
        return Layout(Trajectory.KIND, self.unroll_specs(envs))

    def check(self, message: Message) -> str | None:
        """Why a receiver refuses this unroll (`schema`, `non_finite`, `negative` priorities), or None. Any number of
        environments will do."""
        arrays = message.arrays
        obs = arrays.get("obs")
        if obs is None or obs.ndim < 2:
            return "schema"
        rows, envs = obs.shape[0] - 1, obs.shape[1]
        if not self.least <= rows <= self.unroll:
            return "schema"
        for name, (dtype, shape) in self.unroll_specs(envs, rows).items():
            array = arrays.get(name)
            if array is None or array.shape != shape or array.dtype != dtype:
                return "schema"
        if not self._final_fits(arrays, envs) or message.fields.get("overlap", 0) not in (0, self.overlap):
            return "schema"
        floats = (array for array in arrays.values() if array.dtype.kind == "f")
        if not all(np.isfinite(array).all() for array in floats):
            return "non_finite"
        return "negative" if self.starts and (arrays[PRIORITY] < 0).any() else None

    def _final_fits(self, arrays: Mapping[str, Array], envs: int) -> bool:
        index, obs = (arrays.get(name) for name in FINAL)
        if index is None or obs is None:
            return index is obs and not arrays["truncated"].any()
        dtype, shape = self.obs
        return (
            index.dtype == np.int64
            and index.ndim == 1
            and obs.dtype == dtype
            and obs.shape == (len(index), *shape)
            and np.array_equal(index, np.flatnonzero(arrays["truncated"]))
        )


class Unroll:
    """One unroll being written, straight into the bytes that will travel.

    Args:
        overlap: rows with which it ends and the next one begins.
        priorities: of its windows, where they are replayed.
    """

    def __init__(self, layout: Layout, overlap: int = 0, priorities: Priorities | None = None) -> None:
        self.arena: Arena = layout.arena()
        self.rows = self.arena.arrays
        self.length, self._envs = self.rows["reward"].shape
        self.first = 0
        """The first row to write; those before it came from the unroll before."""
        self._new: int = self.length - overlap
        self._priorities = priorities
        self._final: list[tuple[int, Array, Array]] = []
        self._states: dict[int, dict[str, Array]] = {}
        """Row → what the agents carried into it, of rows with which later unrolls begin."""

    def follow(self, before: Unroll) -> None:
        """Begin with the last rows of `before`, which is whole."""
        self.first, new = self.length - self._new, self._new
        for name, array in before.rows.items():
            if not name.startswith(STATE) and name != PRIORITY:
                self.rows[name][: self.first] = array[new : self.length]
        self._final = [(t - new, envs, obs) for t, envs, obs in before._final if t >= new]
        for t, state in before._states.items():
            self.carried(t - new, state)

    def begins(self, t: int) -> bool:
        """Whether an unroll begins with row t: this one, or a later one."""
        return t % self._new == 0

    def carried(self, t: int, state: Mapping[str, Array]) -> None:
        """What the agents carry into row t, which is copied if an unroll begins there."""
        if t == 0:
            for name, array in state.items():
                self.rows[STATE + name][...] = array
        elif self.begins(t):
            self._states[t] = {name: array.copy() for name, array in state.items()}

    def truncated(self, t: int, envs: Array, obs: Array) -> None:
        """True final observations of the environments that row t truncated, in the order of `envs`."""
        self._final.append((t, np.asarray(envs, np.int64), obs))

    def cut(self, rows: int) -> None:
        """Ends it early, after so many rows."""
        if rows < self.length:
            timed = {name: array[:rows] for name, array in self.rows.items() if not name.startswith(STATE)}
            self.arena = Arena.of(Trajectory.KIND, {**self.rows, **timed, "obs": self.rows["obs"][: rows + 1]})
            self.rows, self.length = self.arena.arrays, rows

    def finish(self) -> Arena:
        """The arena to send."""
        if self._priorities is not None:
            self.rows[PRIORITY][...] = self._priorities(self.rows, under(RECORD, self.rows))
        if not self._final:
            return self.arena
        index = np.concatenate([t * self._envs + envs for t, envs, _ in self._final])
        obs = np.concatenate([obs for _, _, obs in self._final])
        return self.arena.extended({"final_index": index, "final_obs": obs})


class Unrolls:
    """The unrolls of one vector of environments, one after the other.

    Args:
        priorities: of their windows, where the schema has such.
    """

    def __init__(self, schema: UnrollSchema, envs: int, priorities: Priorities | None = None) -> None:
        self._layout, self._overlap = schema.layout(envs), schema.overlap
        self._priorities = priorities if schema.starts else None
        self._last: Unroll | None = None

    def next(self) -> Unroll:
        """The one to write now; the one before is whole."""
        unroll = Unroll(self._layout, self._overlap, self._priorities)
        if self._last is not None:
            unroll.follow(self._last)
        self._last = unroll if self._overlap else None
        return unroll

    def restart(self) -> None:
        """The next one has nothing to do with those before: their episodes were broken off."""
        self._last = None


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
    length: int = 0
    """Rows of its unrolls: T, or fewer where they ended early."""
    messages: int = 0
    """Messages whose last column is in here."""
    final: list[tuple[Array, Array]] = field(default_factory=list)
    env_steps: int = 0
    """What training on it adds to the run's."""
    weight: Array | None = None
    """[B] float32 importance weights; None where all columns count alike."""
    errors: Array | None = None
    """[B] float32 priorities that training on it found, if it does."""

    @property
    def width(self) -> int:
        return int(self.version.shape[1])

    @property
    def full(self) -> bool:
        return self.columns == self.width

    @property
    def steps(self) -> int:
        """Environment steps that it holds."""
        return self.length * self.columns

    def final_rows(self, obs: Spec) -> tuple[Array, Array]:
        """(final_index [K], final_obs [K, ...]) of the whole batch; K may be 0."""
        if not self.final:
            return np.empty(0, np.int64), np.empty((0, *obs[1]), obs[0])
        return np.concatenate([i for i, _ in self.final]), np.concatenate([o for _, o in self.final])

    def clear(self) -> None:
        self.columns = self.length = self.messages = self.env_steps = 0
        self.final = []
        self.weight = self.errors = None


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
                rows[: len(arrays[name]), to] = arrays[name][:, start:stop]
        version = arrays["version"]
        slot.length = len(version)
        slot.version[: slot.length, to] = version[:, None] if version.ndim == 1 else version[:, start:stop]
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
