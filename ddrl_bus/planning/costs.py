"""What a topology's nodes and links cost on this machine: measured in seconds, and kept for the next time.

Where it is kept: `ddrl/costs` in the user's cache folder, a file for each environment, algorithm and sizes, with the
machine and the versions that it holds for.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.planning import measure
from ddrl_bus.topology.plan import Plan
from ddrl_bus.versions import versions

BUDGET_S: Final = 0.25
"""Processor time for each part."""
WORLDS: Final = (2, 4)
"""Replicas between which a sum is measured."""


@dataclass(frozen=True)
class Costs:
    """Seconds are of one core, unless they are said to be of the clock."""

    points: Mapping[str, Sequence[tuple[float, float]]]
    """What a node does → (size, seconds), by size: linear in between and beyond."""
    links: Mapping[str, tuple[float, float, float]]
    """Link → seconds of a message at its sender, at its receiver, and what a round trip takes besides, by the clock."""
    sizes: Mapping[str, float]
    """Bytes of messages and processes; `sums`, of an update; `items`, of an unroll."""
    speeds: Sequence[float]
    """Seconds of work a second that 1, 2, … busy cores do."""
    worlds: Mapping[str, tuple[float, float]]
    """Replicas → seconds of a sum at each, and what it takes by the clock."""
    machine: str
    measured: str
    """When, in UTC."""
    took: float
    """Seconds."""

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


def of(plan: Plan, *, calibrate: bool = False, budget: float = BUDGET_S) -> Costs:
    """The costs of a topology's parts, measured now unless they are known for this machine.

    Args:
        calibrate: measure them in any case.
        budget: processor time for each part, in seconds.
    """
    path = folder() / f"{_key(plan)}.json"
    known = None if calibrate else read_json(path)
    if known is not None:
        return Costs(**known)
    costs = _measured(_small(plan), budget, WORLDS if "sync" in plan.links else ())
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(asdict(costs), indent=1) + "\n")
    return costs


def folder() -> Path:
    """Where costs are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddrl" / "costs"


def machine() -> str:
    """What the figures hold for: processor, cores, memory."""
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().total / 2**30
    return f"{platform.node()}: {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def _key(plan: Plan) -> str:
    """Of all that costs depend on; how many nodes there are is not part of it."""
    groups = {
        name: {k: v for k, v in options.model_dump().items() if k not in ("count", "host")}
        for name, options in plan.groups.items()
    }
    links = {name: link.codec for name, link in plan.links.items()}
    algo = {"name": plan.algo_name, **asdict(plan.algo)}
    about = [machine(), versions(), plan.env.model_dump(), algo, groups, links]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _small(plan: Plan) -> Plan:
    """The same with a node of each group, all on one host."""
    host = next(iter(plan.hosts))
    groups = {
        name: options.model_copy(update={"count": min(1, options.count), "host": (host,)})
        for name, options in plan.groups.items()
    }
    return replace(plan, groups=groups)


def _measured(plan: Plan, budget: float, replicas: Sequence[int]) -> Costs:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as nodes are started
    began, spawn = time.perf_counter(), multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ddrl-costs-") as name:
        path = Path(name)
        with ProcessPoolExecutor(1, spawn) as alone:
            points, sizes, payloads = alone.submit(measure.of_nodes, plan, path, budget).result()
        cores = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(max(2, cores), spawn) as several:
            ends = list(several.map(partial(measure.of_links, folder=path, payloads=payloads), range(2)))
            speeds = _speeds(several, cores)
        size = sum(array.nbytes for array in payloads["weights"][2].values())
        worlds = {str(world): _sums(world, size, path, spawn) for world in replicas}
    sizes["node"] = ends[1].pop("resident")[0]
    links = {}
    for link, (cpu, wall) in ends[0].items():
        other = ends[1][link][0]
        links[link] = cpu, other, max(0.0, wall - cpu - other)
    more, one = links.pop("weights, many")[0], links["weights"][0]
    points["subscriber"] = [(1, max(0.0, more - one) / (measure.SUBSCRIBERS["weights, many"] - 1))]
    measured = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Costs(points, links, sizes, speeds, worlds, machine(), measured, time.perf_counter() - began)


def _speeds(pool: ProcessPoolExecutor, cores: int) -> list[float]:
    """What 1, 2, … of the cores do when that many work, from one alone and from all at once."""
    list(pool.map(measure.kernel, [0.02] * cores))
    alone = pool.submit(measure.kernel).result()
    together = float(np.mean(list(pool.map(measure.kernel, [0.4] * cores))))
    slower = max(1.0, together / alone)
    return [k / (1 + (slower - 1) * (k - 1) / max(1, cores - 1)) for k in range(1, cores + 1)]


def _sums(world: int, size: int, path: Path, spawn: Any) -> tuple[float, float]:
    with ProcessPoolExecutor(world, spawn) as pool:
        taken = list(pool.map(partial(measure.sums, ranks=world, size=size, folder=path), range(world)))
    cpu, wall = np.mean(taken, axis=0).tolist()
    return cpu, wall
