"""What a topology is bound by, what would bind it next, and with how many actors.

While one thing is full others wait for it. What each is used now grows with the env steps a second, and an actor that
waits for nobody would play its present share of them over its busy share: so with A actors that are busy for b of their
time, something that is used for u of its time is full with A·b/u actors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import psutil

from ddrl_bus.bench.books import Books, largest
from ddrl_bus.bench.machine import cores
from ddrl_bus.bench.report import SHARE, Kind, Repeat, Row, row
from ddrl_bus.topology.plan import Plan

SECTION: Final = "what binds"
ACTORS: Final = Kind("", "more", 1)
ASSUMED_MBIT: Final = 1000
"""Of a network whose speed nobody tells."""
_OFF_THE_PATH: Final = frozenset({"actor", "evaluator", "controller", "relay"})


@dataclass(frozen=True)
class Used:
    """Percent of their capacity that a run used, by name; nothing that it did not use."""

    actors: int
    actor_busy: float
    of: Repeat

    def full_at(self, name: str) -> float:
        """How many actors would fill it."""
        return self.actors * self.actor_busy / self.of[name]


def used(plan: Plan, books: Books, cpu_s: float) -> Used:
    """Args: `cpu_s` is the processor time that all processes of the run took."""
    playing = [group for group in books.groups if plan.groups[group].kind == "actor"]
    busy = sum(books.time(group)["busy"] * books.members(group) for group in playing)
    actors = sum(books.members(group) for group in playing)
    found = {f"cores ({cores()})": 100 * cpu_s / books.seconds / cores()}
    for group in books.groups:
        if plan.groups[group].kind not in _OFF_THE_PATH:
            found[group] = books.time(group)["busy"]
    found["codec"] = max(books.codec(group) for group in books.groups)
    mbit = _network_mbit()
    sent = sum(figures["on the wire"] for _, figures in books.links())
    network = f"network of {mbit} Mb/s" if mbit else f"network of {ASSUMED_MBIT} Mb/s, assumed"
    found[network] = 100 * sent * 8e3 / (mbit or ASSUMED_MBIT) / 1e6
    return Used(actors, busy / actors, {name: percent for name, percent in found.items() if percent})


def rows(plan: Plan, runs: Sequence[tuple[Books, float]]) -> Iterator[Row]:
    """What binds now, next, and then; of several runs the figures of each."""
    of = [used(plan, *run) for run in runs]
    names = sorted(set(of[0].of).intersection(*(each.of for each in of)), key=lambda name: -of[0].of[name])
    playing = next(group for group in runs[0][0].groups if plan.groups[group].kind == "actor")
    actors = f"actors ({largest(runs[0][0].time(playing))})"
    yield row(SECTION, actors, [{"used": each.actor_busy} for each in of], {"used": SHARE})
    for name in names:
        repeats = [{"used": each.of[name], "full with actors": each.full_at(name)} for each in of]
        yield row(SECTION, name, repeats, {"used": SHARE, "full with actors": ACTORS}, main="used")


def _network_mbit() -> int:
    """Of the fastest network that this machine is on and that tells; 0 where none does."""
    return max((stats.speed for name, stats in psutil.net_if_stats().items() if stats.isup and name != "lo"), default=0)
