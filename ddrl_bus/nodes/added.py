"""Nodes that are added to a run while it goes on: what they are called. The controller alone says so, once for each.

A name holds the group, a number that none of the run ever had, and the host: `actor-2.cpu1`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ddrl_bus.errors import UsageError
from ddrl_bus.messages import Join
from ddrl_bus.topology.exposure import unlisted
from ddrl_bus.topology.plan import MAX_NAME, Plan
from ddrl_bus.topology.schema import MAX_NODES

FILE: Final = "added"


class Added:
    """The names that were given, which `path` keeps for the next life of the controller."""

    def __init__(self, plan: Plan, run_dir: Path) -> None:
        self._plan = plan
        self._path = run_dir / FILE
        self._given = self._path.read_text().split() if self._path.exists() else []

    def first(self, join: Join) -> str:
        """What the first node would be called that is added to that group on that host.

        Raises:
            UsageError: the run takes none into it.
        """
        if reason := self._plan.why_fixed(join.group):
            raise UsageError(f"{self._plan.name}: {reason}")
        return self._plan.name_added(join.group, 0, join.host)

    def grant(self, join: Join, heard: Iterable[str]) -> list[str]:
        """Names for the nodes that somebody adds to a group that takes some.

        Args:
            heard: names of nodes; some may be of an earlier controller's giving, in another run directory.
        Raises:
            UsageError: the run takes none there, or not so many.
        """
        plan = self._plan
        nodes = (plan.added(name) for name in {*self._given, *heard})
        first = max((node.index - plan.groups[node.group].count + 1 for node in nodes if node), default=0)
        count = min(join.count, MAX_NODES)
        names = [plan.name_added(join.group, first + number, join.host) for number in range(count)]
        if not names or not all(map(plan.added, names)):
            raise UsageError(
                f"{plan.name}: got {join.count} on host {join.host!r}, expected letters, digits, '.', '_' and '-' that "
                f"make at most {MAX_NAME} characters with the node's name, and {MAX_NODES:,} actors in all at most"
            )
        if links := unlisted(plan, names[0]):
            raise UsageError(
                f"{plan.name}: {', '.join(links)}: encrypted, and {join.host} has no rights there; list it under "
                f"`hosts` and allow its key; there are {', '.join(plan.hosts)}"
            )
        with self._path.open("a") as given:
            given.writelines(f"{name}\n" for name in names)
        self._given += names
        return names
