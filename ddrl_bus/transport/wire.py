"""The wire format: numbers, a small msgpack header, then the arrays as they lie in memory.

    0        4       5       6       8            12             16      24    32     40        48
    | "DDRL" | major | minor | codec | header len | arena offset | epoch | seq | lane | sent at | header | 0… | arena |

    header = [kind, node, specs, fields]     specs = packed [[name, dtype, shape, offset], …]

`epoch` is the sender's life, `seq` its number on this link, `lane` the life of the receiver it was meant for (0
where a link has none), `sent at` the sender's wall clock in nanoseconds. `fields` holds a map of scalars for each
message of the frame: mostly one; several are a *run*, of one kind and with arrays of the same shapes, numbered from
`seq` on, whose arenas follow one another. Every array starts at a multiple of 64 bytes within its arena, which itself
starts at a multiple of 64 within the frame. `codec` says how arenas travel: 0 as they are, 1 as one LZ4 block. The
header never is compressed, and an arena's size follows from its specs.

A producer writes rows straight into an `Arena`, so that encoding copies nothing: only the header is packed, and laid
right-aligned in the room before the arrays. `decode` is total: it returns a `Message` whose arrays are read-only
views of the frame (of what it was decompressed to), or raises `WireError` with one of `REASONS`; limits are checked
before anything is allocated, and nothing received can name code.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import time_ns
from typing import Any, Final, Literal, Protocol, TypeAlias

import lz4.block
import msgpack
import numpy as np
import numpy.typing as npt

from ddrl_bus.errors import WireError

if sys.byteorder != "little":  # pragma: no cover - arrays travel as they lie in memory
    raise ImportError("ddrl_bus sends arrays in little-endian memory order; this machine is big-endian")

MAGIC: Final = b"DDRL"
PROTOCOL: Final = (3, 0)
ALIGN: Final = 64
SMALL_FRAME: Final = 8 << 10
"""Received frames up to this size are taken as `bytes`: they are slices of libzmq's read buffer and would pin it."""
MAX_FRAME: Final = 256 << 20
MAX_HEADER: Final = 256 << 10
MAX_SPECS: Final = 16 << 10
MAX_FIELDS: Final = MAX_HEADER - MAX_SPECS - 1024
"""Packed, of one message of a run."""
MAX_ARRAYS: Final = 64
MAX_NDIM: Final = 8
MAX_DEPTH: Final = 8
MAX_RUN: Final = 256
"""Messages of one frame: each takes more room here than an empty one takes on the wire."""
MAX_ITEMS: Final = 1024
"""Of one list in a header: msgpack makes room for a whole list as soon as it reads its length, at each depth."""
MAX_ENTRIES: Final = 16384
"""Of one map: these grow as they are read. A node's ledger with hundreds of peers travels as one."""
DTYPES: Final = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "float32", "float64"),
    )
}
REASONS: Final = (
    "truncated",
    "oversized",
    "magic",
    "version",
    "header",
    "fields",
    "specs",
    "dtype",
    "shape",
    "arena",
    "codec",
    "run",
)

Array: TypeAlias = npt.NDArray[Any]
Spec: TypeAlias = tuple[str, tuple[int, ...]]
"""dtype name and shape of one array."""
Buffer: TypeAlias = bytes | memoryview
Codec: TypeAlias = Literal["auto", "none", "lz4", "delta"]
"""How the arenas of a link travel; auto: LZ4 where `Layout.compressible`; delta: as differences, on a `latest`."""

_PREFIX: Final = struct.Struct("<4sBBHIIQQQQ")
_PREFIX_BYTES: Final = _PREFIX.size
_ARENA_AT: Final = slice(12, 16)
_HEAD_ROOM: Final = 512
_ZEROED: Final = 16 << 10
_COMPRESS_FROM: Final = 16 << 10
_PLAIN, _LZ4 = 0, 1
_LZ4_RATIO: Final = 255
"""A byte of an LZ4 block stands for so many at most."""
_HEADER_TYPES: Final = [str, str, bytes, list]
_SCALARS: Final = frozenset((str, int, float, bool, type(None)))
_pack = msgpack.Packer(use_bin_type=True, autoreset=True).pack


class Slots(Protocol):
    """Where values lie that their writer may overwrite: `shared.SharedSlots`."""

    def newest(self) -> tuple[Message, int]: ...
    def copied(self) -> memoryview: ...
    def has(self, generation: int) -> bool: ...


@dataclass(slots=True)
class Message:
    """A decoded message. `arrays` are read-only views of the received frame, or of what it was decompressed to."""

    kind: str
    node: str
    epoch: int
    seq: int
    lane: int
    fields: dict[str, Any]
    arrays: dict[str, Array]
    nbytes: int
    """Of its frame; in a run its part of them."""
    sent_at: int = 0
    """ns, by the sender's wall clock."""
    slots: Slots | None = None
    """Where the arrays lie if their writer may overwrite them: `shared.read` is for such, and for all others."""


@dataclass(frozen=True, slots=True)
class _Placed:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    nbytes: int


_Numbers: TypeAlias = tuple[int, int, int, int]
"""Epoch, seq, lane, sent at."""
_View: TypeAlias = tuple[str, tuple[int, ...], np.dtype[Any], int]
"""Name, shape, dtype and offset: what an array is made of."""


def _views(placed: Sequence[_Placed]) -> tuple[_View, ...]:
    return tuple([(p.name, p.shape, p.dtype, p.offset) for p in placed])


def _round_up(n: int) -> int:
    return (n + ALIGN - 1) & -ALIGN


class Layout:
    """Where the arrays of one kind of message lie. Made once per producer; `arena` then allocates one message.

    Args:
        kind: the message's kind.
        specs: name → (dtype name, shape) of each array, in order.

    Raises:
        WireError: `dtype`, `shape` or `specs`, for what does not travel.
    """

    def __init__(self, kind: str, specs: Mapping[str, Spec]) -> None:
        self.kind = kind
        self.placed: list[_Placed] = []
        self.size = 0
        for name, (dtype_name, shape) in specs.items():
            self._place(name, dtype_name, shape)
        self.gaps = [bytes(-p.nbytes % ALIGN) for p in self.placed]
        """Zeros between the end of each array and the start of the next."""
        self.views = _views(self.placed)
        self.packed_specs = _packed_specs(self.placed)
        _parsed_specs(self.packed_specs)  # what a receiver would refuse is refused here
        frames = sum(p.nbytes for p in self.placed if p.dtype in (np.uint8, np.bool_))
        self.compressible = self.size >= _COMPRESS_FROM and 2 * frames > self.size
        """Whether LZ4 is likely to pay: 16 KiB and more, mostly of images and flags."""

    def _place(self, name: str, dtype_name: str, shape: tuple[int, ...]) -> None:
        if dtype_name not in DTYPES:
            raise WireError("dtype", f"{name}: {dtype_name!r} does not travel; have {', '.join(DTYPES)}")
        dtype = DTYPES[dtype_name]
        nbytes = math.prod(shape) * dtype.itemsize
        self.placed.append(_Placed(name, dtype, tuple(shape), self.size, nbytes))
        self.size = _round_up(self.size + nbytes)

    def arena(self) -> Arena:
        return Arena(self)


class Arena:
    """One message's arrays, laid out as they will travel, with room for the header in front.

    `arrays` holds writable views. After `encode` nobody may write to them: the bytes may still be on their way.
    """

    __slots__ = ("_buffer", "_room", "arrays", "layout", "raw_size")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.raw_size = 0
        """Bytes of the last frame before compression."""
        self._allocate(_HEAD_ROOM)

    @classmethod
    def of(cls, kind: str, arrays: Mapping[str, Array]) -> Arena:
        """An arena holding copies of `arrays`: for messages that are small, or that must be a snapshot."""
        arena = cls(_layout(kind, tuple([(name, array.dtype, array.shape) for name, array in arrays.items()])))
        for name, array in arrays.items():
            arena.arrays[name][...] = array
        return arena

    def _allocate(self, room: int) -> None:
        size = room + self.layout.size
        self._room = room
        buffer: Any
        if size <= _ZEROED:
            buffer = bytearray(size)
        else:
            buffer = np.empty(size, np.uint8)
            for p in self.layout.placed:  # the gaps travel too: send zeros, not what the heap held before
                end = room + p.offset + p.nbytes
                buffer[end : _round_up(end)] = 0
        self._buffer = memoryview(buffer)
        self.arrays: dict[str, Array] = {
            name: np.ndarray(shape, dtype, buffer, room + offset) for name, shape, dtype, offset in self.layout.views
        }

    def extended(self, arrays: Mapping[str, Array]) -> Arena:
        """A copy with `arrays` after the present ones: for what is known only once the rows are written."""
        return Arena.of(self.layout.kind, {**self.arrays, **arrays})

    @property
    def kind(self) -> str:
        return self.layout.kind

    @property
    def nbytes(self) -> int:
        """Bytes of the arena, without the header."""
        return self.layout.size

    @property
    def compressible(self) -> bool:
        return self.layout.compressible

    @property
    def body(self) -> Array:
        """[nbytes] uint8: all arrays as they will travel, zeros between them."""
        return np.frombuffer(self._buffer, np.uint8, offset=self._room)

    def encode(
        self, node: str, epoch: int, seq: int, fields: Mapping[str, Any], lane: int = 0, *, compress: bool = False
    ) -> memoryview:
        """The frame, read-only. Copies nothing unless the header outgrew its room, or `compress` makes it smaller."""
        header = _header_of(self.layout, node, fields)
        return self._encoded(header, (epoch, seq, lane, time_ns()), compress)

    def _encoded(self, header: bytes, numbers: _Numbers, compress: bool = False) -> memoryview:
        layout, text = self.layout, _head(self.layout, header, numbers)
        head = len(text)
        if head > self._room:
            self._outgrown(head)
        self.raw_size = head + layout.size
        frame = self._buffer[self._room - head :]
        if compress:
            block: bytes = lz4.block.compress(frame[head:], store_size=False)
            if len(block) < layout.size:
                return memoryview(_head(layout, header, numbers, _LZ4) + block)
        frame[:head] = text
        return frame.toreadonly()

    def _outgrown(self, room: int) -> None:
        rows = self.arrays
        self._allocate(room)
        for name, array in rows.items():
            self.arrays[name][...] = array


@lru_cache(maxsize=256)
def _layout(kind: str, specs: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> Layout:
    return Layout(kind, {name: (dtype.name, shape) for name, dtype, shape in specs})


def _layout_of(kind: str, arrays: Mapping[str, Array]) -> Layout:
    return _layout(kind, tuple([(name, array.dtype, array.shape) for name, array in arrays.items()]))


def _header_of(layout: Layout, node: str, fields: Mapping[str, Any]) -> bytes:
    header: bytes = _pack((layout.kind, node, layout.packed_specs, (fields,)))
    return header


def _run_header(layout: Layout, node: str, fields: Sequence[bytes]) -> bytes:
    """Of messages whose fields are packed already."""
    count = len(fields)
    many = bytes((0x90 | count,)) if count < 16 else b"\xdc" + count.to_bytes(2, "big")
    return b"".join((b"\x94", _pack(layout.kind), _pack(node), _pack(layout.packed_specs), many, *fields))


def _head(layout: Layout, header: bytes, numbers: _Numbers, codec: int = _PLAIN) -> bytes:
    """All of a frame that stands before its arenas."""
    head = _round_up(_PREFIX_BYTES + len(header))
    if head > MAX_HEADER:
        raise WireError("oversized", f"{layout.kind}: header of {head} bytes, at most {MAX_HEADER} travel")
    if head + layout.size > MAX_FRAME:
        size = head + layout.size
        raise WireError("oversized", f"{layout.kind}: frame of {size} bytes, at most {MAX_FRAME} travel")
    return (_PREFIX.pack(MAGIC, *PROTOCOL, codec, len(header), head, *numbers) + header).ljust(head, b"\0")


def packed(fields: Mapping[str, Any]) -> bytes:
    """One message's fields, for `encode_run`.

    Raises:
        WireError: `oversized`.
    """
    data: bytes = _pack(fields)
    if len(data) > MAX_FIELDS:
        raise WireError("oversized", f"fields of {len(data)} bytes, at most {MAX_FIELDS} travel")
    return data


def encode_run(
    layout: Layout,
    node: str,
    epoch: int,
    seq: int,
    fields: Sequence[bytes],
    arenas: Sequence[Arena],
    lane: int,
    sent_at: int,
) -> Buffer:
    """A frame of the messages in `arenas`, which are of this layout, numbered from `seq` on. Copies several, and one as
    `Arena.encode` does.

    Args:
        fields: of each message, `packed`.
        sent_at: ns, by the wall clock.
    """
    header, numbers = _run_header(layout, node, fields), (epoch, seq, lane, sent_at)
    if len(arenas) == 1:
        return arenas[0]._encoded(header, numbers)
    return b"".join((_head(layout, header, numbers), *[arena._buffer[arena._room :] for arena in arenas]))


def _packed_specs(placed: Sequence[_Placed]) -> bytes:
    packed: bytes = msgpack.packb([[p.name, p.dtype.name, p.shape, p.offset] for p in placed])
    return packed


def encode(
    kind: str,
    node: str,
    epoch: int,
    seq: int,
    fields: Mapping[str, Any],
    arrays: Mapping[str, Array] | None = None,
    lane: int = 0,
    sent_at: int | None = None,
) -> memoryview:
    """A frame from values at hand; arrays are copied. `sent_at`: ns, by the wall clock; None: now."""
    arrays = arrays or {}
    layout = _layout_of(kind, arrays)
    numbers = epoch, seq, lane, time_ns() if sent_at is None else sent_at
    parts: list[Buffer] = [_head(layout, _header_of(layout, node, fields), numbers)]
    for p, gap, array in zip(layout.placed, layout.gaps, arrays.values(), strict=True):
        small = p.nbytes <= SMALL_FRAME and array.dtype is p.dtype  # copied twice sooner than viewed
        parts += array.tobytes() if small else np.ascontiguousarray(array, p.dtype).data, gap
    return memoryview(b"".join(parts))


def decode(frame: Buffer) -> Message:
    """The one message in `frame`.

    Raises:
        WireError: whatever is wrong with it; `reason` is one of `REASONS`. No other exception leaves.
    """
    messages = decode_run(frame)
    if len(messages) != 1:
        raise WireError("run", f"{len(messages)} messages in one frame, expected one")
    return messages[0]


def decode_run(frame: Buffer) -> list[Message]:
    """The messages in `frame`, one at least.

    Raises:
        WireError: as of `decode`.
    """
    size = len(frame)
    if size < _PREFIX_BYTES:
        raise WireError("truncated", f"{size} bytes, a frame has at least {_PREFIX_BYTES}")
    if size > MAX_FRAME:
        raise WireError("oversized", f"{size} bytes, at most {MAX_FRAME}")
    magic, major, minor, codec, header_len, arena_at, epoch, seq, lane, sent_at = _PREFIX.unpack_from(frame)
    if magic != MAGIC:
        raise WireError("magic", f"frame starts with {magic!r}, expected {MAGIC!r}")
    if major != PROTOCOL[0]:
        raise WireError("version", f"protocol {major}.{minor} here, we speak {PROTOCOL[0]}.{PROTOCOL[1]}")
    if header_len > MAX_HEADER:
        raise WireError("oversized", f"header of {header_len} bytes, at most {MAX_HEADER}")
    if codec not in (_PLAIN, _LZ4):
        raise WireError("codec", f"codec {codec} here, we know {_PLAIN} and {_LZ4}")
    header_end = _PREFIX_BYTES + header_len
    if arena_at % ALIGN or not header_end <= arena_at <= size:
        raise WireError("truncated", f"header of {header_len} bytes, arena at {arena_at}, frame of {size}")
    kind, node, specs, maps = _header(frame[_PREFIX_BYTES:header_end])
    views, stride = _parsed_specs(specs)
    if codec == _LZ4:
        frame, at = _decompressed(memoryview(frame)[arena_at:], stride * len(maps)), 0
    elif (at := arena_at) + stride * len(maps) != size:
        raise WireError("arena", f"frame of {size} bytes, its header says {arena_at + stride * len(maps)}")
    if type(frame) is memoryview and not frame.readonly:
        frame = frame.toreadonly()
    nbytes = size // len(maps)
    messages = []
    for fields in maps:
        arrays: dict[str, Array] = {
            name: np.ndarray(shape, dtype, frame, at + offset) for name, shape, dtype, offset in views
        }
        messages.append(Message(kind, node, epoch, seq, lane, fields, arrays, nbytes, sent_at))
        seq, at = seq + 1, at + stride
    return messages


def _decompressed(block: memoryview, size: int) -> memoryview:
    """The arena of `size` bytes, aligned."""
    arena = decompressed(block, size)
    buffer = aligned(size)
    buffer[:] = arena
    return buffer


def decompressed(block: memoryview, size: int) -> bytes:
    """The `size` bytes of an LZ4 block.

    Raises:
        WireError: `codec`, it holds something else; nothing is allocated for what it cannot hold.
    """
    if size > min(MAX_FRAME, _LZ4_RATIO * len(block)):
        raise WireError("codec", f"{len(block)} compressed bytes cannot stand for {size}")
    try:
        found: bytes = lz4.block.decompress(block, uncompressed_size=size)
    except Exception as error:  # hostile bytes reach lz4 here, so every error of its is one refusal
        raise WireError("codec", f"{type(error).__name__}: {error}") from None
    if len(found) != size:
        raise WireError("codec", f"decompressed to {len(found)} bytes, its header says {size}")
    return found


def aligned(size: int) -> memoryview:
    """Room for a frame, or for an arena, at an address that is a multiple of 64."""
    buffer = np.empty(size + ALIGN, np.uint8)
    at = -buffer.__array_interface__["data"][0] % ALIGN
    return buffer.data[at : at + size]


def head_size(frame: Buffer) -> int:
    """Bytes of a frame before its arena.

    Raises:
        WireError: `truncated`, there are fewer.
    """
    size = int.from_bytes(frame[_ARENA_AT], "little")
    if not _PREFIX_BYTES <= size <= len(frame):
        raise WireError("truncated", f"{len(frame)} bytes, its arena begins at {size}")
    return size


def unpack(data: Buffer) -> Any:
    """A msgpack value under our limits.

    Raises:
        WireError: `header`, whatever msgpack disliked.
    """
    try:
        if len(data) <= MAX_ITEMS:  # too short for any of the limits, and reading them takes as long as all else
            return msgpack.unpackb(data, max_ext_len=0)
        return msgpack.unpackb(
            data,
            strict_map_key=True,
            max_str_len=MAX_HEADER,
            max_bin_len=MAX_SPECS,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except Exception as error:  # hostile bytes reach msgpack here, so every error of its is one refusal
        raise WireError("header", f"{type(error).__name__}: {error}") from None


def _header(data: Buffer) -> tuple[str, str, bytes, list[dict[str, Any]]]:
    header = unpack(data)
    if type(header) is not list or [*map(type, header)] != _HEADER_TYPES:
        raise WireError("header", "expected [kind, node, specs, fields]")
    kind, node, specs, maps = header
    if len(kind) > 64 or len(node) > 64:
        raise WireError("header", "kind and node have at most 64 characters")
    if not 1 <= len(maps) <= MAX_RUN:
        raise WireError("run", f"{len(maps)} messages in one frame, from 1 to {MAX_RUN} travel")
    for fields in maps:
        if type(fields) is not dict:
            raise WireError("header", "fields are a list of maps")
        for name, value in fields.items():
            if type(name) is not str or (type(value) not in _SCALARS and value != [] and not _plain(value, MAX_DEPTH)):
                raise WireError("fields", f"fields nest deeper than {MAX_DEPTH} or hold bytes")
    return kind, node, specs, maps


def _plain(value: Any, depth: int) -> bool:
    if type(value) is dict:
        return depth > 0 and all(type(k) is str and _plain(v, depth - 1) for k, v in value.items())
    if type(value) is list:
        return depth > 0 and all(_plain(v, depth - 1) for v in value)
    return type(value) in _SCALARS


@lru_cache(maxsize=1024)
def _parsed_specs(packed: bytes) -> tuple[tuple[_View, ...], int]:
    """Checked array specs and the size of an arena. Cached by their bytes: a link sends the same few over and over."""
    if len(packed) > MAX_SPECS:
        raise WireError("specs", f"{len(packed)} bytes of specs, at most {MAX_SPECS}")
    rows = unpack(packed)
    if type(rows) is not list or len(rows) > MAX_ARRAYS:
        raise WireError("specs", f"expected a list of at most {MAX_ARRAYS}")
    placed = [_parsed_spec(row) for row in rows]
    if len({p.name for p in placed}) != len(placed):
        raise WireError("specs", "an array is named twice")
    end = 0
    for p in placed:
        if p.offset != end:
            raise WireError("arena", f"{p.name!r} at {p.offset}, expected {end}")
        end = _round_up(end + p.nbytes)
    return _views(placed), end


def _parsed_spec(row: Any) -> _Placed:
    if type(row) is not list or len(row) != 4:
        raise WireError("specs", "a spec is [name, dtype, shape, offset]")
    name, dtype_name, shape, offset = row
    if type(name) is not str or len(name) > 64 or type(offset) is not int or type(shape) is not list:
        raise WireError("specs", "a spec is [name, dtype, shape, offset]")
    dtype = DTYPES.get(dtype_name) if type(dtype_name) is str else None
    if dtype is None:
        raise WireError("dtype", f"{name!r}: {str(dtype_name)[:64]!r} is not allowed")
    if len(shape) > MAX_NDIM or any(type(d) is not int or not 0 <= d <= MAX_FRAME for d in shape):
        raise WireError("shape", f"{name!r}: at most {MAX_NDIM} dimensions, each from 0 to {MAX_FRAME}")
    if math.prod(d or 1 for d in shape) * dtype.itemsize > MAX_FRAME:  # numpy too counts an empty dimension as 1
        raise WireError("shape", f"{name!r}: more than {MAX_FRAME} bytes")
    return _Placed(name, dtype, tuple(shape), offset, math.prod(shape) * dtype.itemsize)
