"""What the nodes of a run counted between two moments: where each one's time went, and what each link carried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddrl_bus.bench.history import group_of
from ddrl_bus.bench.report import Repeat
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK, shares
from ddrl_bus.transport import ledger

BACK_PRESSURE: Final = "send_wait"
Lives = Mapping[str, Mapping[str, int]]
"""node@epoch → its counters"""


def lives(folder: Path) -> Lives:
    """As the ledgers of a run directory say now, whether or not its nodes live."""
    return {page.stem: ledger.read(page) for page in sorted((folder / "ledger").glob("*.page"))}


@dataclass(frozen=True)
class Books:
    """Between two moments, `seconds` apart."""

    before: Lives
    after: Lives
    seconds: float

    @property
    def groups(self) -> list[str]:
        """Those whose time is counted."""
        return sorted({_group(life) for life in self.after if self._shares(life)})

    def _shares(self, life: str) -> dict[str, float]:
        return shares(self.after[life], self.before.get(life))

    def count(self, what: str) -> int:
        """Of all nodes together."""
        return sum(life.get(what, 0) - self.before.get(name, {}).get(what, 0) for name, life in self.after.items())

    def members(self, group: str) -> int:
        return len({life.partition("@")[0] for life in self.after if _group(life) == group})

    def time(self, group: str) -> Repeat:
        """Percent of all time, the mean over the group's nodes."""
        splits = [split for life in self.after if _group(life) == group and (split := self._shares(life))]
        found: dict[str, float] = defaultdict(float)
        for split in splits:
            busy = 1 - sum(split.get(wait, 0.0) for wait in WAITS)
            found["busy"] += 100 * busy / len(splits)
            for part, share in split.items():
                found[part] += 100 * share * (1 if part in WAITS else busy) / len(splits)
            found["overhead, busy"] += 100 * split["overhead"] / len(splits)
        return {"back-pressure": found.get(BACK_PRESSURE, 0.0), **found}

    def codec(self, group: str) -> float:
        """Percent of the seconds in which a node encoded or decoded messages, the mean over the group's nodes."""
        ns = sum(
            value - self.before.get(life, {}).get(name, 0)
            for life, counters in self.after.items()
            if _group(life) == group
            for name, value in counters.items()
            if name.endswith(("/encode_ns", "/decode_ns"))
        )
        return ns / 1e7 / self.seconds / self.members(group)

    def links(self) -> Iterator[tuple[str, Repeat]]:
        """Of each link that carried something: messages, bytes, and microseconds a message at either end."""
        total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for life, counters in self.after.items():
            for name, value in counters.items():
                link, _, what = name.partition("/")
                what = what.rpartition("/")[2] if ">" in what else what
                total[link][what] += value - self.before.get(life, {}).get(name, 0)
        for link, counts in sorted(total.items()):
            out = counts["bytes_out"] or counts["bytes_in"]
            sent = counts["produced"] or counts["messages_out"] or counts["messages_in"]
            if out and sent:
                yield link, _link(counts, out, sent, self.seconds)


def _link(counts: Mapping[str, int], out: int, sent: int, seconds: float) -> Repeat:
    taken = counts["taken"] or counts["messages_in"] or sent
    return {
        "messages": sent / seconds,
        "on the wire": out / seconds / 1e3,
        "before codec": (counts["bytes_raw_out"] or out) / seconds / 1e3,
        "a message": out / sent,
        "encode": counts["encode_ns"] / sent / 1e3,
        "send-wait": counts["send_wait_ns"] / sent / 1e3,
        "wire": counts["wire_ns"] / taken / 1e3,
        "queue-wait": counts["queue_wait_ns"] / taken / 1e3,
        "decode": counts["decode_ns"] / taken / 1e3,
    }


def largest(time: Repeat) -> str:
    """The part of a node's own time that takes most of it."""
    return max((*WORK, *COMMUNICATION), key=lambda part: time.get(part, 0.0))


def _group(life: str) -> str:
    """`actor-0@…` is of group `actor`."""
    return group_of(life.partition("@")[0])
