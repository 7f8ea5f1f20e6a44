"""The codec: what goes in comes out, and whatever else comes in is refused by a reason of the list."""

from __future__ import annotations

import ast
import pickle
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lz4.block
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import ALIGN, DTYPES, MAX_FRAME, MAX_HEADER, MAX_RUN, REASONS, Arena, Layout

Spec = list[Any]
NAMES = st.text(max_size=12)
NUMBERS = st.integers(0, 2**64 - 1)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | NAMES
VALUES = st.recursive(SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(NAMES, x, max_size=3), max_leaves=6)
FIELDS = st.dictionaries(NAMES, VALUES)
DTYPE = st.sampled_from([DTYPES[name] for name in DTYPES] + [np.dtype(">f4"), np.dtype(">i8")])
ARRAYS = st.dictionaries(NAMES, hnp.arrays(DTYPE, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)))


def prefix(header_len: int, head: int, *, major: int = 3, magic: bytes = b"DDRL", codec: int = 0) -> bytes:
    return struct.pack("<4sBBHIIQQQQ", magic, major, 0, codec, header_len, head, 1, 2, 3, 4)


def frame_of(header: bytes, body: bytes = b"", **other: Any) -> bytes:
    """A frame around any header bytes."""
    head = -(-(48 + len(header)) // ALIGN) * ALIGN
    return (prefix(len(header), head, **other) + header).ljust(head, b"\0") + body


def header(*, kind: Any = "k", node: Any = "n", fields: Any = None, specs: Any = None, run: Any = None) -> bytes:
    """Of one message with `fields`, or of the messages of `run`."""
    packed = specs if isinstance(specs, bytes) else msgpack.packb(specs or [])
    one = [{} if fields is None else fields]
    return bytes(msgpack.packb([kind, node, packed, one if run is None else run]))


def framed(*specs: Spec, body: int = 0) -> bytes:
    return frame_of(header(specs=list(specs)), bytes(body))


def packed(size: int, block: bytes) -> bytes:
    """A compressed frame of one array of `size` bytes."""
    return frame_of(header(specs=[["x", "uint8", [size], 0]]), block, codec=1)


def reason_of(frame: bytes) -> str | None:
    """Why it is refused, or None; anything but WireError fails the test."""
    reason = None
    try:
        wire.decode(frame)
    except WireError as error:
        reason = error.reason
    assert reason is None or reason in REASONS
    return reason


SAMPLE = bytes(
    wire.encode(
        "unroll",
        "actor-0",
        2**63,
        17,
        {"steps": 5, "score": 1.5, "why": None, "done": True, "nested": {"a": [1, {"b": "ü"}]}},
        {"obs": np.arange(24, dtype="f4").reshape(2, 3, 4), "a": np.int64(7).reshape(()), "none": np.zeros((0, 9))},
        lane=9,
    )
)

PACKED = bytes(
    Arena.of(
        "unroll", {"obs": np.tile(np.arange(40, dtype="u1"), (9, 5)), "a": np.arange(4), "done": np.zeros(9, bool)}
    ).encode("actor-0", 1, 1, {"steps": 5}, 9, compress=True)
)

# -- round trips -----------------------------------------------------------------------------------------------------


@given(kind=NAMES, node=NAMES, epoch=NUMBERS, seq=NUMBERS, lane=NUMBERS, fields=FIELDS, arrays=ARRAYS)
@settings(max_examples=200, deadline=None)
def test_round_trip(
    kind: str, node: str, epoch: int, seq: int, lane: int, fields: dict[str, Any], arrays: dict[str, Any]
) -> None:
    frame = wire.encode(kind, node, epoch, seq, fields, arrays, lane)
    assert frame.readonly
    before, message = time.time_ns(), wire.decode(frame)
    assert (message.kind, message.node, message.epoch, message.seq, message.lane) == (kind, node, epoch, seq, lane)
    assert before - 60e9 < message.sent_at <= before
    assert message.fields == fields
    assert message.nbytes == len(frame)
    assert list(message.arrays) == list(arrays)
    for name, array in message.arrays.items():
        assert (array.dtype.name, array.shape) == (arrays[name].dtype.name, arrays[name].shape)
        assert array.dtype.isnative
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_bit_by_bit(dtype: str) -> None:
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, 64, np.uint8)
    array = raw.view(dtype)  # NaNs with payloads among them
    assert wire.decode(wire.encode("k", "n", 1, 1, {}, {"x": array})).arrays["x"].tobytes() == raw.tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(4, 6)[::2, ::-3],
        np.arange(24).reshape(4, 6).T,
        np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
        np.broadcast_to(np.int32(5), (3, 4)),
        np.array(5.0),
        np.zeros((3, 0, 2)),
        np.zeros((1,) * 8),
        np.arange(1 << 16).reshape(256, 256).T,
        np.arange(1 << 16, dtype=">i8"),
    ],
    ids=["strided", "transposed", "fortran", "broadcast", "0-d", "0-size", "8-d", "large", "large big-endian"],
)
def test_any_memory_order_arrives_in_c_order(array: np.ndarray[Any, Any]) -> None:
    received = wire.decode(wire.encode("k", "n", 1, 1, {}, {"x": array})).arrays["x"]
    np.testing.assert_array_equal(received, array)
    assert received.flags.c_contiguous


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_arrays_are_read_only_views_of_the_frame(kind: type) -> None:
    frame = kind(bytearray(SAMPLE))
    obs = wire.decode(frame).arrays["obs"]
    assert not obs.flags.writeable
    assert np.shares_memory(obs, np.frombuffer(frame, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        obs[0] = 1


def test_an_arena_is_written_in_place_and_sent_without_a_copy() -> None:
    layout = Layout("unroll", {"obs": ("uint8", (5, 7)), "reward": ("float32", (5,))})
    arena = layout.arena()
    for t in range(5):
        arena.arrays["obs"][t], arena.arrays["reward"][t] = t, t / 2
    frame = arena.encode("actor-0", 1, 1, {})
    assert np.shares_memory(np.frombuffer(frame, np.uint8), arena.arrays["obs"])
    message = wire.decode(frame)
    assert message.arrays["obs"].tolist() == [[t] * 7 for t in range(5)]
    assert message.arrays["reward"].tolist() == [0, 0.5, 1, 1.5, 2]


@pytest.mark.parametrize("length", [0, 400, 480, 512, 513, 5000, 100_000])
def test_a_header_of_any_length_keeps_the_arrays(length: int) -> None:
    fields, array = {"text": "x" * length}, np.arange(100.0)
    message = wire.decode(wire.encode("k", "n", 1, 1, fields, {"x": array}))
    assert message.fields == fields
    assert message.arrays["x"].tolist() == array.tolist()


def test_extended_appends() -> None:
    arena = Arena.of("k", {"a": np.arange(3)}).extended({"b": np.arange(2.0)})
    message = wire.decode(arena.encode("n", 1, 1, {}))
    assert {name: array.tolist() for name, array in message.arrays.items()} == {"a": [0, 1, 2], "b": [0.0, 1.0]}


@pytest.mark.parametrize("rows", [3, 30_000], ids=["zeroed at once", "gaps zeroed"])
def test_arrays_are_aligned_and_gaps_are_zero(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 0xAA, dtype))  # a dirty heap
    arena = Layout("k", {"a": ("uint8", (rows,)), "b": ("float64", (1,)), "c": ("bool", (3,))}).arena()
    for array in arena.arrays.values():
        array[...] = 1
    frame = bytes(arena.encode("n", 1, 1, {}))
    header_len, arena_at = struct.unpack_from("<II", frame, 8)
    assert arena_at % ALIGN == 0
    used = np.zeros(len(frame), bool)
    used[: 48 + header_len] = True
    for array in wire.decode(frame).arrays.values():
        offset = array.__array_interface__["data"][0] - np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
        assert (offset - arena_at) % ALIGN == 0
        used[offset : offset + array.nbytes] = True
    assert not np.frombuffer(frame, np.uint8)[~used].any()


@given(fields=FIELDS, arrays=ARRAYS)
@settings(max_examples=100, deadline=None)
def test_round_trip_compressed(fields: dict[str, Any], arrays: dict[str, Any]) -> None:
    arena = Arena.of("k", arrays)
    plain, frame = bytes(arena.encode("n", 1, 2, fields, 3)), arena.encode("n", 1, 2, fields, 3, compress=True)
    assert frame.readonly
    assert len(frame) <= len(plain) == arena.raw_size
    ours, theirs = wire.decode(frame), wire.decode(plain)
    assert (ours.kind, ours.node, ours.epoch, ours.seq, ours.lane, ours.nbytes) == ("k", "n", 1, 2, 3, len(frame))
    assert ours.fields == theirs.fields
    assert list(ours.arrays) == list(theirs.arrays)
    for name, array in ours.arrays.items():
        assert (array.dtype, array.shape) == (theirs.arrays[name].dtype, theirs.arrays[name].shape)
        assert array.tobytes() == theirs.arrays[name].tobytes()


def test_decompressed_arrays_are_aligned_and_read_only() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 63, 5_000, 200_000):
        rows = {"a": np.repeat(rng.integers(0, 9, n, "u1"), 40), "b": np.full(n, 2.5), "c": np.zeros(3, bool)}
        arena = Arena.of("k", rows)
        frame = bytes(arena.encode("n", 1, 1, {}, compress=True))
        assert len(frame) < arena.raw_size
        for name, array in wire.decode(frame).arrays.items():
            np.testing.assert_array_equal(array, rows[name])
            assert array.__array_interface__["data"][0] % ALIGN == 0
            assert not array.flags.writeable


def test_what_does_not_shrink_travels_as_it_lies() -> None:
    arena = Arena.of("k", {"x": np.random.default_rng(0).integers(0, 256, 1 << 16, np.uint8)})
    frame = arena.encode("n", 1, 1, {}, compress=True)
    assert np.shares_memory(np.frombuffer(frame, np.uint8), arena.arrays["x"])
    assert len(frame) == arena.raw_size
    assert wire.decode(frame).arrays["x"].tobytes() == arena.arrays["x"].tobytes()


@pytest.mark.parametrize(
    ("specs", "pays"),
    [
        ({"obs": ("uint8", (20, 84, 84)), "logits": ("float32", (20, 6))}, True),
        ({"obs": ("bool", (4, 32, 4, 10, 10)), "reward": ("float32", (4, 32))}, True),
        ({"obs": ("uint8", (16, 1000))}, False),
        ({"obs": ("uint8", (20, 1000)), "state": ("float32", (20, 256))}, False),
        ({"weights": ("float32", (512, 512))}, False),
        ({"tokens": ("int8", (1 << 16,))}, False),
        ({}, False),
    ],
)
def test_images_and_flags_are_worth_compressing(specs: dict[str, wire.Spec], pays: bool) -> None:
    assert Layout("k", specs).arena().compressible == pays


@given(kind=NAMES, run=st.lists(FIELDS, min_size=1, max_size=20), arrays=ARRAYS)
@settings(max_examples=100, deadline=None)
def test_a_run_is_its_messages(kind: str, run: list[dict[str, Any]], arrays: dict[str, Any]) -> None:
    arenas = [Arena.of(kind, arrays) for _ in run]
    for number, arena in enumerate(arenas):
        for array in arena.arrays.values():
            array.reshape(-1)[:1] = number % 2
    maps = [wire.packed(fields) for fields in run]
    frame = wire.encode_run(arenas[0].layout, "n", 1, 2, maps, arenas, 3, 4)
    messages = wire.decode_run(frame)
    assert [(m.kind, m.node, m.epoch, m.lane, m.sent_at) for m in messages] == [(kind, "n", 1, 3, 4)] * len(run)
    assert [m.seq for m in messages] == [2 + number for number in range(len(run))]
    assert [m.fields for m in messages] == run
    assert sum(m.nbytes for m in messages) <= len(frame)
    for message, arena in zip(messages, arenas, strict=True):
        for name, array in arena.arrays.items():
            np.testing.assert_array_equal(message.arrays[name], array)
            assert not message.arrays[name].flags.writeable


# -- what does not go out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specs", "reason"),
    [
        ({"x": ("object", (1,))}, "dtype"),
        ({"x": ("complex64", (1,))}, "dtype"),
        ({"x": ("uint8", (-1,))}, "shape"),
        ({"x": ("uint8", (1,) * 9)}, "shape"),
        ({"x": ("uint8", (MAX_FRAME + 1,))}, "shape"),
        ({"x" * 65: ("uint8", (1,))}, "specs"),
        ({str(i): ("uint8", (1,)) for i in range(65)}, "specs"),
    ],
)
def test_a_layout_that_no_receiver_takes_is_refused_at_once(specs: dict[str, wire.Spec], reason: str) -> None:
    with pytest.raises(WireError) as caught:
        Layout("k", specs)
    assert caught.value.reason == reason


@pytest.mark.parametrize("array", [np.array([{}]), np.array(["a"]), np.array(["2020"], "M8[D]"), np.zeros(1, "f4,i4")])
def test_other_dtypes_are_refused_by_the_sender(array: np.ndarray[Any, Any]) -> None:
    with pytest.raises(WireError, match="does not travel"):
        wire.encode("k", "n", 1, 1, {}, {"x": array})


def test_oversized_messages_are_refused_by_the_sender() -> None:
    with pytest.raises(WireError, match="header of"):
        wire.encode("k", "n", 1, 1, {"text": "x" * MAX_HEADER})
    arena = Layout("k", {"a": ("uint8", (MAX_FRAME // 2,)), "b": ("uint8", (MAX_FRAME // 2,))}).arena()
    with pytest.raises(WireError, match="frame of"):
        arena.encode("n", 1, 1, {})


# -- what does not come in -------------------------------------------------------------------------------------------

U8 = ["x", "uint8", [4], 0]
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "prefix cut": (SAMPLE[:15], "truncated"),
    "magic": (frame_of(header(), magic=b"DDRM"), "magic"),
    "pickle": (pickle.dumps({"x": 1}).ljust(64, b"."), "magic"),
    "http": (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(64), "magic"),
    "other major": (frame_of(header(), major=4), "version"),
    "earlier major": (b"DDRL\2".ljust(64, b"\0"), "version"),
    "codec unknown": (frame_of(header(), codec=2), "codec"),
    "codec unknown high": (frame_of(header(), codec=256), "codec"),
    "block empty": (packed(4, b""), "codec"),
    "block of nothing": (packed(0, b""), "codec"),
    "block no lz4": (packed(4, b"\xff" * 64), "codec"),
    "block short": (packed(4, lz4.block.compress(bytes(63), store_size=False)), "codec"),
    "block long": (packed(4, lz4.block.compress(bytes(65), store_size=False)), "codec"),
    "block cut": (packed(6400, lz4.block.compress(bytes(6400), store_size=False)[:-1]), "codec"),
    "block with its size": (packed(6400, lz4.block.compress(bytes(6400), store_size=True)), "codec"),
    "block claims too much": (packed(1 << 27, lz4.block.compress(bytes(1 << 12), store_size=False)), "codec"),
    "block claims more than travels": (
        frame_of(header(specs=[[str(i), "uint8", [1 << 26], i << 26] for i in range(5)]), bytes(2 << 20), codec=1),
        "codec",
    ),
    "header length huge": (prefix(2**32 - 1, 64).ljust(64), "oversized"),
    "header past arena": (prefix(60, 64).ljust(64), "truncated"),
    "arena past frame": (prefix(9, 128).ljust(64), "truncated"),
    "arena unaligned": (prefix(9, 63).ljust(64), "truncated"),
    "header no msgpack": (frame_of(b"\xc1" * 20), "header"),
    "header empty": (frame_of(b""), "header"),
    "header a map": (frame_of(msgpack.packb({"kind": "k"})), "header"),
    "header trailing": (frame_of(header() + b"\0"), "header"),
    "header of 3": (frame_of(msgpack.packb(["k", "n", b"\x90"])), "header"),
    "header of 5": (frame_of(msgpack.packb(["k", "n", b"\x90", [{}], 0])), "header"),
    "kind bytes": (frame_of(header(kind=b"k")), "header"),
    "kind long": (frame_of(header(kind="k" * 65)), "header"),
    "node int": (frame_of(header(node=1)), "header"),
    "node not utf-8": (frame_of(header().replace(b"\xa1n", b"\xa1\xff")), "header"),
    "run a map": (frame_of(header(run={})), "header"),
    "run of none": (frame_of(header(run=[])), "run"),
    "run of two": (frame_of(header(run=[{}, {}])), "run"),
    "run too long": (frame_of(header(run=[{}] * (MAX_RUN + 1))), "run"),
    "run with another list": (frame_of(header(run=[{}, []])), "header"),
    "run with bytes": (frame_of(header(run=[{}, {"a": b"x"}])), "fields"),
    "run with too little": (frame_of(header(run=[{}, {}], specs=[U8]), bytes(64)), "arena"),
    "fields a list": (frame_of(header(fields=[])), "header"),
    "fields int key": (frame_of(header(fields={1: 2})), "header"),
    "fields bytes key": (frame_of(header(fields={b"a": 2})), "fields"),
    "fields bytes key deep": (frame_of(header(fields={"a": {b"a": 2}})), "fields"),
    "fields bytes": (frame_of(header(fields={"a": b"x"})), "fields"),
    "fields bytes deep": (frame_of(header(fields={"a": [{"b": b"x"}]})), "fields"),
    "fields ext": (frame_of(header(fields={"a": msgpack.ExtType(1, b"")})), "fields"),
    "fields timestamp": (frame_of(header(fields={"a": msgpack.Timestamp(1, 2)})), "header"),
    "specs a list": (frame_of(msgpack.packb(["k", "n", [], [{}]])), "header"),
    "specs no msgpack": (frame_of(header(specs=b"\xc1")), "header"),
    "specs empty": (frame_of(header(specs=b"\xc0")), "specs"),
    "specs a map": (frame_of(header(specs=b"\x80")), "specs"),
    "specs too many": (framed(*(["a" * i, "uint8", [0], 0] for i in range(65))), "specs"),
    "spec of 3": (framed(U8[:3], body=64), "specs"),
    "spec a map": (frame_of(header(specs=[{"name": "x"}])), "specs"),
    "name bytes": (framed([b"x", *U8[1:]], body=64), "specs"),
    "name long": (framed(["x" * 65, *U8[1:]], body=64), "specs"),
    "name twice": (framed(U8, ["x", "uint8", [4], 64], body=128), "specs"),
    "shape int": (framed(["x", "uint8", 4, 0], body=64), "specs"),
    "offset bool": (framed(["x", "uint8", [4], False], body=64), "specs"),
    "offset negative": (framed(["x", "uint8", [4], -64], body=64), "arena"),
    "offset huge": (framed(["x", "uint8", [4], 2**63], body=64), "arena"),
    "offset leaves a hole": (framed(["x", "uint8", [4], 64], body=128), "arena"),
    "overlap": (framed(U8, ["y", "uint8", [4], 0], body=64), "arena"),
    "overlap unaligned": (framed(U8, ["y", "uint8", [4], 4], body=64), "arena"),
    "body short": (framed(["x", "uint8", [65], 0], body=64), "arena"),
    "body long": (framed(U8, body=128), "arena"),
    "body without arrays": (framed(body=64), "arena"),
    "body missing": (framed(U8), "arena"),
    "dim negative": (framed(["x", "uint8", [-1], 0], body=64), "shape"),
    "dims negative twice": (framed(["x", "uint8", [-2, -2], 0], body=64), "shape"),
    "dim bool": (framed(["x", "uint8", [True], 0], body=64), "shape"),
    "dim float": (framed(["x", "uint8", [4.0], 0], body=64), "shape"),
    "dim huge": (framed(["x", "uint8", [2**64 - 1], 0], body=64), "shape"),
    "dims overflow": (framed(["x", "float64", [2**16, 2**16, 2**16, 2**16], 0], body=64), "shape"),
    "dims overflow past a zero": (framed(["x", "float32", [0, 2**28, 2**28, 2**28], 0]), "shape"),
    "zero and huge": (framed(["x", "uint8", [0, 10**15], 0]), "shape"),
    "ndim 9": (framed(["x", "uint8", [1] * 9, 0], body=64), "shape"),
    "ndim 65": (framed(["x", "uint8", [1] * 65, 0], body=64), "shape"),
    **{
        f"dtype {name!r}": (framed(["x", name, [4], 0], body=64), "dtype")
        for name in ("object", "|O", "V8", "M8[s]", "<U4", "S4", ">f4", "complex128", "f4,i4", "(2,)f4", "", 1, None)
    },
}


@pytest.mark.parametrize(("frame", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_reason(frame: bytes, reason: str) -> None:
    assert reason_of(frame) == reason
    assert reason_of(SAMPLE) is None  # a good one is still taken


def test_every_reason_is_reached() -> None:
    assert {reason for _, reason in REFUSED.values()} == set(REASONS)


def test_a_frame_over_the_limit_is_refused_unread() -> None:
    assert reason_of(bytes(MAX_FRAME + 1)) == "oversized"


def test_another_major_is_refused_naming_both_and_another_minor_is_taken() -> None:
    with pytest.raises(WireError, match=r"protocol 4\.7 .* 3\.0"):
        wire.decode(SAMPLE[:4] + bytes((4, 7)) + SAMPLE[6:])
    assert wire.decode(SAMPLE[:5] + b"\x63" + SAMPLE[6:]).kind == "unroll"


def test_words_of_a_stranger_are_escaped_and_cut() -> None:
    for spec in (["\x1b[2J\nroot:", "object", [1], 0], ["x", "\x1b[2J\n" + "y" * 9000, [1], 0]):
        with pytest.raises(WireError) as caught:
            wire.decode(framed(spec, body=64))
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300


# -- cut, flipped and random bytes -----------------------------------------------------------------------------------


def test_cut_at_every_length() -> None:
    for sample in (SAMPLE, PACKED):
        assert reason_of(sample) is None
        assert all(reason_of(sample[:n]) is not None for n in range(len(sample)))


def test_grown() -> None:
    assert all(reason_of(SAMPLE + bytes(n)) == "arena" for n in range(1, 130))
    assert all(reason_of(PACKED + bytes(n)) == "codec" for n in range(1, 130))


def test_every_bit_flipped() -> None:
    """A flip is refused, or yields a message whose arrays still lie within the frame."""
    for sample in (SAMPLE, PACKED):
        outcomes = set()
        for bit in range(8 * len(sample)):
            flipped = bytearray(sample)
            flipped[bit // 8] ^= 1 << bit % 8
            outcomes.add(reason_of(bytes(flipped)))
        assert outcomes >= {None, "magic", "version", "header", "truncated", "codec"}
        assert outcomes <= {None, *REASONS}


@given(st.binary(max_size=200), st.integers(0, 5000), st.data())
@settings(max_examples=500, deadline=None)
def test_any_block(noise: bytes, size: int, data: Any) -> None:
    assert reason_of(packed(size, noise)) in {None, "codec"}
    good = bytearray(lz4.block.compress(noise.ljust(size, b"-"), store_size=False))
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    reason_of(packed(max(size, len(noise)), bytes(good)))


@given(st.binary(max_size=300))
@settings(max_examples=500, deadline=None)
def test_random_bytes(noise: bytes) -> None:
    assert reason_of(noise) is not None
    assert reason_of(frame_of(noise)) in {"header", "fields", "specs", "run"}
    reason_of(frame_of(header(specs=noise)))


ANY = st.recursive(
    SCALARS | st.binary(max_size=9) | st.just(msgpack.Timestamp(0, 0)),
    lambda x: st.lists(x, max_size=8) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), x, max_size=4),
    max_leaves=20,
)


@given(ANY, ANY, st.binary(max_size=128))
@settings(max_examples=300, deadline=None)
def test_any_msgpack_value_for_header_fields_and_specs(head: Any, other: Any, body: bytes) -> None:
    reason_of(frame_of(msgpack.packb(head), body))
    reason_of(frame_of(header(fields=head, specs=other), body))
    reason_of(frame_of(header(run=head, node=other), body))


DIMS = st.sampled_from([-1, 0, 1, 2, 4, 255, 2**16, 2**28, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, True, None])
SPEC = st.tuples(
    st.sampled_from(["a", "b"]), st.sampled_from([*DTYPES, "O"]), st.lists(DIMS, max_size=9), DIMS | st.just(64)
)


@given(st.lists(SPEC, max_size=3), st.sampled_from([0, 1, 64, 128]))
@settings(max_examples=500, deadline=None)
def test_any_specs(specs: list[Any], body: int) -> None:
    reason_of(frame_of(header(specs=list(map(list, specs))), bytes(body)))


# -- amplification ---------------------------------------------------------------------------------------------------


def nested(depth: int, opener: bytes) -> bytes:
    return b"\x94" + opener * depth + b"\xc0"


BOMBS = {
    "arr32 max": b"\x94" + b"\xdd\xff\xff\xff\xff" * 4,
    "map32 max": b"\x94" + b"\xdf\xff\xff\xff\xff" * 4,
    "str32 max": b"\x94\xdb\xff\xff\xff\xff",
    "bin32 max": b"\x94\xc6\xff\xff\xff\xff",
    "ext32 max": b"\x94\xc9\xff\xff\xff\xff\x01",
    "nest 10": header(fields={"a": [[[[[[[[[[1]]]]]]]]]]}),
    "nest 500": nested(500, b"\x91"),
    "nest 10^5": nested(10**5, b"\x91"),
    "nest maps": nested(5 * 10**4, b"\x81\xa1a"),
    "lists that claim much": nested(8 * 10**4, b"\xdc\x40\x00"),
    "lists that claim the limit": nested(8 * 10**4, b"\xdc\x04\x00"),
    "many empty lists": b"\x94" + b"\xdc\x04\x00" + (b"\xdc\x00\xff" + b"\x90" * 255) * 1000,
    "longest run": header(run=[{}] * MAX_RUN),
    "many fields": header(fields={str(i): 1 for i in range(30_000)}),
    "long string": header(fields={"a": "x" * (MAX_HEADER - 100)}),
    "many specs": header(specs=[[str(i), "uint8", [0], 0] for i in range(1500)]),
}


@pytest.fixture
def peak() -> Iterator[Any]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_a_header_cannot_claim_much_more_than_it_brings(bomb: bytes, peak: Any) -> None:
    frame = frame_of(bomb)
    before, began = peak(), time.perf_counter()
    reason_of(frame)
    assert time.perf_counter() - began < 5.0
    assert peak() - before < (16 << 20)


def test_arrays_allocate_nothing(peak: Any) -> None:
    frame = bytes(wire.encode("k", "n", 1, 1, {}, {"x": np.zeros(8 << 20, np.uint8)}))
    before = peak()
    wire.decode(memoryview(frame))
    assert peak() - before < 64 << 10


@pytest.mark.parametrize("block", [b"\x1f\0\1\0" + b"\xff" * 4000, bytes(4000)], ids=["long run", "zeros"])
@pytest.mark.parametrize("size", [1 << 20, MAX_FRAME])
def test_a_block_cannot_claim_much_more_than_it_brings(block: bytes, size: int, peak: Any) -> None:
    frame = packed(size, block)
    before = peak()
    assert reason_of(frame) == "codec"
    assert peak() - before < 300 * len(block)


def test_ever_new_specs_are_not_kept_for_ever() -> None:
    for n in range(3000):
        wire.decode(framed([f"array {n}", "uint8", [4], 0], body=64))
    assert wire._parsed_specs.cache_info().currsize <= 1024


# -- nothing received is run -----------------------------------------------------------------------------------------


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_stays_bytes(tmp_path: Path) -> None:
    path = tmp_path / "canary"
    bomb = pickle.dumps(Canary(path))
    assert pickle.loads(bomb) is None  # the canary does sing
    assert path.exists()
    path.unlink()
    code = f"__import__('pathlib').Path({str(path)!r}).touch()"
    wrappings: list[bytes] = [
        bomb,
        frame_of(bomb),
        frame_of(header(specs=bomb)),
        frame_of(header(fields={"x": bomb})),
        frame_of(header(fields={"x": msgpack.ExtType(42, bomb)})),
        frame_of(header(fields={"x": code, "__class__": code, "__reduce__": [code]}, kind="!!python/object")),
        framed(["x", "object", [1], 0], body=64),
        framed(["x", code[:60], [1], 0], body=64),
        frame_of(header(specs=[["x", "uint8", [len(bomb)], 0]]), bomb.ljust(-(-len(bomb) // 64) * 64, b"\0")),
    ]
    for frame in wrappings:
        reason_of(frame)
    assert not path.exists()


def test_nothing_that_runs_code_is_within_reach() -> None:
    """No module of the transport names what turns bytes into code."""
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "eval", "exec", "compile", "__import__"}
    forbidden |= {"recv_pyobj", "send_pyobj", "recv_serialized", "allow_pickle", "import_module"}
    sources = list(Path(wire.__file__).parent.rglob("*.py"))
    assert len(sources) >= 5
    for source in sources:
        tree = ast.parse(source.read_text())
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) != "re"}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
        assert not names & forbidden, source
