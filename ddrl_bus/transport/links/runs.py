"""Small messages for one receiver leave together, as one frame: header, hand-over and wake-up are paid for once."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns, time_ns
from typing import Any, Final

from ddrl_bus.transport import wire
from ddrl_bus.transport.ledger import Counter
from ddrl_bus.transport.sessions.queue import Lane
from ddrl_bus.transport.wire import Arena, Buffer

SMALL: Final = 32 << 10
"""Arenas of fewer bytes travel in runs."""
RUN_BYTES: Final = 192 << 10
"""Of arenas and fields; the frame has a beginning too."""


class Run:
    """What goes out on `lane` when the event loop turns, or before: messages of one layout, numbered one by one."""

    __slots__ = ("_arenas", "_fields", "_lane", "_layout", "_seq", "_since", "encode_ns", "nbytes", "produced")

    def __init__(self, lane: Lane[Any], layout: wire.Layout, produced: Counter) -> None:
        self.produced = produced
        self.nbytes = self.encode_ns = 0
        self._lane, self._layout = lane, layout
        self._seq, self._since = lane.sent + 1, time_ns()
        self._fields: list[bytes] = []
        self._arenas: list[Arena] = []

    def take(self, lane: Lane[Any], arena: Arena, fields: Mapping[str, Any]) -> bool:
        """Whether the lane's next message goes with this run; nobody may write to `arena` any more then."""
        began = perf_counter_ns()
        layout, packed, count = arena.layout, wire.packed(fields), len(self._arenas)
        nbytes = self.nbytes + len(packed) + layout.size
        fits = nbytes <= RUN_BYTES and count < wire.MAX_RUN
        if count and not (fits and layout is self._layout and lane is self._lane):
            return False
        self.nbytes = nbytes
        self._fields.append(packed)
        self._arenas.append(arena)
        self.encode_ns += perf_counter_ns() - began
        return True

    def encode(self, node: str, epoch: int) -> Buffer:
        began = perf_counter_ns()
        lane, since = self._lane.epoch, self._since
        frame = wire.encode_run(self._layout, node, epoch, self._seq, self._fields, self._arenas, lane, since)
        self.encode_ns += perf_counter_ns() - began
        return frame
