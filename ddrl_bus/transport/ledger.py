"""Counters that survive `kill -9`: a node's ledger is one memory-mapped page file.

An increment is a store into the page cache, so whoever opens the file later, while the node lives or after it was
killed, reads what the node had really done. Names are paths: `link/lane/what`, for instance
`trajectories/actor-0@…>learner-0@…/produced`. Every value is a signed 64-bit integer; times are nanoseconds.

The conservation law that `audit` checks lane by lane (a lane is one life of a sender towards one of a receiver):

    produced = accepted + refused + lost + in_flight     `produced` is counted by the sender, the rest by the receiver
    accepted = taken + queued                            on the receiver
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

_SLOT: Final = 256
_NAME: Final = _SLOT - 8
_SLOTS: Final = 1 << 14
_CELLS: Final = _SLOT // 8


class Counter:
    """One cell of a ledger."""

    __slots__ = ("_cells", "_index")

    def __init__(self, cells: memoryview, index: int) -> None:
        self._cells = cells
        self._index = index

    def add(self, n: int = 1) -> None:
        self._cells[self._index] += n

    @property
    def value(self) -> int:
        count: int = self._cells[self._index]
        return count

    def set(self, value: int) -> None:
        self._cells[self._index] = value


class Ledger:
    """The counters of one life of one node; in the file `path`, or in memory only.

    The file is sparse: unused slots take no space.

    Raises:
        FileExistsError: `path` holds another life's counters.
    """

    def __init__(self, path: Path | None = None) -> None:
        size = _SLOT * _SLOTS
        if path is None:
            self._page = mmap.mmap(-1, size)
        else:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.ftruncate(fd, size)
                self._page = mmap.mmap(fd, size)
            finally:
                os.close(fd)
        self._cells = memoryview(self._page).cast("q")
        self._counters: dict[str, Counter] = {}

    def counter(self, *path: str) -> Counter:
        """The counter of this name, made at first use with value 0."""
        name = "/".join(path)
        counter = self._counters.get(name)
        if counter is None:
            counter = self._counters[name] = self._new(name)
        return counter

    def _new(self, name: str) -> Counter:
        encoded, slot = name.encode(), len(self._counters)
        if not 0 < len(encoded) <= _NAME or b"\0" in encoded or slot >= _SLOTS:
            raise ValueError(f"ledger: cannot hold counter {name!r}: {len(encoded)} bytes, slot {slot} of {_SLOTS}")
        self._page[slot * _SLOT : slot * _SLOT + len(encoded)] = encoded
        return Counter(self._cells, slot * _CELLS + _CELLS - 1)

    @property
    def room(self) -> int:
        """Counters that it can still make."""
        return _SLOTS - len(self._counters)

    def snapshot(self) -> dict[str, int]:
        return {name: counter.value for name, counter in self._counters.items()}

    def close(self) -> None:
        """Give the mapping back; the file stays. Counters must not be used afterwards."""
        self._cells.release()
        self._page.close()


def read(path: Path) -> dict[str, int]:
    """What the ledger file at `path` holds, whether or not its node lives."""
    counters = {}
    with path.open("rb") as page:
        while name := (slot := page.read(_SLOT))[:_NAME].rstrip(b"\0"):
            counters[name.decode(errors="replace")] = int.from_bytes(slot[_NAME:], "little", signed=True)
    return counters


OUTCOMES: Final = ("accepted", "refused", "lost")


@dataclass(frozen=True, slots=True)
class Balance:
    """One link's books over all its lanes. `closed` says that they add up and that nothing is still on its way."""

    produced: int = 0
    accepted: int = 0
    refused: int = 0
    lost: int = 0
    in_flight: int = 0
    duplicates: int = 0
    taken: int = 0
    queued: int = 0
    closed: bool = True


def audit(lives: Iterable[Mapping[str, int]], living: frozenset[str] = frozenset()) -> dict[str, Balance]:
    """Close the books of every queue link over the ledgers of all lives of all nodes.

    A lane with a dead end can deliver nothing any more: what its sender produced and its receiver never saw is
    lost. Between two living ends it is in flight. More outcomes than products, or a message still in flight or
    queued at a living receiver, leaves the link open. What a dead receiver had queued stays `queued`: nobody took it.

    Args:
        lives: ledger snapshots, one per life, with sender and receiver counters of each lane.
        living: `node@epoch` of the lives that still run.
    """
    lanes: dict[tuple[str, str], dict[str, int]] = {}
    for life in lives:
        for name, value in life.items():
            link, _, rest = name.partition("/")
            lane, _, what = rest.rpartition("/")
            if ">" in lane:
                books = lanes.setdefault((link, lane), {})
                books[what] = books.get(what, 0) + value
    balances: dict[str, Balance] = {}
    for (link, lane), books in lanes.items():
        sender, _, receiver = lane.partition(">")
        balance = _lane_balance(books, sender_lives=sender in living, receiver_lives=receiver in living)
        balances[link] = _sum(balances.get(link, Balance()), balance)
    return balances


def _lane_balance(books: Mapping[str, int], *, sender_lives: bool, receiver_lives: bool) -> Balance:
    produced = books.get("produced", 0)
    missing = produced - sum(books.get(outcome, 0) for outcome in OUTCOMES)
    in_flight = missing if sender_lives and receiver_lives else 0
    queued = books.get("accepted", 0) - books.get("taken", 0)
    return Balance(
        produced=produced,
        accepted=books.get("accepted", 0),
        refused=books.get("refused", 0),
        lost=books.get("lost", 0) + missing - in_flight,
        in_flight=in_flight,
        duplicates=books.get("duplicates", 0),
        taken=books.get("taken", 0),
        queued=queued,
        closed=missing >= 0 and in_flight == 0 and queued >= 0 and not (queued and receiver_lives),
    )


def _sum(a: Balance, b: Balance) -> Balance:
    counts = {f.name: getattr(a, f.name) + getattr(b, f.name) for f in fields(Balance) if f.name != "closed"}
    return Balance(**counts, closed=a.closed and b.closed)
