"""What one more actor costs the controller and the learner, and how hundreds come and go: `ddrl bench actors`.

A real controller and a real learner, and actors that are real in all but their environments: each is a process with a
bus, sockets, a ledger and heartbeats of its own, and sends one recorded unroll again and again, every PERIOD_S. They
are forked from one process that has imported everything, so that hundreds fit into memory. The batch of the learner is
a round of all actors, so that it publishes weights to each of them once every PERIOD_S, however many they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

import numpy as np

from ddrl_bus.bench.report import COUNT, PER_S, SHARE, About, Kind, Row, S, row
from ddrl_bus.envs import EnvConfig, VectorEnv
from ddrl_bus.errors import DdrlError, UnreachableError
from ddrl_bus.launch import closing, loop, remote, run_dir
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.launch.node import die_with
from ddrl_bus.launch.start import plan_of
from ddrl_bus.messages import Trajectory, Weights, fields_of, parse
from ddrl_bus.nodes.base import Node
from ddrl_bus.topology import Plan
from ddrl_bus.transport import ledger
from ddrl_bus.transport.wire import Array

COUNTS: Final = (10, 50, 100, 200)
ENVS: Final = 8
PERIOD_S: Final = 0.5
WARM_UP_S: Final = 2.0
POLL_S: Final = 0.05
PATIENCE_S: Final = 300.0
"""Against hangs only."""
SERVICES: Final = ("controller-0", "learner-0")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

Process = subprocess.Popen[bytes]


ABOUT: Final = About(
    bench="actors",
    title="What one more actor costs the controller and the learner",
    method=f"""A real controller, a real learner, and actors that are real in all but their environments: each a
process with a bus, sockets, a ledger and heartbeats of its own, which sends a recorded unroll every {PERIOD_S:g} s.
The learner's batch is a round of all of them, so that it publishes weights as often, to each. Then the run is
stopped.""",
    reading="""CPU is of one core; an actor's share of it is the figure to look at. All at work: how long after the
first actor the last one had sent something. Gone: how long after the controller was asked until no process was left.
Memory of an actor is what its process has for itself alone. Open books are 0 where every unroll is accounted for.""",
)
MIB: Final = Kind("MiB")
_SERVICE: Final = {"CPU": SHARE, "an actor": Kind("%", digits=3), "memory": MIB}
_ACTORS: Final = {
    "all at work": S,
    "trained": PER_S,
    "memory each": MIB,
    "gone": S,
    "unrolls": COUNT,
    "lost": COUNT,
    "open books": COUNT,
}


def measure(counts: Sequence[int] = COUNTS, seconds: float = 10.0) -> Iterator[Row]:
    """Rows of each number of actors, with figures over so many seconds."""
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name:
            yield from _run(count, seconds, Path(name))


def _run(count: int, seconds: float, folder: Path) -> Iterator[Row]:
    plan = plan_of("quickstart", _overrides(count), probe=False, fresh=True)
    run_dir.create(plan, path=folder, command=sys.argv, started=time.time())
    with run_dir.sockets(plan, plan.controller.host), contextlib.ExitStack() as stack:
        node = "ddrl_bus.launch.node"
        processes = {name: stack.enter_context(_process(node, *_node(name, folder))) for name in SERVICES}
        _until(lambda: _sum(folder, "learner-0", "weights/messages_out") > 0, "the learner's weights", processes)
        processes["actors"] = stack.enter_context(_process("ddrl_bus.bench.actors", str(folder)))
        began = _until(lambda: _at_work(folder) > 0, "the first actor", processes)
        joined = _until(lambda: _at_work(folder) == count, f"{count} actors", processes)
        time.sleep(WARM_UP_S)
        before, then = _used(processes, folder), time.perf_counter()
        time.sleep(seconds)
        took = time.perf_counter() - then
        rates = {what: (value - before[what]) / took for what, value in _used(processes, folder).items()}
        mib = {name: _memory(processes[name].pid, "VmRSS", "status") for name in SERVICES}
        own = [_memory(pid, "Private_", "smaps_rollup") for pid in _children(processes["actors"].pid)]
        asked = time.perf_counter()
        asyncio.run(remote.stop(folder))
        gone = _until(lambda: all(process.poll() is not None for process in processes.values()), "the end", {})
        if failed := [name for name, process in processes.items() if process.returncode]:
            raise DdrlError(f"{', '.join(failed)} failed; what they said is above")
    (balance,) = ledger.audit(closing.lives(folder)).values()
    for name in SERVICES:
        cpu = 100 * rates[name]
        found = {"CPU": cpu, "an actor": cpu / count, "memory": mib[name]}
        yield row(f"{count} actors", name, [found], _SERVICE, main="an actor")
    found = {"all at work": joined - began, "trained": rates["unrolls"], "memory each": float(np.mean(own))}
    found |= {"gone": gone - asked, "unrolls": balance.produced, "lost": balance.lost}
    yield row(f"{count} actors", "actors", [found | {"open books": int(not balance.closed)}], _ACTORS)


def _overrides(count: int) -> tuple[str, ...]:
    return (
        *(f"nodes.actor.count={count}", f"nodes.actor.envs={ENVS}", f"algo.batch={ENVS * count}"),
        *("nodes.evaluator.count=0", "stop.reward=null", "stop.steps=null", "nodes.learner.device=cpu"),
    )


def _until(holds: Callable[[], bool], what: str, processes: Mapping[str, Process]) -> float:
    """When it began to hold, of `perf_counter`; none of the processes may end before."""
    deadline = time.perf_counter() + PATIENCE_S
    while not holds():
        if ended := [name for name, process in processes.items() if process.poll() is not None]:
            raise DdrlError(f"{', '.join(ended)} ended before {what}; what was said is above")
        if time.perf_counter() > deadline:
            raise UnreachableError(f"{what}: not within {PATIENCE_S:.0f} s")
        time.sleep(POLL_S)
    return time.perf_counter()


def _at_work(folder: Path) -> int:
    """Actors that have sent something, from their ledgers: nobody need answer."""
    return sum(ledger.read(page).get("env_steps", 0) > 0 for page in (folder / "ledger").glob("actor-*.page"))


def _used(processes: Mapping[str, Process], folder: Path) -> dict[str, float]:
    """CPU seconds of the services so far, and unrolls that were trained on."""
    stats = {
        name: Path(f"/proc/{processes[name].pid}/stat").read_text().rpartition(")")[2].split() for name in SERVICES
    }
    cpu = {
        name: (int(stat[11]) + int(stat[12])) / _TICKS_PER_S for name, stat in stats.items()
    }  # proc(5): utime, stime
    return {**cpu, "unrolls": _sum(folder, "learner-0", "trajectories/trained")}


def _sum(folder: Path, node: str, what: str) -> int:
    """Over the lives of a node, from their pages."""
    return sum(ledger.read(page).get(what, 0) for page in (folder / "ledger").glob(f"{node}@*.page"))


def _memory(pid: int, key: str, file: str) -> float:
    """MiB, the sum of what a file of /proc says under keys that begin so."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# ---- processes


def _node(name: str, folder: Path) -> Sequence[str]:
    return ("--name", name, "--run-dir", str(folder), "--topology", str(folder / run_dir.LOCK_FILE))


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[Process]:
    command = [sys.executable, "-P", "-m", module, *arguments, "--parent", str(os.getpid())]
    process = subprocess.Popen(command, env={"OPENBLAS_NUM_THREADS": "1"} | os.environ, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()  # its children go with it
        process.wait()


class Replayer(Node):
    """An actor that has played before."""

    role: ClassVar[str] = "actor"
    rows: ClassVar[Mapping[str, Array]]
    """Of the unroll that all of them send."""

    async def start(self) -> None:
        self.weights = self.open_subscriber("weights")
        self.trajectories = self.open_sender("trajectories")
        self.env_steps = self.ledger.counter("env_steps")
        self.unrolls = self.unrolls_of(ENVS)

    async def run(self) -> None:
        newest = await self.until(self.weights.next(), self.draining)
        while newest and not self.draining.is_set():
            newest = self.weights.latest() or newest
            unroll = self.unrolls.next()
            for name, array in unroll.rows.items():
                array[...] = self.rows.get(name, 0)
            unroll.rows["version"][...] = parse(Weights, newest).updates
            sending = self.trajectories.send(unroll.finish(), fields_of(Trajectory(newest.epoch, [], [])))
            await self.until(sending, self.draining)
            self.env_steps.add(unroll.length * ENVS)
            await self.until(asyncio.sleep(PERIOD_S), self.draining)
        await self.trajectories.flush(self.plan.grace / 2)


def recorded(plan: Plan) -> dict[str, Array]:
    """An unroll, played at random."""
    env = VectorEnv(EnvConfig(**plan.env.model_dump()), ENVS, np.random.SeedSequence(plan.seed))
    random, obs, steps = np.random.default_rng(plan.seed), [env.reset()], []
    actions = random.integers(0, 2, (plan.algo.unroll, ENVS))
    for action in actions:
        steps.append(env.step(action))
        obs.append(steps[-1].obs)
    env.close()
    ends = {name: np.stack([getattr(step, name) for step in steps]) for name in ("reward", "terminated")}
    return {"obs": np.stack(obs), "action": actions, **ends}


def main(arguments: Sequence[str] | None = None) -> int:
    """Every actor of a run, each in a fork of this process, which has no thread and no socket; until all have left."""
    parser = argparse.ArgumentParser("ddrl_bus.bench.actors")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with(options.parent)
    plan = load_lock(options.folder)
    Replayer.rows = recorded(plan)
    import ddrl_bus.transport.zeromq  # noqa: F401  - for the forks to share

    children = {_fork(plan, actor.name, options.folder): actor.name for actor in plan.members(("actor",))}
    failed = [name for pid, name in children.items() if os.waitpid(pid, 0)[1]]
    print(f"failed: {', '.join(failed)}" if failed else "", end="", file=sys.stderr)
    return min(1, len(failed))


def _fork(plan: Plan, name: str, folder: Path) -> int:
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with(parent)
        epoch = run_dir.next_epoch(folder, name)
        loop.run(Replayer(plan, name, folder, epoch).live(asyncio.Event()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
