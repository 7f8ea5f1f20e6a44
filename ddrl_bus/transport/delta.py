"""A frame written against another one of the same arrays: `base` → `value`.

    | head of value, as it is | nothing: the arena is that of base, or one LZ4 block of planes |

The planes are of arena(value) xor arena(base): all bytes whose place is 0 modulo 4, then those at 1, 2 and 3. Weights
change little in an optimiser step, so that signs, exponents and first digits leave long runs of zeros. Among the last
digits, which are noise, LZ4 would find none in floats of 32 bits, and look for them twice as long in those of 16.
"""

from __future__ import annotations

from typing import Final

import lz4.block
import numpy as np

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.wire import Array

_AT_A_TIME: Final = 256 << 10
_PLANES: Final = 4


def same_arena(a: memoryview, b: memoryview) -> bool:
    """Whether two frames have arrays, and the same; ends at the first difference."""
    x, y = _arena(a), _arena(b)
    return 0 < len(x) == len(y) and all(
        np.array_equal(x[at : at + _AT_A_TIME], y[at : at + _AT_A_TIME]) for at in range(0, len(x), _AT_A_TIME)
    )


def head(value: memoryview) -> memoryview:
    """`value` against a base with the same arena."""
    return value[: wire.head_size(value)]


def encode(base: memoryview, value: memoryview) -> memoryview | None:
    """`value` against `base`; None if their sizes differ, or if that makes nothing smaller."""
    old, new = _arena(base), _arena(value)
    if len(old) != len(new) or not len(new) or len(new) % _PLANES:
        return None
    planes = np.ascontiguousarray(np.bitwise_xor(old, new).reshape(-1, _PLANES).T)
    packed = bytes(head(value)) + lz4.block.compress(planes.reshape(-1).data, store_size=False)
    return memoryview(packed) if len(packed) < len(value) else None


def decode(base: memoryview, packed: memoryview) -> memoryview:
    """The value that `packed` stands for. What it may allocate is bounded by the size of `base`.

    Raises:
        WireError: `codec` or `truncated`: whatever is wrong with it; no other exception leaves.
    """
    size, old = wire.head_size(packed), _arena(base)
    value = wire.aligned(size + len(old))
    value[:size] = packed[:size]
    new, block = np.frombuffer(value, np.uint8)[size:], packed[size:]
    if not len(block):
        np.copyto(new, old)
        return value.toreadonly()
    if len(old) % _PLANES:
        raise WireError("codec", f"a difference to {len(old)} bytes, which are no arena")
    planes = np.frombuffer(wire.decompressed(block, len(old)), np.uint8).reshape(_PLANES, -1)
    for n, plane in enumerate(planes):  # a third of the time of one transposition
        new[n::_PLANES] = plane
    new ^= old
    return value.toreadonly()


def _arena(frame: memoryview) -> Array:
    return np.frombuffer(frame, np.uint8)[wire.head_size(frame) :]
