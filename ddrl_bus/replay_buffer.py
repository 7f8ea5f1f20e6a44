"""What a replay node keeps: a ring of unroll columns, and a priority for each window that may be drawn. numpy only.

A *segment* is one column of an unroll: its rows, the observation after the last of them, and what the agent carried
before the first. An *item* is a window of `length` consecutive rows of a segment, from one of its first `starts` rows;
its number counts from 0 over the buffer's life and is its place in the ring too. The frames of a stack lie in front of
a segment's observations: each frame is stored once, and those before any row are the ones in front of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
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
_READ_BYTES: Final = 8 << 20
"""Of a snapshot's observations, at a time."""


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
        self._steps = np.arange(self.length + 1)[:, None]
        self.segments = -(-capacity // starts)
        self.capacity = self.segments * starts
        self.next_id = 0
        """Number of the next item, and how many there ever were."""
        self.frames = schema.state[_FRAMES][1][0] if _FRAMES in schema.state else 0
        self._places = self.frames + rows + 1  # of a segment: one index serves observations, frames and rows
        dtype, shape = schema.obs
        obs = np.zeros((self.segments, self._places, *shape), dtype)
        fields = [("version", "int64", ()), *((name, *spec) for name, spec in schema.rows.items())]
        side_by_side = np.zeros(obs.shape[:2], np.dtype(fields, align=True))  # a row is fetched at once, from far away
        self._ring: dict[str, Array] = {
            "obs": obs,
            **{name: side_by_side[name][:, self.frames : -1] for name, *_ in fields},
            **{name: np.zeros((self.segments, *shape), dtype) for name, (dtype, shape) in states.items()},
        }
        """name → [segments, ...]"""
        self._values = {name: _values(array, 1 if name in states else 2) for name, array in self._ring.items()}
        self._states = list(states)
        self._obs, self._rows = self._values["obs"].ravel(), side_by_side.ravel()
        """[place]"""
        self._final: dict[int, Array] = {}
        """place of each truncated row → true final observation"""
        self._bits = np.random.SFC64(seed)
        self._tree = SumTree(self.capacity, np.random.Generator(self._bits))
        self._snapshot: Snapshot | None = None

    @property
    def items(self) -> int:
        return min(self.next_id, self.capacity)

    @property
    def mass(self) -> float:
        """Sum of what the items are drawn in proportion to."""
        return self._tree.total

    @property
    def room(self) -> float:
        """Items from this number on must not be added yet: a snapshot has yet to read those that they would replace."""
        snapshot = self._snapshot  # another thread may release it
        return math.inf if snapshot is None else snapshot.unread + self.capacity

    # ---- in

    def add(self, arrays: Mapping[str, Array]) -> int:
        """Store the columns of an unroll, over the oldest ones; returns how many items those were.

        Args:
            arrays: of a trajectory message of N environments that was checked, with `priority` [starts, N] ≥ 0.

        Raises: UsageError if there are more columns than segments, or than are free of a snapshot.
        """
        columns = int(arrays["obs"].shape[1])
        if columns > self.segments:
            raise UsageError(f"an unroll of {columns} columns came, but there is room for {self.segments}")
        if self.next_id + columns * self.starts > self.room:
            raise UsageError("an unroll came that would overwrite what a snapshot has yet to read")
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
        if self._final:
            for place in self._truncated(np.arange(to.start, to.stop)).tolist():
                del self._final[place]
        for name, ring in self._values.items():
            if name == "version":
                ring[to] = arrays[name]
            elif name in self._states:
                ring[to] = _values(arrays[name], 1)[columns]
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
        place = (segment + column[here] - columns.start) * self._places + self.frames + row[here]
        self._final.update(zip(place.tolist(), arrays["final_obs"][here], strict=True))

    # ---- out

    def sample(self, count: int, allocate: Allocate) -> Mapping[str, Array]:
        """Draw `count` items, each by itself, and gather them once, into what `allocate` gives.

        Returns the arrays of an unroll of `count` columns (`state.*` is what agents carried before the first row of
        their window), with `version` [length, count], `id` [count] int64 and `probability` [count] float64.

        Raises: UsageError if there are none.
        """
        leaf = self._tree.sample(count)
        segment = leaf // self.starts
        first = segment * (self._places - self.starts) + leaf + self.frames
        place = first + self._steps
        rows = self._rows.take(place[:-1], mode="clip")  # "raise" would buffer what is taken
        ended = np.flatnonzero(rows["truncated"])
        out = allocate(self.specs(count, len(ended)))
        for name in ("version", *self.schema.rows):
            _values(out[name], 2)[...] = _values(rows[name], 2)
        for name in self._states:
            self._values[name].take(segment, out=_values(out[name], 1), mode="clip")
        self._obs.take(place, out=_values(out["obs"], 2), mode="clip")
        if self.frames:
            before = first[:, None] + np.arange(-self.frames, 0)
            self._obs.take(before, out=_values(out[_FRAMES], 2), mode="clip")
            out[_FRAMES][self._of_earlier_episodes(before)] = 0
        if len(ended):
            out["final_index"][...] = ended
            for to, key in zip(out["final_obs"], place.ravel()[ended].tolist(), strict=True):
                to[...] = self._final[key]
        rounds, newest = divmod(self.next_id, self.capacity)
        np.add(leaf, rounds * self.capacity, out=out["id"])
        out["id"][leaf.searchsorted(newest) :] -= self.capacity  # leaves come in rising order
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

    def _of_earlier_episodes(self, before: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[count, frames]: whether an episode ended between the frame of that place and the last of its row; what lies
        in front of a segment's rows ends none."""
        rows = self._rows.take(before, mode="clip")
        ended = rows["terminated"] | rows["truncated"]
        earlier: NDArray[np.bool_] = np.logical_or.accumulate(ended[:, ::-1], axis=1)[:, ::-1]
        return earlier

    def _truncated(self, segments: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of the truncated rows of these segments, in their order."""
        n, row = self._ring["truncated"][segments].nonzero()
        place: NDArray[np.int64] = segments[n] * self._places + self.frames + row
        return place

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

    def snapshot(self) -> Snapshot:
        """The contents of this instant, to be written while the buffer goes on; `release` it then."""
        filled = self.items // self.starts
        oldest = self.next_id // self.starts - filled
        segment = (oldest + np.arange(filled)) % self.segments
        final = [self._final[place] for place in self._truncated(segment).tolist()]
        arrays = {
            **{f"ring.{name}": array[segment] for name, array in self._ring.items() if name != "obs"},
            "leaves": self._tree.values(slice(0, self.capacity)).reshape(-1, self.starts)[segment],
            "final.obs": np.stack(final) if final else np.empty((0, *self.schema.obs[1]), self.schema.obs[0]),
            "next_id": np.array([self.next_id], np.int64),
            "rng": self._bits.state["state"]["state"].copy(),
        }
        self._snapshot = Snapshot(arrays, self._ring["obs"], oldest, filled, self.starts)
        return self._snapshot

    def release(self) -> None:
        """Of the snapshot nothing more is read; any thread may say so."""
        self._snapshot = None

    def load_state(self, state: Mapping[str, Array]) -> None:
        """Continue from a snapshot, bit-equal: from its `arrays`, and as `ring.obs` its `obs`.

        Raises: RefusedFileError if it belongs to a buffer of other settings; nothing is changed then.
        """
        next_id = int(state["next_id"][0]) if "next_id" in state else 0
        filled = min(next_id // self.starts, self.segments)
        oldest = next_id // self.starts - filled
        expected = {
            f"ring.{name}": (array.dtype.name, (filled, *array.shape[1:])) for name, array in self._ring.items()
        }
        expected["leaves"] = ("float64", (filled, self.starts))
        dtype, shape = self.schema.obs
        expected["final.obs"] = (dtype, (np.count_nonzero(state.get("ring.truncated", ())), *shape))
        found = {name: (state[name].dtype.name, state[name].shape) for name in expected if name in state}
        if found != expected or "rng" not in state:
            raise RefusedFileError(f"replay contents do not fit these settings: found {found}, expected {expected}")
        segment = (oldest + np.arange(filled)) % self.segments
        for name, ring in self._ring.items():
            ring[segment] = state[f"ring.{name}"]
        self._ring["truncated"][filled:] = False
        leaves = np.zeros((self.segments, self.starts))
        leaves[segment] = state["leaves"]
        self._tree.set_range(0, leaves.ravel())
        self._final = dict(zip(self._truncated(segment).tolist(), state["final.obs"].copy(), strict=True))
        self.next_id = next_id
        self._bits.state = {**self._bits.state, "state": {"state": state["rng"]}}


class Snapshot:
    """The contents of one instant, oldest segment first, for another thread to write while the buffer goes on.

    `arrays` are copies. Observations, the bulk of what images take, are read where they lie: from the oldest on, which
    is the order in which new ones overwrite them, and `ReplayBuffer.add` keeps behind the reader, at `unread`.
    """

    def __init__(self, arrays: dict[str, Array], ring: Array, oldest: int, filled: int, starts: int) -> None:
        self.arrays = arrays
        self.dtype, self.shape = ring.dtype, (filled, *ring.shape[1:])
        """of the observations"""
        self._ring, self._starts = ring, starts
        self._oldest, self._newest = oldest, oldest + filled
        self.unread: float = oldest * starts
        """Number of the first item that is not read yet."""

    def obs(self) -> Iterator[Array]:
        """The observations [segments, rows, ...], some at a time; each is done with when the next is asked for."""
        segments, at_once = len(self._ring), max(1, _READ_BYTES // self._ring[0].nbytes)
        segment = self._oldest
        while segment < self._newest:
            place = segment % segments
            stop = min(place + at_once, segments, place + self._newest - segment)
            yield self._ring[place:stop]
            segment += stop - place
            self.unread = segment * self._starts


def _values(array: Array, dims: int) -> Array:
    """A view in which all but the first `dims` dimensions are one value, moved as a whole: several times as fast."""
    if array.ndim == dims:
        return array
    size = array.dtype.itemsize * math.prod(array.shape[dims:])
    return array.reshape(*array.shape[:dims], -1).view(np.dtype((np.void, size)))[..., 0]
