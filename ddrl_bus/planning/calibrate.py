"""Costs of a topology on this machine: its parts measured, trial runs made, and both brought together; kept.

Where they are kept: `ddrl/costs` in the user's cache folder, a file for each environment, algorithm and sizes, with the
machine and the versions that it holds for.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.planning import fit, measure, measure_links, pace, trial
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.pace import Pace
from ddrl_bus.topology.plan import Plan
from ddrl_bus.versions import versions

BUDGET_S: Final = 0.1
"""Processor time for each part."""
WORLDS: Final = (2, 4)
"""Replicas between which a sum is measured."""
MANY, MOST = 4, 16
"""Actors of the larger trial: as many as there are cores, but not fewer or more than this."""


def of(plan: Plan, *, calibrate: bool = False, budget: float = BUDGET_S, seconds: float = trial.SECONDS) -> Costs:
    """The costs of a topology's parts, measured now unless they are known for this machine.

    Args:
        calibrate: measure them in any case.
        budget: processor time for each part, in seconds.
        seconds: of a trial run.
    Raises:
        UsageError: the topology does not train here.
    """
    path = folder() / f"{_key(plan)}.json"
    known = None if calibrate else read_json(path)
    if known is not None:
        return Costs.of_json(known)
    began = time.perf_counter()
    with pace.of_cores() as now:
        costs = strained(plan, parts(plan, budget), now, seconds)
    costs = replace(costs, took=time.perf_counter() - began)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(asdict(costs), indent=1) + "\n")
    return costs


def strained(plan: Plan, costs: Costs, now: Pace, seconds: float = trial.SECONDS) -> Costs:
    """The costs of the parts with what trials add to them, brought to the pace that the machine had in between.

    Raises:
        UsageError: the topology does not train here.
    """
    plans = [trial.alone(plan, actors) for actors in (1, max(MANY, min(MOST, costs.cores)))]
    paces, ran = [now()], []
    with tempfile.TemporaryDirectory(prefix="ddrl-trial-") as name:
        for number, tried in enumerate(plans):
            ran.append(trial.run(tried, Path(name) / str(number), seconds))
            paces.append(now())
    mean = statistics.fmean(paces)
    during = [(before + after) / 2 for before, after in itertools.pairwise(paces)]
    steady = [each.at_pace(mean / then) for each, then in zip(ran, during, strict=True)]
    strains = [fit.fitted(tried, costs, each) for tried, each in zip(plans, steady, strict=True)]
    return replace(costs, strains=strains, pace=mean)


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


def parts(plan: Plan, budget: float) -> Costs:
    """What each costs by itself."""
    plan, replicas = _small(plan), WORLDS if "sync" in plan.links else ()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as nodes are started
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ddrl-costs-") as name:
        path = Path(name)
        with ProcessPoolExecutor(1, spawn) as alone:
            points, sizes, payloads = alone.submit(measure.of_nodes, plan, path, budget).result()
        with ProcessPoolExecutor(2, spawn) as several:
            ends = list(several.map(partial(measure_links.of_links, folder=path, payloads=payloads), range(2)))
        size = sum(array.nbytes for array in payloads["weights"][2].values())
        worlds = {str(world): _sums(world, size, path, spawn) for world in replicas}
    sizes["node"] = ends[1].pop("resident")
    links = {link: (sends, ends[1][link]) for link, sends in ends[0].items()}
    more, one = links.pop("weights, many")[0], links["weights"][0]
    points["subscriber"] = [(1, max(0.0, more - one) / (measure_links.SUBSCRIBERS["weights, many"] - 1))]
    measured = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Costs(points, links, sizes, len(os.sched_getaffinity(0)), worlds, (), 0.0, machine(), measured, 0.0)


def _sums(world: int, size: int, path: Path, spawn: Any) -> tuple[float, float]:
    with ProcessPoolExecutor(world, spawn) as pool:
        taken = list(pool.map(partial(measure_links.sums, ranks=world, size=size, folder=path), range(world)))
    cpu, wall = np.mean(taken, axis=0).tolist()
    return cpu, wall
