"""What compressing messages saves and costs: `ddrl bench codec`.

One process packs and unpacks each payload as a link does, plain and with LZ4. Where a link carries fewer bytes a second
than the *break-even*, compressing is the quicker way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np

from ddrl_bus.bench.ends import PAYLOADS, Payload
from ddrl_bus.bench.report import BYTES, GAIN, US, About, Figure, Kind, Repeat, Row, row, settled, us_a_call
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Array, Layout

Fill = Callable[[np.random.Generator, Mapping[str, Array]], None]
MB_S: Final = Kind("MB/s", "more", 0)


def _noise(rng: np.random.Generator, arrays: Mapping[str, Array]) -> None:
    """Nothing that repeats: what compresses worst."""
    for array in arrays.values():
        array[...] = rng.integers(0, 256, array.shape) if array.dtype.kind in "ui" else rng.normal(size=array.shape)


def _game(rng: np.random.Generator, arrays: Mapping[str, Array]) -> None:
    """Frames as of a simple game: a still background, some things that move; a stack shows each four times."""
    _noise(rng, arrays)
    rows, height, width, stack = arrays["obs"].shape
    frames = np.full((rows + stack - 1, height, width), 87, np.uint8)
    frames[:, :14] = rng.integers(0, 256, (14, width))
    for t, frame in enumerate(frames):
        for start in (7, 31, 60):
            frame[20 + (start + 3 * t) % 50 :][:6, (start + 2 * t) % 70 :][:, :6] = 236
    for t in range(rows):
        arrays["obs"][t] = np.moveaxis(frames[t : t + stack], 0, -1)


def _floats(rng: np.random.Generator, arrays: Mapping[str, Array]) -> None:
    for array in arrays.values():
        array[...] = 0.05 * rng.normal(size=array.shape)


CASES: Final[tuple[tuple[str, Payload, Fill], ...]] = (
    ("small unroll of floats, 320 B", PAYLOADS["small unroll, 320 B"], _floats),
    ("pixel unroll as of a simple game, 567 KB", PAYLOADS["pixel unroll, 567 KB"], _game),
    ("pixel unroll of noise, 567 KB", PAYLOADS["pixel unroll, 567 KB"], _noise),
    ("weights, 6.7 MB", PAYLOADS["weights, 6.7 MB"], _floats),
)
ABOUT: Final = About(
    bench="codec",
    title="What compressing messages saves and costs",
    method="""One process packs each payload and unpacks it again as a link does, its digest apart: as it lies in
memory, and as one LZ4 block. The frames are made up: a still background with a few things that move, as in simple
games, and noise, which is the worst there is.""",
    reading="""Bytes of a whole message. The break-even is the bandwidth below which compressing is the quicker way:
bytes saved over time spent; 0: nothing is saved. `codec: auto`, the default of a link, compresses what is mostly
images and flags.""",
)
_KINDS: Final = {
    "plain": BYTES,
    "LZ4": BYTES,
    "plain encode": US,
    "LZ4 encode": US,
    "plain decode": US,
    "LZ4 decode": US,
    "break-even": MB_S,
}


def measure(repeats: int = 5, seconds: float = 0.1) -> Iterator[Row]:
    """A row per payload; each figure over so many seconds in each repeat."""
    keep_freed_memory()  # as every node does
    for name, payload, fill in CASES:
        layout = Layout("bench", payload.specs)
        content = {each: np.zeros(shape, dtype) for each, (dtype, shape) in payload.specs.items()}
        fill(np.random.default_rng(0), content)
        yield settled(partial(_once, layout, content, seconds), partial(_row, name), repeats)


def _row(name: str, repeats: Sequence[Repeat]) -> Row:
    made = row("a message", name, repeats, _KINDS)
    smaller = Figure(GAIN, tuple(each["plain"] / each["LZ4"] for each in repeats))
    return Row(made.section, name, {**made.figures, "smaller": smaller}, "smaller")


def _once(layout: Layout, content: Mapping[str, Array], seconds: float) -> Repeat:
    arena = layout.arena()
    for name, array in content.items():
        arena.arrays[name][...] = array
    found: dict[str, float] = {}
    for way, compress in (("plain", False), ("LZ4", True)):
        encode = partial(arena.encode, "actor-0", 1, 1, {"version": 1}, compress=compress)
        frame = encode()
        found[way] = len(frame)
        found[f"{way} encode"] = us_a_call(encode, seconds)
        found[f"{way} decode"] = us_a_call(partial(wire.decode, frame), seconds)
    spent = sum(found[f"LZ4 {what}"] - found[f"plain {what}"] for what in ("encode", "decode"))
    saved = found["plain"] - found["LZ4"]
    return found | {"break-even": saved / max(spent, 1e-3) if saved > 0 else 0.0}
