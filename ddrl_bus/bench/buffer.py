"""What a replay buffer costs over plain numpy copies of the same bytes: `ddrl bench buffer`.

A *copy* is one `np.copyto` for each array of an unroll (against `add`), or of a batch (against what `sample` does once
it has drawn, *gather*), between contiguous arrays of the same shapes. Where the ring would be, the copies go round
memory that is too large for caches, as the ring's is. All in one process, turn by turn; quote the ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Final

import numpy as np

from ddrl_bus.bench.report import US, About, Repeat, Row, row, settled, us_a_call
from ddrl_bus.experience import UnrollSchema
from ddrl_bus.launch.malloc import keep_freed_memory
from ddrl_bus.replay_buffer import ReplayBuffer, Spec
from ddrl_bus.sum_tree import SumTree
from ddrl_bus.transport.wire import Array

BATCH: Final = 512
ENVS: Final = 16
_FAR_BYTES: Final = 128 << 20
_SMALL: Final[Spec] = "float32", (4,)
_FRAME: Final[Spec] = "uint8", (84, 84)


@dataclass(frozen=True, slots=True)
class Case:
    """Unrolls of `rows` × ENVS, from whose first `starts` rows windows of `length` are drawn, BATCH at a time."""

    payload: str
    obs: Spec
    stack: int
    rows: int
    starts: int
    length: int
    capacity: int

    def schema(self) -> UnrollSchema:
        state = {"frames": (self.obs[0], (self.stack - 1, *self.obs[1]))} if self.stack > 1 else {}
        return UnrollSchema(self.obs, ("int64", ()), {}, self.rows, state, starts=self.starts)


CASES: Final = (
    Case("4 floats, n = 1", _SMALL, 1, 16, 16, 1, 1 << 20),
    Case("4 floats, n = 3", _SMALL, 1, 32, 30, 3, 1 << 20),
    Case("4 floats, 20 rows", _SMALL, 1, 20, 1, 20, 1 << 16),
    Case("84 × 84, stack 4, n = 1", _FRAME, 4, 16, 16, 1, 1 << 15),
    Case("84 × 84, stack 4, n = 3", _FRAME, 4, 32, 30, 3, 1 << 15),
)


ABOUT: Final = About(
    bench="buffer",
    title="What a replay buffer costs over plain copies of the same bytes",
    method="""Adding an unroll to the buffer, and gathering a batch of 512 windows that were drawn from it, each
against one numpy copy per array of the same bytes between contiguous arrays. Where the buffer's memory would be,
the copies go round memory that is too large for caches. One process, turn by turn; drawing is apart.""",
    reading="Microseconds a call. The goal is a ratio of 1.5 to a copy.",
    baseline="plain copies",
)
KINDS: Final = dict.fromkeys(("add", "copy in", "draw", "gather", "copy out"), US)
RATIOS: Final = {"gather ratio": ("gather", "copy out"), "add ratio": ("add", "copy in")}


def measure(repeats: int = 9, seconds: float = 0.1) -> Iterator[Row]:
    """A row of each case; each of its calls is made for so long in each repeat."""
    keep_freed_memory()  # as every node does
    for case in CASES:
        make = partial(row, "adding and gathering", case.payload, kinds=KINDS, ratios=RATIOS)
        yield settled(partial(_once, _calls(case), seconds), make, repeats)


def _once(calls: Mapping[str, Callable[[], object]], seconds: float) -> Repeat:
    us = {name: us_a_call(call, seconds) for name, call in calls.items()}
    return us | {"gather": us["sample"] - us["draw"]}


def _calls(case: Case) -> dict[str, Callable[[], object]]:
    rng, schema = np.random.default_rng(0), case.schema()
    buffer = ReplayBuffer(schema.windows(case.length), case.rows, case.starts, case.capacity, alpha=0.6)
    unroll = {name: np.zeros(shape, dtype) for name, (dtype, shape) in schema.unroll_specs(ENVS).items()}
    unroll["obs"][...] = 1  # of a page that nothing was written to there is but one
    unroll["priority"][...] = rng.random(unroll["priority"].shape)
    while buffer.items < buffer.capacity:
        buffer.add(unroll)
    tree = SumTree(buffer.capacity, rng)
    tree.set_range(0, rng.random(buffer.capacity))
    batch = buffer.sample(BATCH, _allocate)
    far_unrolls, far_batches = cycle(_many(unroll)), cycle(_many(batch))
    return {
        "add": lambda: buffer.add(unroll),
        "copy in": lambda: _copy(unroll, next(far_unrolls)),
        "sample": lambda: buffer.sample(BATCH, _allocate),
        "draw": lambda: tree.sample(BATCH),
        "copy out": lambda: _copy(next(far_batches), _allocate(buffer.specs(BATCH))),
    }


def _many(arrays: Mapping[str, Array]) -> list[dict[str, Array]]:
    """As many copies as no cache holds."""
    count = -(-_FAR_BYTES // sum(array.nbytes for array in arrays.values()))
    return [{name: array.copy() for name, array in arrays.items()} for _ in range(count)]


def _copy(arrays: Mapping[str, Array], to: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        np.copyto(to[name], array)


def _allocate(specs: Mapping[str, Spec]) -> dict[str, Array]:
    return {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}
