"""What a topology's parts cost on a machine, at any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Strain:
    """What a run has its processes spend and wait beyond what their parts cost alone, as it was found in a trial."""

    crowd: float = 0.0
    """Processes of the run on a machine for each of its cores."""
    levels: Mapping[str, float] = field(default_factory=dict)
    """Kind of process, as of a trial → how many times as much all its work takes in a run."""
    locked: float = 0.0
    """Share of an event loop's work for which the learner beside it waits: for Python's lock."""
    hop: float = 0.0
    """Seconds by the clock until whoever sleeps has woken up for a message."""
    besides: float = 0.0
    """Cores that are busy with what no topology names."""


@dataclass(frozen=True)
class Costs:
    """Seconds are of one core, unless they are said to be of the clock."""

    points: Mapping[str, Sequence[tuple[float, float]]]
    """What a node does → (size, seconds), by size: linear in between and beyond."""
    links: Mapping[str, tuple[float, float]]
    """Link → seconds of a message at its sender and at its receiver; of a request, of both its ways."""
    sizes: Mapping[str, float]
    """Bytes of messages and processes; `sums`, of an update; `items`, of an unroll."""
    cores: int
    """Of the machine."""
    worlds: Mapping[str, tuple[float, float]]
    """Replicas → seconds of a sum at each, and what it takes by the clock."""
    strains: Sequence[Strain]
    """By crowd."""
    pace: float
    """Pieces of a fixed load that a core did a second, all cores at once, while these were measured."""
    machine: str
    measured: str
    """When, in UTC."""
    took: float
    """Seconds."""

    @classmethod
    def of_json(cls, known: Mapping[str, Any]) -> Costs:
        return cls(**{**known, "strains": [Strain(**strain) for strain in known["strains"]]})

    def strain(self, crowd: float) -> Strain:
        """Linear between those of two trials; what is less or more crowded than any is taken to be as the nearest."""
        if not self.strains:
            return Strain(crowd)
        at = [strain.crowd for strain in self.strains]

        def between(values: Sequence[float]) -> float:
            return float(np.interp(crowd, at, values))

        levels = {kind: between([strain.levels[kind] for strain in self.strains]) for kind in self.strains[0].levels}
        waits = (between([getattr(strain, name) for strain in self.strains]) for name in ("locked", "hop", "besides"))
        return Strain(crowd, levels, *waits)

    def at(self, what: str, size: float = 1.0) -> float:
        """Seconds that it takes at this size; 0 where nothing of the kind was measured."""
        points = self.points.get(what, ())
        if not points:
            return 0.0
        (x0, y0), (x1, y1) = points[0], points[-1]
        if len(points) == 1 or x0 == x1:
            return y0
        inside = [point for point in points if point[0] <= size]
        (x0, y0), (x1, y1) = points[-2:] if len(inside) == len(points) else points[max(0, len(inside) - 1) :][:2]
        return max(y0 + (y1 - y0) * (size - x0) / (x1 - x0), 0.1 * y0)

    def sum_of(self, world: int) -> tuple[float, float]:
        """Seconds of a sum at each of so many replicas, and by the clock: more of them take in proportion."""
        if world < 2 or not self.worlds:
            return 0.0, 0.0
        known = sorted((int(name), times) for name, times in self.worlds.items())
        at = [size for size, _ in known]
        cpu, wall = (float(np.interp(world, at, [times[n] for _, times in known])) for n in (0, 1))
        more = max(1.0, world / at[-1])
        return cpu * more, wall * more
