"""A short real run of a topology: what its processes cost by the kernel's count, and how fast they get on.

What parts cost when they are called in a loop, with warm caches and nothing beside them, is too little: in a run
processes take turns on cores and caches, sleep and wake, and have the kernel move their bytes.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
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
from ddrl_bus.topology.plan import NodePlan, Plan
from ddrl_bus.topology.schema import ActorOptions, StopSettings
from ddrl_bus.transport import ledger

SECONDS: Final = 4.0
WARM_S: Final = 1.0
"""From the first update on, which are left out."""
PATIENCE_S: Final = 120.0
END_S: Final = 3.0
MOST: Final = 4
"""Nodes of a group without actors, at most."""


@dataclass(frozen=True)
class Trial:
    """What a run came to."""

    env_steps_per_s: float
    cpu: Mapping[str, float]
    """Kind of process → processor seconds an env step, of all of them; a learner's compute threads are `trainer`."""
    besides: float
    """Processor seconds a second of all that no topology names: controller, supervisor, other programs."""
    idle: float
    """Share of the time in which a learner's thread had nothing to do, the mean of all."""

    def at_pace(self, times: float) -> Trial:
        """As it would have been on cores that do so many times as much."""
        cpu = {kind: seconds / times for kind, seconds in self.cpu.items()}
        return replace(self, env_steps_per_s=self.env_steps_per_s * times, cpu=cpu)


@dataclass(frozen=True)
class Reading:
    at: float
    env_steps: int
    cpu: Mapping[str, float]
    all: float
    """Processor seconds of everybody, whatever the program."""
    idle: float
    """Seconds, of all learners."""


def run(plan: Plan, folder: Path, seconds: float = SECONDS) -> Trial:
    """Run a plan of `alone` for so long.

    Args:
        folder: for what a run leaves; must not exist yet.
    Raises:
        UsageError: it does not train.
    """
    run_dir.create(plan, path=folder, command=sys.argv, started=time.time())
    command = [sys.executable, "-m", "ddrl_bus.cli", "run", "--resume", str(folder), "--json"]
    silent, said = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=said, text=True) as running:
        try:
            _wait_for_training(running, folder)
            first = _read(plan, folder, running.pid)
            time.sleep(seconds)
            last = _read(plan, folder, running.pid)
            if running.poll() is not None:
                raise UsageError(f"a trial run of {plan.name} ended by itself: {_said(running)}")
        finally:
            end(running)
    return _between(plan, first, last)


def alone(plan: Plan, actors: int) -> Plan:
    """With so many actors, and whoever is in a bundle with them: all on one host, without an end, and of others no more
    than a machine may be asked to hold; evaluators only where nobody else listens."""
    host, groups = next(iter(plan.hosts)), {}
    evaluators = {name for name, options in plan.groups.items() if options.kind == "evaluator"}
    needed = {name for link in plan.links.values() if evaluators.issuperset(link.targets) for name in link.targets}
    playing = {options.bundle or name for name, options in plan.groups.items() if options.kind == "actor"}
    for name, options in plan.groups.items():
        count = actors if (options.bundle or name) in playing else min(MOST, options.count)
        count = 0 if name in evaluators - needed else count
        groups[name] = options.model_copy(update={"count": count, "host": (host,)})
    smaller = replace(plan, groups=groups, hosts={host: plan.hosts[host]}, stop=StopSettings())
    if plan.links["trajectories"].max_lag != 0:
        return smaller
    batch = plan.algo.batch * _round(smaller) // _round(plan)  # a round of all is a batch
    return replace(smaller, algo=replace(plan.algo, batch=batch))


def _round(plan: Plan) -> int:
    """Environments of a learner."""
    envs = sum(node.options.envs for node in plan.nodes.values() if isinstance(node.options, ActorOptions))
    return int(envs / len(_learners(plan)))


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
    now, busy = time.perf_counter(), _busy()
    steps = sum(counters.get("env_steps", 0) for counters in lives(folder))
    cpu: dict[str, float] = defaultdict(float)
    process = psutil.Process(supervisor)
    for each in (process, *process.children(recursive=True)):
        for kind, seconds in _spent(plan, each):
            cpu[kind] += seconds
    pages = (page for node in _learners(plan) for page in (folder / "ledger").glob(f"{node.name}@*.page"))
    return Reading(now, steps, cpu, busy, sum(ledger.read(page).get("time/idle", 0) for page in pages) / 1e9)


def _learners(plan: Plan) -> list[NodePlan]:
    return [node for node in plan.nodes.values() if node.kind == "learner"]


def _busy() -> float:
    """Seconds for which our cores were not idle, what the host took of them included."""
    cores = psutil.cpu_times(percpu=True)
    return float(sum(sum(cores[n][:8]) - cores[n].idle - cores[n].iowait for n in os.sched_getaffinity(0)))


def _spent(plan: Plan, process: psutil.Process) -> Iterator[tuple[str, float]]:
    """Kind → processor seconds, of each of its threads."""
    with contextlib.suppress(psutil.Error, OSError):
        words = process.cmdline()
        name = words[words.index("--name") + 1] if "--name" in words else ""
        node = plan.process(name)[0] if name else None
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
            if node is not None and node.kind != "controller":
                trains = node.kind == "learner" and node.bundle is None and not _moves(task, process.pid)
                yield "trainer" if trains else node.bundle or node.kind, seconds


def _moves(task: Path, pid: int) -> bool:
    """Whether it is a thread of event loop or ZeroMQ."""
    return task.name == str(pid) or (task / "comm").read_text().startswith("ZMQ")


def _between(plan: Plan, first: Reading, last: Reading) -> Trial:
    seconds, steps = last.at - first.at, last.env_steps - first.env_steps
    if steps <= 0:
        raise UsageError(f"a trial run of {plan.name} took no env steps within {seconds:.0f} s")
    cpu = {kind: max(0.0, total - first.cpu.get(kind, 0.0)) for kind, total in last.cpu.items()}
    besides = max(0.0, last.all - first.all - sum(cpu.values())) / seconds
    idle = (last.idle - first.idle) / seconds / len(_learners(plan))
    return Trial(steps / seconds, {kind: total / steps for kind, total in cpu.items()}, besides, min(1.0, idle))
