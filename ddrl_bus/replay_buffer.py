"""What a replay node keeps: a ring of unroll columns, and a priority for each window that may be drawn. numpy only.

A *segment* is one column of an unroll: its rows, the observation after the last of them, and what the agent carried
before the first. An *item* is a window of `length` consecutive rows of a segment, from one of its first `starts` rows;
its number counts from 0 over the buffer's life and is its place in the ring too. The frames of a stack lie in front of
a segment's observations: each frame is stored once, and those before any row are the ones in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.errors import RefusedFileError, UsageError
from ddrl_bus.experience import STATE, UnrollSchema
from ddrl_bus.sum_tree import SumTree

Array = NDArray[Any]
Spec = tuple[str, tuple[int, ...]]
Allocate = Callable[[dict[str, Spec]], Mapping[str, Array]]
"""name → (dtype, shape) to arrays of that kind, C-contiguous: where a batch will travel from or be trained on"""

EPSILON: Final = 1e-6
"""Added to priorities, so that an error of 0 can be drawn again [OpenAI baselines]."""
_FRAMES: Final = STATE + "frames"


class ReplayBuffer:
    """A first-in first-out store of at least `capacity` items.

    Args:
        schema: of windows: what is stored of each row and of an agent's state; its `unroll` is the windows' length.
        rows: of an unroll that is added.
        starts: windows of each of its columns.
        capacity: items, rounded up to whole segments.
        alpha: an item is drawn in proportion to (priority + EPSILON)^alpha; 0 draws all alike.

    Raises: UsageError for windows that leave an unroll, or whose state is not known.
    """

    def __init__(
        self, schema: UnrollSchema, rows: int, starts: int, capacity: int, alpha: float = 0.0, seed: int = 0
    ) -> None:
        states = {name: spec for name, spec in schema.state.items() if name != _FRAMES}
        if starts - 1 + schema.unroll > rows:
            raise UsageError(f"{starts} windows of {schema.unroll} rows do not fit unrolls of {rows} rows")
        if states and starts > 1:
            raise UsageError(f"{', '.join(states)} is known before row 0 alone, but windows start at {starts} rows")
        self.schema, self.rows, self.starts, self.alpha = schema, rows, starts, alpha
        self.length = schema.unroll
        self.segments = -(-capacity // starts)
        self.capacity = self.segments * starts
        self.next_id = 0
        """Number of the next item, and how many there ever were."""
        self.frames = schema.state[_FRAMES][1][0] if _FRAMES in schema.state else 0
        self._states = list(states)
        specs = {"obs": (self.frames + rows + 1, *schema.obs), "version": (rows, "int64", ())}
        specs |= {name: (rows, *spec) for name, spec in schema.rows.items()}
        specs |= {name: (1, *spec) for name, spec in states.items()}
        self._ring = {
            name: np.zeros((self.segments, each, *shape), dtype) for name, (each, dtype, shape) in specs.items()
        }
        self._values = {name: _values(array, 2) for name, array in self._ring.items()}
        """[segments, each]: views of the ring"""
        self._flat = {name: array.ravel() for name, array in self._values.items()}
        self._final: dict[int, Array] = {}
        """segment·rows + row of each truncated row → true final observation"""
        self._bits = np.random.SFC64(seed)
        self._tree = SumTree(self.capacity, np.random.Generator(self._bits))

    @property
    def items(self) -> int:
        return min(self.next_id, self.capacity)

    @property
    def mass(self) -> float:
        """Sum of what the items are drawn in proportion to."""
        return self._tree.total

    # ---- in

    def add(self, arrays: Mapping[str, Array]) -> int:
        """Store the columns of an unroll, over the oldest ones; returns how many items those were.

        Args:
            arrays: of a trajectory message of N environments that was checked, with `priority` [starts, N] ≥ 0.

        Raises: UsageError if there are more columns than segments.
        """
        columns = int(arrays["obs"].shape[1])
        if columns > self.segments:
            raise UsageError(f"an unroll of {columns} columns came, but there is room for {self.segments}")
        evicted = max(0, self.items + columns * self.starts - self.capacity)
        segment = self.next_id // self.starts % self.segments
        before_end = min(columns, self.segments - segment)
        self._write(segment, arrays, slice(0, before_end))
        if before_end < columns:
            self._write(0, arrays, slice(before_end, columns))
        self.next_id += columns * self.starts
        return evicted

    def _write(self, segment: int, arrays: Mapping[str, Array], columns: slice) -> None:
        to = slice(segment, segment + columns.stop - columns.start)
        flat = segment * self.rows
        for gone in np.flatnonzero(self._ring["truncated"][to]).tolist():
            del self._final[flat + gone]
        for name, ring in self._values.items():
            if name == "version":
                ring[to] = arrays[name]
            elif name in self._states:
                ring[to, 0] = _values(arrays[name], 1)[columns]
            elif name == "obs":
                ring[to, self.frames :] = _values(arrays[name], 2)[:, columns].T
            else:
                ring[to] = _values(arrays[name], 2)[:, columns].T
        if self.frames:
            self._values["obs"][to, : self.frames] = _values(arrays[_FRAMES], 2)[columns]
        if "final_index" in arrays:
            self._write_final(segment, arrays, columns)
        self._tree.set_range(segment * self.starts, self._leaf(arrays["priority"][:, columns].T.ravel()))

    def _write_final(self, segment: int, arrays: Mapping[str, Array], columns: slice) -> None:
        row, column = np.divmod(arrays["final_index"], arrays["obs"].shape[1])
        here = (column >= columns.start) & (column < columns.stop)
        flat = (segment + column[here] - columns.start) * self.rows + row[here]
        self._final.update(zip(flat.tolist(), arrays["final_obs"][here], strict=True))

    # ---- out

    def sample(self, count: int, allocate: Allocate) -> Mapping[str, Array]:
        """Draw `count` items, each by itself, and gather them once, into what `allocate` gives.

        Returns the arrays of an unroll of `count` columns (`state.*` is what agents carried before the first row of
        their window), with `version` [length, count], `id` [count] int64 and `probability` [count] float64.

        Raises: UsageError if there are none.
        """
        leaf = self._tree.sample(count)
        segment, start = np.divmod(leaf, self.starts)
        row = segment * self.rows + start + np.arange(self.length)[:, None]
        truncated = self._flat["truncated"].take(row)
        ended = np.flatnonzero(truncated)
        out = allocate(self.specs(count, len(ended)))
        for name in ("version", *self.schema.rows):
            self._gather(name, row, out[name])
        for name in self._states:
            self._gather(name, segment, out[name])
        first = segment * self._ring["obs"].shape[1] + start
        self._gather("obs", first + self.frames + np.arange(self.length + 1)[:, None], out["obs"])
        if self.frames:
            self._gather("obs", first[:, None] + np.arange(self.frames), out[_FRAMES])
            out[_FRAMES][self._of_earlier_episodes(row[0], start)] = 0
        if len(ended):
            out["final_index"][...] = ended
            for to, key in zip(out["final_obs"], row.ravel()[ended].tolist(), strict=True):
                to[...] = self._final[key]
        rounds, newest = divmod(self.next_id, self.capacity)
        out["id"][...] = leaf + self.capacity * (rounds - (leaf >= newest))
        np.divide(self._tree.values(leaf), self.mass, out=out["probability"])
        return out

    def specs(self, count: int, final: int = 0) -> dict[str, Spec]:
        """name → (dtype, shape) of `count` items, of whose rows `final` were truncated."""
        dtype, shape = self.schema.obs
        finals: dict[str, Spec] = {"final_index": ("int64", (final,)), "final_obs": (dtype, (final, *shape))}
        return {
            **self.schema.specs(count),
            "version": ("int64", (self.length, count)),
            "id": ("int64", (count,)),
            "probability": ("float64", (count,)),
            **(finals if final else {}),
        }

    def _gather(self, name: str, index: NDArray[np.int64], out: Array) -> None:
        self._flat[name].take(index, out=_values(out, index.ndim), mode="clip")  # "raise" would buffer

    def _of_earlier_episodes(self, row: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[count, frames]: whether an episode ended between a frame and the row `start` of its segment."""
        back = np.arange(self.frames, 0, -1)
        before = row[:, None] - back
        ends = [self._flat[name].take(before, mode="clip") for name in ("terminated", "truncated")]
        ended = (ends[0] | ends[1]) & (start[:, None] >= back)
        earlier: NDArray[np.bool_] = np.logical_or.accumulate(ended[:, ::-1], axis=1)[:, ::-1]
        return earlier

    # ---- priorities

    def update(self, item: NDArray[np.int64], priority: Array) -> int:
        """New priorities [K] of items by number [K]; of an item that is named twice the last counts.

        Returns how many were ignored, for their items are gone.

        Raises: UsageError for a priority that is negative or no number; nothing is changed then.
        """
        if not ((priority >= 0) & (priority < np.inf)).all():
            raise UsageError("priorities that are negative or no numbers came, expected finite ones of at least 0")
        here = (item >= self.next_id - self.items) & (item < self.next_id)
        self._tree.set(item[here] % self.capacity, self._leaf(priority[here]))
        return len(item) - int(here.sum())

    def _leaf(self, priority: Array) -> NDArray[np.float64]:
        leaf: NDArray[np.float64] = (priority.astype(np.float64) + EPSILON) ** self.alpha
        return leaf

    # ---- state

    def state(self) -> dict[str, Array]:
        """Contents, priorities, numbers and the generator, as a flat mapping. Large arrays are views: copy or write
        them before anything is added."""
        filled = self.items // self.starts
        final = list(self._final.values())
        return {
            **{f"ring.{name}": array[:filled] for name, array in self._ring.items()},
            "leaves": self._tree.values(slice(0, self.items)),
            "final.row": np.array(list(self._final), np.int64),
            "final.obs": np.stack(final) if final else np.empty((0, *self.schema.obs[1]), self.schema.obs[0]),
            "next_id": np.array([self.next_id], np.int64),
            "rng": self._bits.state["state"]["state"].copy(),
        }

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from `state()`, bit-equal.

        Raises: RefusedFileError if it belongs to a buffer of other settings; nothing is changed then.
        """
        next_id = int(state["next_id"][0]) if "next_id" in state else 0
        filled = min(next_id // self.starts, self.segments)
        expected = {
            f"ring.{name}": (array.dtype.name, (filled, *array.shape[1:])) for name, array in self._ring.items()
        }
        expected["leaves"] = ("float64", (filled * self.starts,))
        found = {name: (state[name].dtype.name, state[name].shape) for name in expected if name in state}
        if found != expected or not state.keys() >= {"final.row", "final.obs", "rng"}:
            raise RefusedFileError(f"replay contents do not fit these settings: found {found}, expected {expected}")
        for name, ring in self._ring.items():
            ring[:filled] = state[f"ring.{name}"]
        self._ring["truncated"][filled:] = False
        self._tree.set_range(0, np.zeros(self.capacity))
        self._tree.set_range(0, state["leaves"])
        self._final = dict(zip(state["final.row"].tolist(), state["final.obs"].copy(), strict=True))
        self.next_id = next_id
        self._bits.state = {**self._bits.state, "state": {"state": state["rng"]}}


def _values(array: Array, dims: int) -> Array:
    """A view in which all but the first `dims` dimensions are one value, moved as a whole: several times as fast."""
    if array.ndim == dims:
        return array
    size = array.dtype.itemsize * math.prod(array.shape[dims:])
    return array.reshape(*array.shape[:dims], -1).view(np.dtype((np.void, size)))[..., 0]
