"""A short real run of a topology: what its processes cost by the kernel's count, and how fast they get on.

What parts cost when they are called in a loop, with warm caches and nothing beside them, is too little: in a run
processes take turns on cores and caches, sleep and wake, and have the kernel move their bytes.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psutil

from ddrl_bus.errors import UsageError
from ddrl_bus.launch import run_dir
from ddrl_bus.launch.closing import lives
from ddrl_bus.topology.plan import Plan
from ddrl_bus.topology.schema import ActorOptions, StopSettings

SECONDS: Final = 6.0
WARM_S: Final = 1.0
"""From the first update on, which are left out."""
PATIENCE_S: Final = 120.0
END_S: Final = 3.0
MOST: Final = 4
"""Nodes of a group, at most."""


@dataclass(frozen=True)
class Trial:
    """What a run came to."""

    counts: Mapping[str, int]
    """Group → nodes."""
    env_steps_per_s: float
    cpu: Mapping[str, float]
    """Kind of process → processor seconds an env step, of all of them; a learner's compute threads are `trainer`."""
    besides: float
    """Processor seconds a second of all that no topology names: controller, supervisor."""
    others: float
    """Threads of other programs that ran or waited for a core, on average."""


@dataclass(frozen=True)
class Reading:
    at: float
    env_steps: int
    cpu: Mapping[str, float]


def run(plan: Plan, folder: Path, seconds: float = SECONDS) -> Trial:
    """Run it for so long, on this host, without evaluators and without an end.

    Args:
        folder: for what a run leaves; must not exist yet.
    Raises:
        UsageError: it does not train.
    """
    plan = alone(plan)
    run_dir.create(plan, path=folder, command=sys.argv, started=time.time())
    command = [sys.executable, "-m", "ddrl_bus.cli", "run", "--resume", str(folder), "--json"]
    silent, said = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=said, text=True) as running:
        company = Company(running.pid)
        try:
            _wait_for_training(running, folder)
            company.start()
            first = _read(plan, folder, running.pid)
            time.sleep(seconds)
            last = _read(plan, folder, running.pid)
            if running.poll() is not None:
                raise UsageError(f"a trial run of {plan.name} ended by itself: {_said(running)}")
        finally:
            company.over.set()
            end(running)
    return _between(plan, first, last, company.mean())


def alone(plan: Plan) -> Plan:
    """All on one host, without an end, and not more of it than a machine may be asked to hold; evaluators only where
    nobody else listens."""
    host, groups = next(iter(plan.hosts)), {}
    evaluators = {name for name, options in plan.groups.items() if options.kind == "evaluator"}
    needed = {name for link in plan.links.values() if evaluators.issuperset(link.targets) for name in link.targets}
    for name, options in plan.groups.items():
        count = 0 if name in evaluators - needed else min(MOST, options.count)
        groups[name] = options.model_copy(update={"count": count, "host": (host,)})
    smaller = replace(plan, groups=groups, hosts={host: plan.hosts[host]}, stop=StopSettings())
    if plan.links["trajectories"].max_lag != 0:
        return smaller
    batch = plan.algo.batch * _round(smaller) // _round(plan)  # a round of all is a batch
    return replace(smaller, algo=replace(plan.algo, batch=batch))


def _round(plan: Plan) -> int:
    """Environments of a learner."""
    nodes = plan.nodes.values()
    envs = sum(node.options.envs for node in nodes if isinstance(node.options, ActorOptions))
    return int(envs / sum(node.kind == "learner" for node in nodes))


def _wait_for_training(running: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
        if running.poll() is not None or time.monotonic() > deadline:
            raise UsageError(f"a trial run did not train within {PATIENCE_S:.0f} s: {_said(running)}")
        time.sleep(0.05)
    time.sleep(WARM_S)


def _said(running: subprocess.Popen[str]) -> str:
    """Its last line."""
    end(running)
    assert running.stderr is not None
    lines = running.stderr.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def end(running: subprocess.Popen[str]) -> None:
    """End a run, if it is not over: nobody needs what its nodes would do yet, and a second signal is final."""
    for _ in range(2):
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(END_S)
            return
    running.kill()


def _read(plan: Plan, folder: Path, supervisor: int) -> Reading:
    now = time.perf_counter()
    steps = sum(counters.get("env_steps", 0) for counters in lives(folder))
    cpu: dict[str, float] = defaultdict(float)
    for process in _tree(supervisor):
        for kind, seconds in _spent(plan, process):
            cpu[kind] += seconds
    return Reading(now, steps, cpu)


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _spent(plan: Plan, process: psutil.Process) -> Iterator[tuple[str, float]]:
    """Kind → processor seconds, of each of its threads."""
    with contextlib.suppress(psutil.Error, OSError):
        words = process.cmdline()
        name = words[words.index("--name") + 1] if "--name" in words else ""
        node = plan.process(name)[0] if name else None
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            if node is None or node.kind == "controller":
                yield "besides", seconds
            else:
                trains = node.kind == "learner" and node.bundle is None and not _moves(task, process.pid)
                yield "trainer" if trains else node.bundle or node.kind, seconds


def _moves(task: Path, pid: int) -> bool:
    """Whether it is a thread of event loop or ZeroMQ."""
    return task.name == str(pid) or (task / "comm").read_text().startswith("ZMQ")


def _between(plan: Plan, first: Reading, last: Reading, others: float) -> Trial:
    seconds, steps = last.at - first.at, last.env_steps - first.env_steps
    if steps <= 0:
        raise UsageError(f"a trial run of {plan.name} took no env steps within {seconds:.0f} s")
    cpu = {kind: max(0.0, total - first.cpu.get(kind, 0.0)) for kind, total in last.cpu.items()}
    besides = cpu.pop("besides", 0.0) / seconds
    counts = {name: options.count for name, options in plan.groups.items()}
    return Trial(counts, steps / seconds, {kind: total / steps for kind, total in cpu.items()}, besides, others)


class Company(threading.Thread):
    """Counts the threads of other programs that run or wait for a core, now and then, while a process lives."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self._counts: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            with contextlib.suppress(psutil.Error, OSError):
                mine = sum(_runs(task) for pid in _tree(self._pid) for task in Path(f"/proc/{pid.pid}/task").iterdir())
                (line,) = (line for line in Path("/proc/stat").read_text().splitlines() if "procs_running" in line)
                self._counts.append(int(line.split()[1]) - mine - 1)  # but for this one

    def mean(self) -> float:
        """Of counts that are not quite of one moment, so that single ones may be below 0."""
        return max(0.0, round(sum(self._counts) / max(1, len(self._counts)), 1))


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False
