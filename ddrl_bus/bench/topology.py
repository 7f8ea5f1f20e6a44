"""Where the time and the bytes of a whole run go, and what it is bound by: `ddrl bench topology TOPO`.

Runs a topology for some seconds and reads what its nodes counted meanwhile, in turn with the same training without a
bus.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from ddrl_bus.bench import history, limits
from ddrl_bus.bench.alone import alone
from ddrl_bus.bench.books import Books, Lives, lives
from ddrl_bus.bench.report import BYTES, COUNT, PER_S, SHARE, US, About, Kind, Repeat, Row, row
from ddrl_bus.errors import UsageError
from ddrl_bus.launch.start import plan_of
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK

PATIENCE_S: Final = 120.0
"""For starting and for ending, against hangs only."""
POLL_S: Final = 0.1
FOR_EVER: Final = ("stop.reward=null", "stop.steps=null", "stop.time=null")
VERSIONS: Final = Kind("versions", digits=2)
KB: Final = Kind("KB/s", "", 1)
ABOUT: Final = About(
    bench="topology",
    title="Where the time and the bytes of a training run go",
    method="""A real run of the topology, as `ddrl run` starts it, for the given time from its first update on; a repeat
is a run. Each node counts where its time goes, in nanoseconds, in a ledger that this reads at either end of that time.

Communication overhead of a node: its time between having arrays and going on with its own work that the same loop
in one program without a bus would not spend. That is allocating messages in wire layout (pack), header and handing
over to ZeroMQ (send), decoding and loading weights (unpack), switching between event loop and thread and waiting
for a core (handoff), and summing gradients over replicas (all_reduce); as a share of all its time, waits included,
and of its busy time. Waiting because the learner is the bottleneck (back-pressure, send_wait) is no overhead, and
stands apart, as does every other wait for a peer.

In turn with each run the same training without a bus, for as long: one process and one thread, in which environments,
policy and learner (and a buffer, where there is a replay), those of the topology, take turns.

What binds: how much of its capacity each thing used, from the nodes' busy time, the processor time of all processes,
and the bytes of all links as if all of them left this machine. An actor that waited for nobody would play its share of
the env steps over its busy share; so many of them would fill the thing. Where a rule has actors wait for the learner
(lock-step), that holds for none of them.""",
    reading="""Of a group of nodes the mean. The shares of a row, busy aside, add up to 100. Of a link: microseconds a
message for packing it (encode), for waiting for credit (send-wait), for the way until its receiver's event loop has it
(wire: by both hosts' wall clocks), for lying unread there (queue-wait), and for unpacking and checking (decode). Of a
question and its answer each is the sum of both, and wire of weights is until a subscriber has them. Staleness is by how
many updates the learners were ahead of the weights that their newest rows were played with. Bytes on the wire are
what senders handed to ZeroMQ, after the codec; before it is what they would have been without. A version of weights
counts once, however many take it. What is used most binds now; what comes after it binds next, once there are so many
actors, or once the first is made faster.""",
    baseline="as fast as without a bus",
)
_WHOLE: Final = {
    "env steps": PER_S,
    "updates": PER_S,
    "lag mean": VERSIONS,
    "lag p95": VERSIONS,
    "lag max": VERSIONS,
    "lost": COUNT,
}
_LINK: Final = {
    "messages": Kind("/s", "", 1),
    "on the wire": KB,
    "before codec": KB,
    "a message": BYTES,
    **dict.fromkeys(("encode", "send-wait", "wire", "queue-wait", "decode"), US),
}


def measure(topology: str, overrides: Sequence[str] = (), seconds: float = 20.0, repeats: int = 1) -> Iterator[Row]:
    """Rows of each group of nodes, of each link, of what binds, and of the run.

    Raises:
        UsageError: the topology, or an override, is refused; or nothing was trained in that time.
    """
    overrides = [*FOR_EVER, *overrides]
    plan = plan_of(topology, overrides, probe=False, starts=False)
    runs, without = [], []
    with alone(topology, overrides) as loop:
        for _ in range(repeats):
            runs.append(_run(topology, overrides, seconds))
            without.append(loop.steps_per_s(seconds))
    for group in runs[0].books.groups:
        yield _time_row(group, [run.books.time(group) for run in runs])
    links = [dict(run.books.links()) for run in runs]
    for link in sorted(set(links[0]).intersection(*links)):
        yield row("a link", link, [found[link] for found in links], _LINK, main="on the wire")
    yield from limits.rows(plan, [(run.books, run.cpu_s) for run in runs])
    yield row("the run", plan.name, [run.whole for run in runs], _WHOLE)
    both = [
        {"over the bus": run.whole["env steps"], "without": steps} for run, steps in zip(runs, without, strict=True)
    ]
    ratios = {"ratio": ("over the bus", "without")}
    yield row("env steps, with and without a bus", plan.name, both, {"over the bus": PER_S, "without": PER_S}, ratios)


def _time_row(group: str, repeats: Sequence[Repeat]) -> Row:
    parts = [part for part in (*WORK, *COMMUNICATION, *WAITS) if any(repeat.get(part) for repeat in repeats)]
    whole = [{**dict.fromkeys(parts, 0.0), **repeat} for repeat in repeats]
    derived = dict.fromkeys(("overhead", "overhead, busy", "back-pressure"), SHARE)
    kinds = {**derived, "busy": Kind("%", ""), **dict.fromkeys(parts, Kind("%", ""))}
    return row("time of a node, %", group, whole, kinds, main="overhead")


# ---- a run


@dataclass(frozen=True)
class Run:
    books: Books
    cpu_s: float
    """That all its processes took meanwhile."""
    whole: Repeat


@dataclass(frozen=True)
class Moment:
    at: float
    lives: Lives
    cpu_s: float

    @classmethod
    def of(cls, folder: Path, pid: int) -> Moment:
        return cls(time.perf_counter(), lives(folder), _cpu_s(pid))


def _run(topology: str, overrides: Sequence[str], seconds: float) -> Run:
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name:
        folder = Path(name) / "run"
        words = ["run", topology, *overrides, "--run-dir", str(folder), "--json"]
        command = [sys.executable, "-m", "ddrl_bus.cli", *words]
        with (Path(name) / "errors").open("w+") as errors:
            pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
            with subprocess.Popen(command, text=True, **pipes) as process:
                try:
                    watched = _watched(process, folder, seconds)
                    said, _ = process.communicate(timeout=PATIENCE_S)
                finally:
                    process.kill()
            errors.seek(0)
            if process.returncode or not said:
                raise UsageError(f"ddrl {' '.join(words[:-3])}: {_last_words(errors.read())}")
        closing = json.loads(said)
        if watched is None:
            why = f"it ended, or trained nothing within {PATIENCE_S:g} s"
            raise UsageError(f"{topology}: {why}; leave stop.* as it is, and look with ddrl {' '.join(words[:-3])}")
        before, after = watched
        books = Books(before.lives, after.lives, after.at - before.at)
        return Run(books, after.cpu_s - before.cpu_s, _whole(books, folder, closing))


def _watched(process: subprocess.Popen[str], folder: Path, seconds: float) -> tuple[Moment, Moment] | None:
    """The moments of its first update and of so many seconds later, when it is told to end; None if it ended before."""
    patience = time.perf_counter() + PATIENCE_S
    while not any(life.get("time/learn") for life in lives(folder).values()):
        if process.poll() is not None or time.perf_counter() > patience:
            return None
        time.sleep(POLL_S)
    before = Moment.of(folder, process.pid)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return before, Moment.of(folder, process.pid)
    else:
        return None
    finally:
        process.send_signal(signal.SIGINT)


def _whole(books: Books, folder: Path, closing: Mapping[str, Any]) -> Repeat:
    lags = history.read(folder).lags
    steps = books.count("env_steps")
    return {
        "env steps": steps / books.seconds,
        "updates": closing["updates"] / max(1, closing["env_steps"]) * steps / books.seconds,
        "lag mean": sum(lag.mean for lag in lags) / max(1, len(lags)),
        "lag p95": sum(lag.p95 for lag in lags) / max(1, len(lags)),
        "lag max": max((lag.max for lag in lags), default=0.0),
        "lost": closing["ledger"]["lost"],
    }


def _cpu_s(pid: int) -> float:
    """Processor seconds of a process and of those that it started."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(pid)
        for process in (whole, *whole.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
    return total


def _last_words(errors: str) -> str:
    lines = errors.splitlines()
    said = ([line for line in lines if line.startswith("error:")] or lines or ["it said nothing"])[-1]
    return said.removeprefix("error: ")
