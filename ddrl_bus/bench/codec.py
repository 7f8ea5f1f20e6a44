"""What the codecs of links save and cost: `ddrl bench codec`.

One process packs and unpacks each payload as a link does: plain, with LZ4, and weights as their difference from those
before (`codec: delta`). Where a link carries fewer bytes a second than the *break-even*, the codec is the quicker way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final

import numpy as np

from ddrl_bus.bench.ends import PAYLOADS, Payload
from ddrl_bus.bench.report import BYTES, GAIN, US, About, Figure, Kind, Repeat, Row, row, settled, us_a_call
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.transport import delta, wire
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
STEPS: Final = (("half-precision weights, all rows move", 1.0), ("half-precision weights, 45 % of rows move", 0.45))
ABOUT: Final = About(
    bench="codec",
    title="What the codecs of links save and cost",
    method="""One process packs each payload and unpacks it again as a link does, its digest apart: plain, as it lies
in memory; lz4, as one LZ4 block; delta, half-precision weights as what is different from those before, compressed. The
frames are made up: a still background with a few things that move, as in simple games, and noise, which is the worst
there is. So are the optimiser's steps: all rows of weights, or 45 % of them, move by 2.5e-5 × N(0, 1), of weights that
are 0.05 × N(0, 1).""",
    reading="""Bytes of a whole message. The break-even is the bandwidth below which the codec is the quicker way:
bytes saved over time spent; 0: nothing is saved. `codec: auto`, the default of a link, compresses what is mostly
images and flags.""",
)
_KINDS: Final = {
    "plain": BYTES,
    "coded": BYTES,
    "plain encode": US,
    "encode": US,
    "plain decode": US,
    "decode": US,
    "break-even": MB_S,
}


def measure(repeats: int = 5, seconds: float = 0.1) -> Iterator[Row]:
    """A row per payload; each figure over so many seconds in each repeat."""
    keep_freed_memory()  # as every node does
    for name, payload, fill in CASES:
        layout = Layout("bench", payload.specs)
        content = {each: np.zeros(shape, dtype) for each, (dtype, shape) in payload.specs.items()}
        fill(np.random.default_rng(0), content)
        yield settled(partial(_lz4, layout, content, seconds), partial(_row, "lz4", name), repeats)
    for name, moved in STEPS:
        base, value = _two_values(moved)
        yield settled(partial(_delta, base, value, seconds), partial(_row, "delta", name), repeats)


def _row(codec: str, name: str, repeats: Sequence[Repeat]) -> Row:
    made = row(f"codec: {codec}", name, repeats, _KINDS)
    smaller = Figure(GAIN, tuple(each["plain"] / each["coded"] for each in repeats))
    return Row(made.section, name, {**made.figures, "smaller": smaller}, "smaller")


def _lz4(layout: Layout, content: Mapping[str, Array], seconds: float) -> Repeat:
    arena = layout.arena()
    for name, array in content.items():
        arena.arrays[name][...] = array
    ways = [partial(arena.encode, "actor-0", 1, 1, {"version": 1}, compress=compress) for compress in (False, True)]
    (plain, plain_us), (coded, coded_us) = ((encode(), us_a_call(encode, seconds)) for encode in ways)
    decode = [us_a_call(partial(wire.decode, frame), seconds) for frame in (plain, coded)]
    return _costs(len(plain), len(coded), (plain_us, coded_us), (decode[0], decode[1]))


def _two_values(moved: float) -> tuple[memoryview, memoryview]:
    """Half-precision weights before and after a step that moved so much of their rows."""
    rng = np.random.default_rng(0)
    weights = 0.05 * rng.normal(size=(1_675, 1_000))
    step = 2.5e-5 * rng.normal(size=weights.shape) * (rng.random((len(weights), 1)) < moved)
    before, after = (
        wire.encode("weights", "learner-0", 1, number, {"version": number}, {"weights": each.astype(np.float16)})
        for number, each in ((1, weights), (2, weights + step))
    )
    return before, after


def _delta(base: memoryview, value: memoryview, seconds: float) -> Repeat:
    """Plain is what a subscriber gets without a base: the frame as it was published, and decoded."""
    packed = delta.encode(base, value)
    assert packed is not None
    encode = us_a_call(partial(delta.encode, base, value), seconds)
    plain = us_a_call(partial(wire.decode, value), seconds)
    decode = us_a_call(lambda: wire.decode(delta.decode(base, packed)), seconds)
    return _costs(len(value), len(packed), (0.0, encode), (plain, decode))


def _costs(plain: int, coded: int, encode: tuple[float, float], decode: tuple[float, float]) -> Repeat:
    """Bytes; microseconds plain and coded."""
    spent = encode[1] - encode[0] + decode[1] - decode[0]
    found = dict(zip(_KINDS, (plain, coded, *encode, *decode), strict=False))
    return found | {"break-even": (plain - coded) / max(spent, 1e-3) if coded < plain else 0.0}
