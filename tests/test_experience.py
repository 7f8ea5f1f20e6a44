"""Unrolls as actors write them, and batches as learners fill them, against a twin that copies element by element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddrl_bus.experience import RECORD, BatchSlots, Slot, Unroll, UnrollSchema, under
from ddrl_bus.nodes.batches import batch_of
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Array, Message

T = 3
SCHEMA = UnrollSchema(
    ("float32", (2,)), ("int64", ()), {"policy": ("float32", (4,))}, T, {"h": ("float32", (3,)), "last": ("int64", ())}
)


@dataclass(frozen=True)
class Played:
    """An unroll as a list of what happened: the twin's view of it."""

    message: Message
    version: int

    @property
    def envs(self) -> int:
        return int(self.message.arrays["reward"].shape[1])


def played(envs: int, seed: int = 0, truncated: Sequence[tuple[int, int]] = (), version: int = 0) -> Played:
    """An unroll of random rows that went over the wire; `truncated` lists (t, env)."""
    rng = np.random.default_rng(seed)
    unroll = Unroll(SCHEMA.layout(envs))
    rows = unroll.rows
    rows["obs"][...] = rng.normal(size=rows["obs"].shape)
    rows["action"][...] = rng.integers(0, 4, rows["action"].shape)
    rows["reward"][...] = rng.normal(size=rows["reward"].shape)
    rows["record.policy"][...] = rng.normal(size=rows["record.policy"].shape)
    rows["version"][...] = version + np.arange(T)
    rows["state.h"][...] = rng.normal(size=rows["state.h"].shape)
    rows["state.last"][...] = np.arange(envs)
    rows["terminated"][...] = False
    rows["truncated"][...] = False
    for t in range(T):
        here = np.array(sorted(env for row, env in truncated if row == t), np.int64)
        rows["truncated"][t, here] = True
        if len(here):
            unroll.truncated(t, here, final(seed, t, here))
    rows["terminated"][...] = (rng.random(rows["terminated"].shape) < 0.2) & ~rows["truncated"]
    return Played(wire.decode(unroll.finish().encode("actor-0", 1, seed + 1, {})), version)


def final(seed: int, t: int, envs: Array) -> Array:
    """A final observation that tells where it is from."""
    return np.stack([np.full(len(envs), seed * 100.0 + t), envs * 1.0], axis=1).astype(np.float32)


def changed(message: Message, **arrays: Array | None) -> Message:
    new = {**message.arrays, **arrays}
    return replace(message, arrays={name: array for name, array in new.items() if array is not None})


# ── the actor's side ─────────────────────────────────────────────────────────────────────────────────────────────


def test_an_unroll_without_truncation_has_no_final_rows() -> None:
    message = played(envs=2).message
    assert list(message.arrays) == [
        *("obs", "action", "reward", "terminated", "truncated", "record.policy", "state.h", "state.last", "version")
    ]
    assert message.arrays["obs"].shape == (T + 1, 2, 2)
    assert SCHEMA.check(message) is None


def test_final_rows_stand_at_their_truncated_rows() -> None:
    message = played(envs=4, seed=5, truncated=[(0, 3), (2, 0), (2, 1)]).message
    assert message.arrays["final_index"].tolist() == [0 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1]
    assert message.arrays["final_obs"].tolist() == [[500, 3], [502, 0], [502, 1]]
    assert SCHEMA.check(message) is None


def test_rows_are_written_where_they_travel() -> None:
    unroll = Unroll(SCHEMA.layout(2))
    assert unroll.finish() is unroll.arena
    assert unroll.rows["obs"] is unroll.arena.arrays["obs"]


def test_recorded_arrays_by_the_algorithms_names() -> None:
    arrays = played(envs=1).message.arrays
    assert list(under(RECORD, arrays)) == ["policy"]
    assert under(RECORD, arrays)["policy"] is arrays["record.policy"]


# ── what a learner refuses ───────────────────────────────────────────────────────────────────────────────────────

WHOLE = played(envs=3, truncated=[(1, 0), (1, 2)]).message
ROWS = {name: array for name, array in WHOLE.arrays.items() if not name.startswith("final")}
INDEX, OBS = WHOLE.arrays["final_index"], WHOLE.arrays["final_obs"]


@pytest.mark.parametrize("envs", [1, 2, 7, 64])
def test_any_number_of_environments_will_do(envs: int) -> None:
    assert SCHEMA.check(played(envs).message) is None


@pytest.mark.parametrize("name", list(ROWS))
def test_a_missing_array_is_refused(name: str) -> None:
    assert SCHEMA.check(changed(WHOLE, **{name: None})) == "schema"


@pytest.mark.parametrize("name", list(ROWS))
def test_another_dtype_is_refused(name: str) -> None:
    assert SCHEMA.check(changed(WHOLE, **{name: ROWS[name].astype(np.float64)})) == "schema"


@pytest.mark.parametrize("name", list(ROWS))
@pytest.mark.parametrize("cut", [np.s_[:-1], np.s_[..., :-1], np.s_[..., None]], ids=["rows", "last", "rank"])
def test_another_shape_is_refused(name: str, cut: Any) -> None:
    assert SCHEMA.check(changed(WHOLE, **{name: ROWS[name][cut]})) == "schema"


@pytest.mark.parametrize("obs", [np.zeros(()), np.zeros(T + 1, np.float32)], ids=["scalar", "vector"])
def test_observations_without_environments_are_refused(obs: Array) -> None:
    assert SCHEMA.check(changed(WHOLE, obs=obs)) == "schema"


FINALS: dict[str, dict[str, Array | None]] = {
    "none for truncated rows": {"final_index": None, "final_obs": None},
    "no index": {"final_index": None},
    "no observations": {"final_obs": None},
    "one too few": {"final_index": INDEX[:1], "final_obs": OBS[:1]},
    "another row": {"final_index": INDEX + 1},
    "out of order": {"final_index": INDEX[::-1], "final_obs": OBS[::-1]},
    "twice the same": {"final_index": INDEX[[0, 0]]},
    "beyond the unroll": {"final_index": INDEX + 1000},
    "negative": {"final_index": -INDEX},
    "more observations than rows": {"final_obs": OBS[[0, 1, 1]]},
    "index of another dtype": {"final_index": INDEX.astype(np.int32)},
    "index of another rank": {"final_index": INDEX[:, None]},
    "observations of another dtype": {"final_obs": OBS.astype(np.float64)},
    "observations of another shape": {"final_obs": OBS[:, :1]},
    "for rows that go on": {"truncated": np.zeros((T, 3), np.bool_)},
}


@pytest.mark.parametrize("change", FINALS.values(), ids=FINALS.keys())
def test_final_rows_that_do_not_fit_are_refused(change: dict[str, Array | None]) -> None:
    assert SCHEMA.check(changed(WHOLE, **change)) == "schema"


@pytest.mark.parametrize("name", ["obs", "reward", "record.policy", "final_obs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(name: str, value: float) -> None:
    poisoned = WHOLE.arrays[name].copy()
    poisoned.flat[-1] = value
    assert SCHEMA.check(changed(WHOLE, **{name: poisoned})) == "non_finite"


# ── windows that are replayed ────────────────────────────────────────────────────────────────────────────────────

REPLAYED = UnrollSchema(("float32", (2,)), ("int64", ()), {"q": ("float32", ())}, 7, {"h": ("float32", (3,))}, 2, 5)


def replayed(envs: int = 3, fields: dict[str, Any] | None = None, **arrays: Array | None) -> Message:
    """An unroll of zeros that went over the wire, with other arrays in it."""
    unroll = Unroll(REPLAYED.layout(envs))
    for array in unroll.rows.values():
        array[...] = 0
    return changed(wire.decode(unroll.finish().encode("actor-0", 1, 1, fields or {})), **arrays)


def test_windows_come_with_priorities() -> None:
    specs = REPLAYED.unroll_specs(3)
    assert specs["priority"] == ("float32", (5, 3))
    assert specs["obs"] == ("float32", (8, 3, 2))
    assert "priority" not in SCHEMA.unroll_specs(3)
    assert REPLAYED.check(replayed(priority=np.full((5, 3), 9, np.float32))) is None


@pytest.mark.parametrize(
    ("priority", "reason"),
    [
        (None, "schema"),
        (np.zeros((5, 3)), "schema"),
        (np.zeros((4, 3), np.float32), "schema"),
        (np.zeros((5, 2), np.float32), "schema"),
        (np.full((5, 3), np.nan, np.float32), "non_finite"),
        (np.full((5, 3), np.inf, np.float32), "non_finite"),
        (np.full((5, 3), -1e-9, np.float32), "negative"),
    ],
)
def test_priorities_that_are_none_are_refused(priority: Array | None, reason: str) -> None:
    assert REPLAYED.check(replayed(priority=priority)) == reason


@pytest.mark.parametrize(("overlap", "reason"), [(0, None), (2, None), (1, "schema"), (-1, "schema"), (7, "schema")])
def test_an_unroll_follows_or_does_not(overlap: int, reason: str | None) -> None:
    assert REPLAYED.check(replayed(fields={"overlap": overlap})) == reason
    assert SCHEMA.check(replace(WHOLE, fields={"overlap": 2})) == "schema"


def test_windows_have_versions_of_their_own_and_no_record() -> None:
    windows = REPLAYED.windows(2)
    assert windows.unroll_specs(4) == {
        "obs": ("float32", (3, 4, 2)),
        "action": ("int64", (2, 4)),
        "reward": ("float32", (2, 4)),
        "terminated": ("bool", (2, 4)),
        "truncated": ("bool", (2, 4)),
        "state.h": ("float32", (4, 3)),
        "version": ("int64", (2, 4)),
    }
    assert "record.q" in REPLAYED.rows
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in windows.unroll_specs(4).items()}
    assert windows.check(replace(WHOLE, arrays=arrays)) is None
    assert windows.check(replace(WHOLE, arrays={**arrays, "version": np.zeros(2, np.int64)})) == "schema"


def test_a_batch_of_windows_keeps_each_ones_versions() -> None:
    windows = REPLAYED.windows(2)
    slots = BatchSlots(windows, batch=5, slots=1)
    slot = slots.free.pop()
    for first, n in ((0, 2), (20, 4)):
        arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in windows.unroll_specs(n).items()}
        arrays["version"][...] = first + np.arange(2 * n).reshape(2, n)
        left = slots.copy(slot, replace(WHOLE, arrays=arrays), 0)
    assert slot.full
    assert left == 3
    assert slot.version.tolist() == [[0, 1, 20, 21, 22], [2, 3, 24, 25, 26]]


# ── unrolls that end early ───────────────────────────────────────────────────────────────────────────────────────

ROWS_OF_SHORT, LEAST = 6, 2
SHORT = UnrollSchema(
    ("float32", (2,)),
    ("int64", ()),
    {"policy": ("float32", (4,))},
    ROWS_OF_SHORT,
    {"h": ("float32", (3,)), "last": ("int64", ())},
    least=LEAST,
)


def shortened(rows: int, envs: int = 3, seed: int = 0, truncated: Sequence[tuple[int, int]] = ()) -> Message:
    """An unroll of random rows that was cut after so many, and went over the wire."""
    rng = np.random.default_rng(seed)
    unroll = Unroll(SHORT.layout(envs))
    for array in unroll.rows.values():
        array[...] = rng.normal(size=array.shape) if array.dtype.kind == "f" else rng.integers(0, 4, array.shape)
    unroll.rows["terminated"][...] = unroll.rows["truncated"][...] = False
    for t, env in truncated:
        unroll.rows["truncated"][t, env] = True
        unroll.truncated(t, np.array([env]), final(seed, t, np.array([env])))
    unroll.cut(rows)
    assert unroll.length == rows
    return wire.decode(unroll.finish().encode("actor-0", 1, seed + 1, {}))


@pytest.mark.parametrize("rows", range(1, ROWS_OF_SHORT + 1))
def test_a_cut_unroll_is_the_first_rows_of_the_whole_one(rows: int) -> None:
    """And all of what agents carried into its first row."""
    ends = [(t, t % 3) for t in range(0, rows, 2)]
    message, whole = shortened(rows, truncated=ends), shortened(ROWS_OF_SHORT, truncated=ends)
    assert message.arrays.keys() == whole.arrays.keys()
    for name, array in whole.arrays.items():
        kept = len(array) if name.startswith(("state.", "final")) else rows + (name == "obs")
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array[:kept], name)
    assert len(message.arrays["state.h"]) == len(message.arrays["state.last"]) == 3
    assert message.arrays["final_index"].tolist() == [t * 3 + env for t, env in ends]
    assert SHORT.check(message) == (None if rows >= LEAST else "schema")


def test_an_unroll_may_be_cut_again_and_not_made_longer() -> None:
    unroll = Unroll(SHORT.layout(2))
    arena = unroll.arena
    unroll.cut(ROWS_OF_SHORT)
    assert unroll.arena is arena  # nothing is cut off it
    unroll.cut(4)
    unroll.cut(5)
    assert (unroll.length, len(unroll.rows["obs"])) == (4, 5)
    unroll.cut(3)
    assert (unroll.length, len(unroll.rows["obs"]), unroll.rows["state.h"].shape) == (3, 4, (2, 3))


@pytest.mark.parametrize("rows", [LEAST, ROWS_OF_SHORT - 1])
def test_all_arrays_are_cut_at_the_same_row(rows: int) -> None:
    message, whole = shortened(rows), shortened(ROWS_OF_SHORT)
    for name in message.arrays:
        if not name.startswith("state."):
            assert SHORT.check(changed(message, **{name: whole.arrays[name]})) == "schema", name
    longer = {name: np.concatenate([array, array[:1]]) for name, array in whole.arrays.items() if "state" not in name}
    assert SHORT.check(changed(whole, **longer)) == "schema"


def test_no_unroll_ends_early_unless_the_schema_says_so() -> None:
    assert SCHEMA.least == T
    cut = {name: array if name.startswith("state.") else array[:-1] for name, array in ROWS.items()}
    assert SCHEMA.check(replace(WHOLE, arrays=cut)) == "schema"
    assert REPLAYED.windows(2).least == 2


@pytest.mark.parametrize("rows", [LEAST, 4, ROWS_OF_SHORT])
def test_a_batch_has_the_rows_of_its_unrolls(rows: int) -> None:
    """Nothing of a longer one that its memory held before."""
    slots = BatchSlots(SHORT, batch=5, slots=1)
    (slot,) = slots.free
    slots.copy(slot, shortened(ROWS_OF_SHORT, envs=5, seed=7, truncated=[(5, 4)]), 0)
    assert (slot.length, slot.steps, slot.full) == (ROWS_OF_SHORT, ROWS_OF_SHORT * 5, True)
    slot.clear()
    assert (slot.length, slot.steps) == (0, 0)
    one, other = shortened(rows, 2, 1, [(rows - 1, 1)]), shortened(rows, 3, 2, [(0, 0)])
    slots.copy(slot, one, 0)
    assert slot.steps == rows * 2
    slots.copy(slot, other, 0)
    assert (slot.length, slot.steps) == (rows, rows * 5)
    batch = batch_of(slot, SHORT)
    for name in ("obs", "action", "reward", "terminated", "truncated"):
        both = np.concatenate([each.arrays[name] for each in (one, other)], axis=1)
        np.testing.assert_array_equal(getattr(batch, name), both, name)
    both = np.concatenate([each.arrays["record.policy"] for each in (one, other)], axis=1)
    np.testing.assert_array_equal(batch.record["policy"], both)
    for name in ("h", "last"):
        both = np.concatenate([each.arrays[f"state.{name}"] for each in (one, other)])
        np.testing.assert_array_equal(batch.state[name], both)
    versions = [np.repeat(each.arrays["version"][:, None], n, axis=1) for each, n in ((one, 2), (other, 3))]
    np.testing.assert_array_equal(batch.version, np.concatenate(versions, axis=1))
    assert batch.final_index.tolist() == [(rows - 1) * 5 + 1, 2]
    assert sorted(batch.final_index) == np.flatnonzero(batch.truncated).tolist()


# ── batches ──────────────────────────────────────────────────────────────────────────────────────────────────────


def fill(messages: Sequence[Played], batch: int) -> list[Slot]:
    """As the learner does: every column of every message, over as many slots as it takes."""
    slots = BatchSlots(SCHEMA, batch, slots=len(messages) * 8 // batch + 2)
    slot = slots.free.pop()
    filled = [slot]
    for m in messages:
        start = 0
        while start < m.envs:
            start = slots.copy(slot, m.message, start)
            if slot.full:
                slot = slots.free.pop()
                filled.append(slot)
    return filled


def twin(messages: Sequence[Played], batch: int) -> list[dict[str, Any]]:
    """The same columns one after the other, dealt out `batch` at a time, with final observations looked up by row."""
    columns = [(m, env) for m in messages for env in range(m.envs)]
    batches = []
    for begin in range(0, len(columns), batch):
        found: dict[str, Any] = {"finals": {}, "messages": 0}
        for b, (m, env) in enumerate(columns[begin : begin + batch]):
            arrays = m.message.arrays
            for name in (*SCHEMA.rows, "obs"):
                found.setdefault(name, []).append(arrays[name][:, env])
            for name in SCHEMA.state:
                found.setdefault(name, []).append(arrays[name][env])
            found.setdefault("version", []).append([m.version + t for t in range(T)])
            found["messages"] += env == m.envs - 1
            for k, index in enumerate(arrays.get("final_index", [])):
                if index % m.envs == env:
                    found["finals"][index // m.envs * batch + b] = arrays["final_obs"][k].tolist()
        batches.append(found)
    return batches


def assert_same(slot: Slot, expected: dict[str, Any]) -> None:
    for name in (*SCHEMA.rows, "obs"):
        np.testing.assert_array_equal(slot.rows[name][:, : slot.columns], np.stack(expected[name], axis=1), name)
    for name in SCHEMA.state:
        np.testing.assert_array_equal(slot.rows[name][: slot.columns], np.stack(expected[name]), name)
    np.testing.assert_array_equal(slot.version[:, : slot.columns], np.transpose(expected["version"]))
    index, obs = slot.final_rows(SCHEMA.obs)
    assert dict(zip(index.tolist(), obs.tolist(), strict=True)) == expected["finals"]
    assert slot.messages == expected["messages"]


@st.composite
def arrivals(draw: st.DrawFn) -> list[Played]:
    messages = []
    for seed in range(draw(st.integers(1, 5))):
        envs = draw(st.integers(1, 8))
        ends = draw(st.sets(st.tuples(st.integers(0, T - 1), st.integers(0, envs - 1)), max_size=6))
        messages.append(played(envs, seed, sorted(ends), version=draw(st.integers(0, 9))))
    return messages


@settings(deadline=None, max_examples=60)
@given(messages=arrivals(), batch=st.integers(1, 9))
def test_batches_are_the_columns_in_order(messages: list[Played], batch: int) -> None:
    filled = [slot for slot in fill(messages, batch) if slot.columns]
    expected = twin(messages, batch)
    assert [slot.columns for slot in filled] == [len(e["version"]) for e in expected]
    for slot, columns in zip(filled, expected, strict=True):
        assert_same(slot, columns)


def test_a_message_over_three_slots_counts_once_where_it_ends() -> None:
    filled = fill([played(envs=7, truncated=[(0, 0), (1, 3), (2, 6)])], batch=3)
    assert [slot.messages for slot in filled] == [0, 0, 1]
    assert [slot.final_rows(SCHEMA.obs)[0].tolist() for slot in filled] == [[0], [1 * 3 + 0], [2 * 3 + 0]]


def test_final_index_names_truncated_rows_of_the_batch() -> None:
    (slot, _) = fill([played(3, seed, [(0, seed), (2, 1)]) for seed in range(2)], batch=6)
    index, obs = slot.final_rows(SCHEMA.obs)
    assert sorted(index) == np.flatnonzero(slot.rows["truncated"]).tolist()
    assert len(index) == len(obs) == 4


def test_a_cleared_slot_starts_over() -> None:
    (slot, _) = fill([played(2, truncated=[(0, 0)])], batch=2)
    assert slot.full
    slot = replace(slot, env_steps=6, weight=np.ones(2, np.float32), errors=np.ones(2, np.float32))
    slot.clear()
    assert (slot.env_steps, slot.weight, slot.errors) == (0, None, None)
    index, obs = slot.final_rows(SCHEMA.obs)
    assert (slot.columns, slot.messages, slot.full) == (0, 0, False)
    assert (index.shape, index.dtype, obs.shape, obs.dtype) == ((0,), np.int64, (0, 2), np.float32)


def test_slots_lie_where_the_learner_wants_them() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def allocate(dtype: str, shape: tuple[int, ...]) -> Array:
        asked.append((dtype, shape))
        return np.zeros(shape, dtype)

    slots = BatchSlots(SCHEMA, batch=5, slots=1, allocate=allocate)
    assert asked == [*SCHEMA.specs(5).values(), ("int64", (T, 5))]
    assert slots.free[0].width == 5
