"""Where the time and the bytes of a whole run go: `ddrl bench topology TOPO`.

Runs a topology for some seconds and reads what its nodes counted: their ledgers, which hold where each node's time went
and every byte of every link, and the controller's metrics.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddrl_bus.bench import history
from ddrl_bus.bench.report import BYTES, COUNT, PER_S, SHARE, About, Kind, Repeat, Row, row
from ddrl_bus.errors import UsageError
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK, shares
from ddrl_bus.transport import ledger

PATIENCE_S: Final = 120.0
"""Beyond the run's own time, against hangs only."""
BACK_PRESSURE: Final = "send_wait"
VERSIONS: Final = Kind("versions", digits=2)
KB: Final = Kind("KB/s", "", 1)
ABOUT: Final = About(
    bench="topology",
    title="Where the time and the bytes of a training run go",
    method="""A real run of the topology, as `ddrl run` starts it, for the given time; a repeat is a run. Each node
counts where its time goes, in nanoseconds, in a ledger that this reads. Start-up (loading libraries, making
environments) is in none of the parts, waiting for the first weights is.

Communication overhead of a node: its time between having arrays and going on with its own work that the same loop
in one program without a bus would not spend. That is allocating messages in wire layout (pack), header and handing
over to ZeroMQ (send), decoding and loading weights (unpack), switching between event loop and thread and waiting
for a core (handoff), and summing gradients over replicas (all_reduce); as a share of all its time, waits included,
and of its busy time. Waiting because the learner is the bottleneck (back-pressure, send_wait) is no overhead, and
stands apart, as does every other wait for a peer.""",
    reading="""Of a group of nodes the mean. The shares of a row add up to 100. Staleness is by how many updates the
learners were ahead of the weights that their newest rows were played with. Bytes on the wire are what senders handed to
ZeroMQ, after the codec; before it is what they would have been without. A version of weights counts once, however many
take it.""",
)


def measure(topology: str, overrides: Sequence[str] = (), seconds: float = 20.0, repeats: int = 1) -> Iterator[Row]:
    """Rows of each group of nodes, of each link, and of the run.

    Raises:
        UsageError: the topology, or an override, is refused; or nothing was trained in that time.
    """
    runs = [_run(topology, overrides, seconds) for _ in range(repeats)]
    for group in runs[0].groups:
        yield _time_row(group, [run.times[group] for run in runs])
    for link in runs[0].links:
        yield row("bytes of a link", link, [run.links[link] for run in runs], _LINK, main="on the wire")
    yield row("the run", topology, [run.whole for run in runs], _WHOLE)


_WHOLE: Final = {
    "env steps": PER_S,
    "updates": PER_S,
    "lag mean": VERSIONS,
    "lag p95": VERSIONS,
    "lag max": VERSIONS,
    "lost": COUNT,
}
_LINK: Final = {"messages": Kind("/s", "", 1), "on the wire": KB, "before codec": KB, "a message": BYTES}


def _time_row(group: str, repeats: Sequence[Repeat]) -> Row:
    parts = [part for part in (*WORK, *COMMUNICATION, *WAITS) if any(repeat.get(part) for repeat in repeats)]
    whole = [{**dict.fromkeys(parts, 0.0), **repeat} for repeat in repeats]
    kinds = {"overhead": SHARE, "overhead, busy": SHARE, "back-pressure": SHARE, **dict.fromkeys(parts, Kind("%", ""))}
    return row("time of a node, %", group, whole, kinds, main="overhead")


class Run:
    """What one run left, read from its folder."""

    def __init__(self, folder: Path, closing: Mapping[str, Any]) -> None:
        self._lives = {page.stem: ledger.read(page) for page in sorted((folder / "ledger").glob("*.page"))}
        self.groups = sorted({_group(life) for life, counters in self._lives.items() if shares(counters)})
        self.times = {group: self._time(group) for group in self.groups}
        seconds = max(0.001, closing["env_steps"] / closing["steps_per_s"])
        self.links = dict(self._links(seconds))
        lags = history.read(folder).lags
        self.whole: Repeat = {
            "env steps": closing["steps_per_s"],
            "updates": closing["updates"] / seconds,
            "lag mean": sum(lag.mean for lag in lags) / max(1, len(lags)),
            "lag p95": sum(lag.p95 for lag in lags) / max(1, len(lags)),
            "lag max": max((lag.max for lag in lags), default=0.0),
            "lost": closing["ledger"]["lost"],
        }

    def _time(self, group: str) -> Repeat:
        """Percent of all time, the mean over the group's nodes."""
        splits = [
            split for life, counters in self._lives.items() if _group(life) == group if (split := shares(counters))
        ]
        found: dict[str, float] = defaultdict(float)
        for split in splits:
            busy = 1 - sum(split.get(wait, 0.0) for wait in WAITS)
            for part, share in split.items():
                found[part] += 100 * share * (1 if part in WAITS else busy) / len(splits)
            found["overhead, busy"] += 100 * split["overhead"] / len(splits)
        return {"back-pressure": found.get(BACK_PRESSURE, 0.0), **found}

    def _links(self, seconds: float) -> Iterator[tuple[str, Repeat]]:
        total: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        for counters in self._lives.values():
            for name, value in counters.items():
                link, _, what = name.partition("/")
                total[link][what.rpartition("/")[2] if ">" in what else what] += value
        for link, counts in sorted(total.items()):
            out = counts["bytes_out"] or counts["bytes_in"]
            messages = counts["produced"] or counts["messages_out"] or counts["messages_in"]
            if out and messages:
                yield (
                    link,
                    {
                        "messages": messages / seconds,
                        "on the wire": out / seconds / 1e3,
                        "before codec": (counts["bytes_raw_out"] or out) / seconds / 1e3,
                        "a message": out / messages,
                    },
                )


def _group(life: str) -> str:
    """`actor-0@…` is of group `actor`."""
    return history.group_of(life.partition("@")[0])


def _run(topology: str, overrides: Sequence[str], seconds: float) -> Run:
    stop = [f"stop.time={seconds:g}s", "stop.reward=null", "stop.steps=null"]
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name:
        folder = Path(name) / "run"
        words = ["run", topology, *stop, *overrides, "--run-dir", str(folder), "--json"]
        command = [sys.executable, "-m", "ddrl_bus.cli", *words]
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds + PATIENCE_S, check=False
        )
        if ended.returncode or not ended.stdout:
            errors = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
            said = (errors or ended.stderr.splitlines() or ["it said nothing"])[-1]
            raise UsageError(f"ddrl {' '.join(words[:-3])}: {said.removeprefix('error: ')}")
        closing = json.loads(ended.stdout)
        if not closing["steps_per_s"] or not closing["updates"]:
            raise UsageError(f"{topology}: nothing was trained within {seconds:g} s; give it longer with --seconds")
        return Run(folder, closing)
