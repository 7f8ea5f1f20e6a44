"""Frames written against one another: what comes back is what was put in, and malformed ones are refused."""

from __future__ import annotations

from random import Random
from typing import Any

import lz4.block
import numpy as np
import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.transport import delta, wire
from ddrl_bus.transport.wire import ALIGN, Array


def frame(values: Array, number: int = 1, **fields: int) -> memoryview:
    return wire.encode("weights", "learner-0", 1, number, fields, {"v": values})


def weights(step: int = 0, dtype: type[np.floating[Any]] = np.float16) -> Array:
    rng = np.random.default_rng(0)
    return (rng.standard_normal(50_000) + 1e-4 * step * rng.standard_normal(50_000)).astype(dtype)


@pytest.mark.parametrize("number", [1, 1 << 40])  # the head is another one, and may be longer
@pytest.mark.parametrize(("dtype", "share"), [(np.float16, 0.4), (np.float32, 0.7)])
def test_a_difference_brings_back_every_bit(dtype: type[np.floating[Any]], share: float, number: int) -> None:
    base, value = frame(weights(0, dtype)), frame(weights(1, dtype), number, env_steps=number)
    packed = delta.encode(base, value)
    assert packed is not None
    assert len(packed) < share * len(value)
    decoded = delta.decode(base, packed)
    assert (decoded, decoded.readonly) == (value, True)
    arrays = wire.decode(decoded).arrays
    assert arrays["v"].__array_interface__["data"][0] % ALIGN == 0


def test_the_same_arrays_are_a_head() -> None:
    base, value = frame(weights()), frame(weights(), 2, confirm=1)
    assert delta.same_arena(base, value)
    assert delta.decode(base, delta.head(value)) == value


@pytest.mark.parametrize("at", [0, 25_000, 49_999])
def test_one_bit_makes_arrays_others(at: int) -> None:
    other = weights()
    other.view(np.uint16)[at] ^= 1
    assert not delta.same_arena(frame(weights()), frame(other))


def test_nothing_is_made_where_it_does_not_pay() -> None:
    noise = [np.frombuffer(Random(n).randbytes(9999), np.uint8) for n in range(2)]
    assert delta.encode(frame(noise[0]), frame(noise[1])) is None
    assert delta.encode(frame(weights()), frame(weights()[:-64])) is None
    empty = frame(np.zeros(0))
    assert delta.encode(empty, empty) is None
    assert not delta.same_arena(empty, empty)


def test_garbage_is_refused_and_nothing_else_is_raised() -> None:
    base, value = frame(weights()), frame(weights(1))
    packed, rng, refused = delta.encode(base, value), Random(1), set()
    assert packed is not None
    for _ in range(2000):
        garbled = bytearray(packed[: rng.randrange(len(packed))] if rng.random() < 0.3 else packed)
        for _ in range(rng.randrange(4)):
            garbled[rng.randrange(len(garbled))] ^= 1 << rng.randrange(8) if garbled else 0
        try:
            decoded = delta.decode(base, memoryview(garbled))
        except WireError as error:
            refused.add(error.reason)
        else:
            assert len(decoded) <= len(garbled) + len(base)
    assert refused == {"truncated", "codec"}


def test_what_is_no_arena_is_no_base() -> None:
    """As of a frame that is compressed itself."""
    value = frame(weights())
    bases = [value[: len(value) - n] for n in range(1, 4)]
    assert [delta.encode(base, base) for base in bases] == [None] * 3
    packed = delta.encode(value, frame(weights(1)))
    assert packed is not None
    for base in bases:
        with pytest.raises(WireError, match="no arena"):
            delta.decode(base, packed)


@pytest.mark.parametrize("size", [10, 200_000])
def test_a_block_of_another_size_is_refused(size: int) -> None:
    value = frame(weights())
    packed = bytes(delta.head(value)) + lz4.block.compress(bytes(size), store_size=False)
    with pytest.raises(WireError, match=r"compressed bytes|decompressed|Decompression"):
        delta.decode(value, memoryview(packed))
