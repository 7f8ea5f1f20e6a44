"""Costs of a topology on this machine: its parts measured, a trial run made, and the two brought together; kept.

Where they are kept: `ddrl/costs` in the user's cache folder, a file for each environment, algorithm and sizes, with the
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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.planning import fit, measure, measure_links, trial
from ddrl_bus.planning.costs import Costs
from ddrl_bus.topology.plan import Plan
from ddrl_bus.versions import versions

BUDGET_S: Final = 0.1
"""Processor time for each part."""
WORLDS: Final = (2, 4)
"""Replicas between which a sum is measured."""


def of(
    plan: Plan, *, calibrate: bool = False, budget: float = BUDGET_S, seconds: float = trial.SECONDS, trials: int = 1
) -> Costs:
    """The costs of a topology's parts, measured now unless they are known for this machine.

    Args:
        calibrate: measure them in any case.
        budget: processor time for each part, in seconds.
        seconds: of a trial run.
        trials: of which the one is taken that was neither the slowest nor the fastest.
    Raises:
        UsageError: the topology does not train here.
    """
    path = folder() / f"{_key(plan)}.json"
    known = None if calibrate else read_json(path)
    if known is not None:
        return Costs(**known)
    began = time.perf_counter()
    parts = _parts(_small(plan), budget, WORLDS if "sync" in plan.links else ())
    with tempfile.TemporaryDirectory(prefix="ddrl-trial-") as name:
        ran = [trial.run(plan, Path(name) / str(number), seconds) for number in range(trials)]
    typical = sorted(ran, key=lambda each: each.env_steps_per_s)[trials // 2]
    costs = replace(fit.fitted(plan, parts, typical), took=time.perf_counter() - began)
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
    kept = [field.name for field in fields(Costs)]
    about = [machine(), versions(), plan.env.model_dump(), algo, groups, links, kept]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _small(plan: Plan) -> Plan:
    """The same with a node of each group, all on one host."""
    host = next(iter(plan.hosts))
    groups = {
        name: options.model_copy(update={"count": min(1, options.count), "host": (host,)})
        for name, options in plan.groups.items()
    }
    return replace(plan, groups=groups)


def _parts(plan: Plan, budget: float, replicas: Sequence[int]) -> Costs:
    """What each costs by itself."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as nodes are started
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ddrl-costs-") as name:
        path = Path(name)
        with ProcessPoolExecutor(1, spawn) as alone:
            points, sizes, payloads = alone.submit(measure.of_nodes, plan, path, budget).result()
        cores = len(os.sched_getaffinity(0))
        with ProcessPoolExecutor(max(2, cores), spawn) as several:
            ends = list(several.map(partial(measure_links.of_links, folder=path, payloads=payloads), range(2)))
            speeds = _speeds(several, cores)
        size = sum(array.nbytes for array in payloads["weights"][2].values())
        worlds = {str(world): _sums(world, size, path, spawn) for world in replicas}
    sizes["node"] = ends[1].pop("resident")
    links = {link: (sends, ends[1][link]) for link, sends in ends[0].items()}
    more, one = links.pop("weights, many")[0], links["weights"][0]
    points["subscriber"] = [(1, max(0.0, more - one) / (measure_links.SUBSCRIBERS["weights, many"] - 1))]
    measured = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Costs(points, links, sizes, speeds, worlds, {}, 0.0, 0.0, 0.0, machine(), measured, 0.0)


def _speeds(pool: ProcessPoolExecutor, cores: int) -> list[float]:
    """What 1, 2, … of the cores do when that many work, from one alone and from all at once."""
    list(pool.map(measure.kernel, [0.02] * cores))
    alone = pool.submit(measure.kernel).result()
    together = float(np.mean(list(pool.map(measure.kernel, [0.4] * cores))))
    slower = max(1.0, together / alone)
    return [k / (1 + (slower - 1) * (k - 1) / max(1, cores - 1)) for k in range(1, cores + 1)]


def _sums(world: int, size: int, path: Path, spawn: Any) -> tuple[float, float]:
    with ProcessPoolExecutor(world, spawn) as pool:
        taken = list(pool.map(partial(measure_links.sums, ranks=world, size=size, folder=path), range(world)))
    cpu, wall = np.mean(taken, axis=0).tolist()
    return cpu, wall
