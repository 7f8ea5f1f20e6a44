"""Which learners train as one: the controller decides, for all of them, from what their heartbeats say.

    everybody is here, or MEET_S is over  ─→  the first group
    a member is gone, silent or lives anew, a learner came, or the group failed a member  ─→  the next one

A group in order needs no controller. A new controller takes the newest group that a heartbeat names for its own, and
hears of a newer one, which nobody came into, as of one that failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ddrl_bus.messages import Group, Replica

MEET_S: Final = 30.0
"""How long those who are there wait for the others before the first group."""
SILENT_S: Final = 5.0
"""A member silent for this long is left out."""
SUSPECT_S: Final = 2.0
"""The same once the group failed somebody: whoever has not been heard since then."""


@dataclass(slots=True)
class Heard:
    """A learner as last heard."""

    epoch: int
    replica: Replica
    at: float


class Membership:
    """Times are in seconds, of any clock.

    Args:
        planned: the learners of the topology.
        now: when the controller began to listen.
    """

    def __init__(self, planned: Sequence[str], now: float) -> None:
        self.group: Group | None = None
        self._planned, self._began = planned, now
        self._heard: dict[str, Heard] = {}
        self._broken_at: float | None = None  # when the first member said that the group had failed it
        self._taken_over_at: float | None = None  # when we heard of a group that another controller formed

    def heard(self, name: str, epoch: int, replica: Replica | None, now: float, *, gone: bool = False) -> None:
        """A heartbeat; `gone` if it is its last."""
        if name in self._heard and epoch < self._heard[name].epoch:
            return
        if gone or replica is None:
            self._heard.pop(name, None)
            return
        self._heard[name] = Heard(epoch, replica, now)
        if replica.group is not None and replica.group.generation > self._generation:
            self.group, self._broken_at, self._taken_over_at = replica.group, None, now
        if self._broken_at is None and self.group is not None and replica.broken >= self._generation:
            self._broken_at = now

    def decide(self, now: float) -> bool:
        """Whether `group` is another one now."""
        members = self.group.members if self.group is not None else {}
        if self._waits(members, now):
            return False
        here = {name: heard for name, heard in self._heard.items() if self._is_here(heard, now)}
        ranks = [*members, *(name for name in self._planned if name not in members)]
        wanted = {name: here[name].epoch for name in ranks if name in here}
        if not wanted or (wanted == members and self._broken_at is None):
            return False
        first = next(iter(wanted))
        newest = max(self._generation, *(heard.replica.broken for heard in self._heard.values()))
        self.group = Group(newest + 1, wanted, here[first].replica.store)
        self._heard = here  # whoever is left out is to be heard anew first
        self._broken_at = self._taken_over_at = None
        return True

    @property
    def _generation(self) -> int:
        return self.group.generation if self.group is not None else 0

    def _waits(self, members: dict[str, int], now: float) -> bool:
        """Whether somebody may yet be heard without whom nothing is to be decided."""
        if self.group is None:
            return len(self._heard) < len(self._planned) and now - self._began < MEET_S
        taken_over = self._taken_over_at is not None and now - self._taken_over_at < SILENT_S
        if taken_over and any(name not in self._heard for name in members):
            return True
        if self._broken_at is None or now - self._broken_at >= SUSPECT_S:
            return False
        return any(name in self._heard and self._heard[name].at < self._broken_at for name in members)

    def _is_here(self, heard: Heard, now: float) -> bool:
        fresh = now - heard.at < SILENT_S
        return fresh and (self._broken_at is None or heard.at >= self._broken_at)

    @property
    def missing(self) -> list[str]:
        """Learners of the topology that are not in the group."""
        members = self.group.members if self.group is not None else {}
        return [name for name in self._planned if name not in members]
