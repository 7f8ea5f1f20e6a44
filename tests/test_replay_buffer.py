"""The replay buffer against a twin that keeps Python lists and cuts windows out of them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from contents import contents
from hypothesis import given, settings
from hypothesis import strategies as st

from ddrl_bus import replay_buffer
from ddrl_bus.errors import RefusedFileError, UsageError
from ddrl_bus.experience import UnrollSchema
from ddrl_bus.replay_buffer import EPSILON, ReplayBuffer, Spec

Arrays = dict[str, np.ndarray[Any, np.dtype[Any]]]
FRAME = ("uint8", (2, 3))


def allocate(specs: Mapping[str, Spec]) -> Arrays:
    return {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}


class Replayed:
    """Windows of `length` rows from unrolls of `rows` rows, and the twin of what a buffer should hold of them."""

    def __init__(self, rows: int, length: int, starts: int, stack: int = 1, lstm: bool = False, seed: int = 0) -> None:
        self.rows, self.length, self.starts, self.stack = rows, length, starts, stack
        self.rng = np.random.default_rng(seed)
        state: dict[str, Spec] = {"frames": (FRAME[0], (stack - 1, *FRAME[1]))} if stack > 1 else {}
        state |= {"h": ("float32", (5,))} if lstm else {}
        action = ("float32", (2,)) if lstm else ("int64", ())
        self.unrolls = UnrollSchema(FRAME, action, {"q": ("float32", ())}, rows, state)
        self.windows = UnrollSchema(FRAME, action, {}, length, state)
        self.segments: list[dict[str, Any]] = []

    def buffer(self, capacity: int, alpha: float = 0.6, seed: int = 0) -> ReplayBuffer:
        return ReplayBuffer(self.windows, self.rows, self.starts, capacity, alpha, seed)

    def unroll(self, envs: int, ends: float = 0.2) -> Arrays:
        """A random one, as it comes from the wire; the twin keeps its columns."""
        rng, arrays = self.rng, allocate(self.unrolls.unroll_specs(envs))
        for array in arrays.values():
            array[...] = rng.integers(1, 100, array.shape)
        arrays["truncated"][...] = rng.random((self.rows, envs)) < ends / 2
        arrays["terminated"][...] = (rng.random((self.rows, envs)) < ends / 2) & ~arrays["truncated"]
        index = np.flatnonzero(arrays["truncated"])
        if len(index):
            arrays["final_index"] = index
            arrays["final_obs"] = rng.integers(0, 255, (len(index), *FRAME[1]), FRAME[0])
        arrays["priority"] = rng.exponential(size=(self.starts, envs)).astype(np.float32)
        for n in range(envs):
            final = {
                i // envs: obs
                for i, obs in zip(index.tolist(), arrays.get("final_obs", np.empty(0)), strict=True)
                if i % envs == n
            }
            column = {
                name: (array[n] if name.startswith("state.") else array[:, n]).copy()
                for name, array in arrays.items()
                if name not in ("version", "final_index", "final_obs")
            }
            self.segments.append({**column, "version": arrays["version"].copy(), "final": final})
        return arrays

    def window(self, item: int) -> dict[str, Any]:
        """What item number `item` is, from lists."""
        segment, start = self.segments[item // self.starts], item % self.starts
        stop = start + self.length
        cut: dict[str, Any] = {name: list(segment[name])[start:stop] for name in ("version", *self.windows.rows)}
        cut["obs"] = list(segment["obs"])[start : stop + 1]
        if "state.h" in segment:
            cut["state.h"] = segment["state.h"]
        if self.stack > 1:
            seen = list(segment["state.frames"])
            for t in range(start):
                seen.append(segment["obs"][t])
                if segment["terminated"][t] or segment["truncated"][t]:
                    seen = [np.zeros(FRAME[1], FRAME[0])] * len(seen)
            cut["state.frames"] = seen[len(seen) - self.stack + 1 :]
        cut["final"] = {t - start: obs for t, obs in segment["final"].items() if start <= t < stop}
        return cut

    def check(self, sampled: Mapping[str, Any]) -> None:
        """Every window that was sampled is the twin's."""
        count = len(sampled["id"])
        finals: dict[int, Any] = dict(
            zip(np.asarray(sampled.get("final_index", [])).tolist(), sampled.get("final_obs", []), strict=True)
        )
        for k, item in enumerate(sampled["id"].tolist()):
            window = self.window(item)
            for t, obs in window.pop("final").items():
                assert np.array_equal(finals.pop(t * count + k), obs)
            for name, expected in window.items():
                found = sampled[name][k] if name.startswith("state.") else sampled[name][:, k]
                assert np.array_equal(found, expected), f"{name} of item {item}"
        assert not finals


SHAPES = [
    pytest.param({"rows": 8, "length": 3, "starts": 6}, id="n-step"),
    pytest.param({"rows": 8, "length": 1, "starts": 8}, id="one step"),
    pytest.param({"rows": 7, "length": 3, "starts": 5, "stack": 4}, id="stacked"),
    pytest.param({"rows": 4, "length": 2, "starts": 3, "stack": 9}, id="a stack longer than the unroll"),
    pytest.param({"rows": 6, "length": 6, "starts": 1, "stack": 2, "lstm": True}, id="sequence"),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ends", [0.0, 0.4, 2.0])
def test_windows_are_those_of_the_twin(shape: dict[str, Any], ends: float) -> None:
    twin = Replayed(**shape)
    buffer = twin.buffer(capacity=10 * shape["starts"])
    for envs in (1, 3, 4, 2, 5, 10, 7, 4):  # over the ring's end, several times round
        buffer.add(twin.unroll(envs, ends))
        sampled = buffer.sample(40, allocate)

        twin.check(sampled)
        newest = len(twin.segments) * shape["starts"]
        assert sampled["id"].min() >= newest - buffer.capacity
        assert buffer.next_id == newest
        state = contents(buffer)
        assert len(state["final.obs"]) == state["ring.truncated"].sum() == len(buffer._final)


def test_the_oldest_go_first() -> None:
    twin = Replayed(rows=4, length=2, starts=3)
    buffer = twin.buffer(capacity=13, alpha=0)  # 5 segments

    assert buffer.capacity == 15
    assert [buffer.add(twin.unroll(2)) for _ in range(4)] == [0, 0, 3, 6]
    assert (buffer.items, buffer.next_id) == (15, 24)
    assert set(buffer.sample(2_000, allocate)["id"].tolist()) == set(range(9, 24))


def test_draws_follow_the_priorities() -> None:
    twin = Replayed(rows=6, length=2, starts=5)
    buffer = twin.buffer(capacity=200, alpha=0.7)
    unrolls = [twin.unroll(10) for _ in range(6)]
    for unroll in unrolls:
        buffer.add(unroll)
    leaf = (np.concatenate([u["priority"].T.ravel() for u in unrolls])[100:300].astype(np.float64) + EPSILON) ** 0.7

    drawn = buffer.sample(200_000, allocate)

    expected = leaf / leaf.sum()
    assert buffer.mass == pytest.approx(leaf.sum(), rel=1e-12)
    assert drawn["probability"] == pytest.approx(expected[drawn["id"] - 100], rel=1e-12)
    count = np.bincount(drawn["id"] - 100, minlength=200)
    statistic = ((count - 200_000 * expected) ** 2 / (200_000 * expected)).sum()
    assert statistic < 199 + 5 * np.sqrt(2 * 199)


def test_alpha_0_draws_all_alike() -> None:
    twin = Replayed(rows=6, length=2, starts=5)
    buffer = twin.buffer(capacity=50, alpha=0)
    unroll = twin.unroll(4)
    unroll["priority"][2] = 0
    buffer.add(unroll)

    assert buffer.mass == buffer.items == 20
    assert np.array_equal(buffer.sample(9, allocate)["probability"], np.full(9, 0.05))


def test_new_priorities_are_used_and_late_ones_ignored() -> None:
    twin = Replayed(rows=4, length=2, starts=3)
    buffer = twin.buffer(capacity=15, alpha=1)
    for _ in range(4):
        buffer.add(twin.unroll(2))  # items 9 to 23
    everything = np.arange(24)

    assert buffer.update(everything, np.zeros(24, np.float32)) == 9
    assert buffer.update(np.array([11, 24, 8, 11, -1]), np.array([7, 9, 9, 3, 9], np.float32)) == 3

    assert buffer.mass == pytest.approx(3 + 15 * EPSILON, rel=1e-12)
    assert (buffer.sample(1_000, allocate)["id"] == 11).all()
    assert buffer.update(np.empty(0, np.int64), np.empty(0, np.float32)) == 0


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_priority_that_is_none_changes_nothing(bad: float) -> None:
    twin = Replayed(rows=4, length=2, starts=3)
    buffer = twin.buffer(capacity=15)
    buffer.add(twin.unroll(2))
    mass = buffer.mass

    with pytest.raises(UsageError, match="finite"):
        buffer.update(np.array([0, 1]), np.array([5, bad], np.float32))

    assert buffer.mass == mass


@given(
    shape=st.sampled_from([param.values[0] for param in SHAPES]),
    before=st.lists(st.integers(1, 6), max_size=6),
    after=st.lists(st.integers(1, 6), max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_a_restored_buffer_goes_on_as_if_nothing_had_happened(
    shape: dict[str, Any], before: list[int], after: list[int], seed: int
) -> None:
    twin = Replayed(**shape, seed=seed)
    buffer, again = (twin.buffer(6 * shape["starts"], seed=which) for which in (seed, seed + 1))
    again.add(twin.unroll(6, ends=1.0))  # what it holds is forgotten
    twin.segments.clear()
    for envs in before:
        buffer.add(twin.unroll(envs))
        buffer.update(twin.rng.integers(0, buffer.next_id, 5), twin.rng.random(5))

    again.load_state(contents(buffer))
    for envs in [*after, 1]:
        unroll = twin.unroll(envs)
        assert buffer.add(unroll) == again.add(unroll)
        ours, theirs = (each.sample(20, allocate) for each in (buffer, again))

        twin.check(theirs)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = contents(buffer), contents(again)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("before", [2, 4, 5, 12], ids=["half full", "full", "just over", "several times round"])
def test_a_snapshot_is_of_its_instant_however_slowly_it_is_read(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Unrolls are added wherever they may be, priorities change and items are drawn between any two parts."""
    monkeypatch.setattr(replay_buffer, "_READ_BYTES", 1)
    twin = Replayed(rows=7, length=3, starts=5, stack=4)
    buffer, again = twin.buffer(8 * 5), twin.buffer(8 * 5)
    for _ in range(before):
        buffer.add(twin.unroll(2))
    expected = contents(buffer)

    snapshot, read, added = buffer.snapshot(), [], 0
    for part in snapshot.obs():
        while buffer.next_id + 5 <= buffer.room:
            buffer.add(twin.unroll(1, ends=2.0))
            added += 1
        with pytest.raises(UsageError, match="yet to read"):
            buffer.add(twin.unroll(1))
        twin.segments.pop()
        buffer.update(np.arange(buffer.next_id), np.full(buffer.next_id, 9.0))
        buffer.sample(10, allocate)
        read.append(part.copy())
    buffer.add(twin.unroll(1))
    buffer.release()
    buffer.add(twin.unroll(8))

    found = {**snapshot.arrays, "ring.obs": np.concatenate(read)}
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert added == 7
    again.load_state(found)
    assert (again.next_id, len(read)) == (before * 10, min(2 * before, 8))
    twin.check(again.sample(40, allocate))
    twin.check(buffer.sample(40, allocate))


def test_the_state_of_another_buffer_is_refused() -> None:
    twin = Replayed(rows=4, length=2, starts=3)
    buffer, smaller = twin.buffer(15), twin.buffer(6)
    buffer.add(twin.unroll(3))

    for state in (contents(buffer), {}):
        with pytest.raises(RefusedFileError, match="do not fit"):
            smaller.load_state(state)
        assert smaller.items == 0


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="4 windows of 2 rows do not fit unrolls of 4 rows"):
        Replayed(rows=4, length=2, starts=4).buffer(10)
    with pytest.raises(UsageError, match=r"state\.h is known before row 0 alone"):
        Replayed(rows=4, length=2, starts=3, lstm=True).buffer(10)
    twin = Replayed(rows=4, length=2, starts=3)
    with pytest.raises(UsageError, match="3 columns came, but there is room for 2"):
        twin.buffer(6).add(twin.unroll(3))
    with pytest.raises(UsageError, match="nothing to draw"):
        twin.buffer(6).sample(1, allocate)
