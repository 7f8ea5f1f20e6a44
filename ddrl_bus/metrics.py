"""Where a node's time goes, and the file that keeps it.

A node's time is counted in its ledger under `time/…`, in nanoseconds, so that a killed node's figures survive too.
docs/performance.md defines communication overhead on these names.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from ddrl_bus.transport.ledger import Counter, Ledger

WORK: Final = ("env", "forward", "record", "draw", "learn", "evaluate")
"""What the same loop without a bus would spend as well."""
COMMUNICATION: Final = ("pack", "send", "unpack", "handoff", "all_reduce")
"""What the bus adds: encoding, handing over, decoding and loading, and the rest of the time in which the node's thread
stood idle without waiting for a peer (`idle` in the ledger, less the waits). Replicas sum their gradients, which the
ledger counts within `learn` too."""
WAITS: Final = ("send_wait", "queue_wait", "weights_wait", "act_wait", "requests_wait", "replicas_wait")
"""Waiting because a peer is the bottleneck: no credit left, no batch full yet, no newer weights yet, no actions yet, no
requests to answer, no other replica ready yet."""


class Clock:
    """Adds the nanoseconds of a `with` block to one counter."""

    __slots__ = ("_began", "_counter")

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._began = 0

    def __enter__(self) -> None:
        self._began = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self._counter.add(time.perf_counter_ns() - self._began)


def clock(ledger: Ledger, what: str) -> AbstractContextManager[None]:
    """A reusable `with` block that counts under `time/what`."""
    return Clock(ledger.counter("time", what))


class SharedClock:
    """Counts the time in which all of `workers` wait at once, under what the first to go on had waited for."""

    def __init__(self, ledger: Ledger, workers: int) -> None:
        self._ledger, self._working, self._began = ledger, workers, 0

    @contextmanager
    def waits(self, what: str) -> Iterator[None]:
        """One worker waits for this."""
        self._working -= 1
        if not self._working:
            self._began = time.perf_counter_ns()
        try:
            yield
        finally:
            if not self._working:
                self._ledger.counter("time", what).add(time.perf_counter_ns() - self._began)
            self._working += 1


def shares(counters: Mapping[str, int], before: Mapping[str, int] | None = None) -> dict[str, float]:
    """What part of a node's busy time went where, and `overhead`, the part that is communication.

    Busy time is all counted time without waiting; each wait is given as its share of busy and waiting time together.

    Args:
        before: an earlier reading; the shares are then of the time in between.
    """
    before = before or {}
    spent = {
        what: counters.get(f"time/{what}", 0) - before.get(f"time/{what}", 0)
        for what in (*WORK, *COMMUNICATION, *WAITS, "idle")
    }
    spent["learn"] = max(0, spent["learn"] - spent["all_reduce"])  # an update counts as learnt once it is over
    waited = sum(spent[what] for what in WAITS)
    spent["handoff"] = max(0, spent.pop("idle") - waited)
    busy = sum(spent.values()) - waited
    if busy <= 0:
        return {}
    return {
        **{what: ns / busy for what, ns in spent.items() if ns and what not in WAITS},
        **{what: ns / (busy + waited) for what, ns in spent.items() if ns and what in WAITS},
        "overhead": sum(spent[what] for what in COMMUNICATION) / busy,
    }


def finite(value: Any) -> Any:
    """`value` with None for every number that is not finite: JSON has none, and a loss may well become one."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: finite(item) for key, item in value.items()}
        case list():
            return [finite(item) for item in value]
        case _:
            return value


class JsonLines:
    """A file of one JSON object a line, flushed at each."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(finite(record), allow_nan=False, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
