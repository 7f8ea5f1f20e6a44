"""What a run directory tells of how its run went: evaluations, lags, and where the nodes' time went."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ddrl_bus.errors import UsageError
from ddrl_bus.launch.closing import CLOSING
from ddrl_bus.launch.run_dir import LOCK_FILE, ROOT, find, meta, read_json
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK

METRICS = "metrics.jsonl"


class Evaluated(NamedTuple):
    """The mean return of weights that were made after `env_steps`."""

    env_steps: int
    wall_s: float
    mean_return: float
    confirmation: bool


class Lag(NamedTuple):
    """Updates that the learners were ahead of what they trained on, over their newest rows, at `env_steps` played."""

    env_steps: int
    wall_s: float
    mean: float
    p95: float
    max: float


@dataclass(frozen=True)
class History:
    """One run, in order of time."""

    name: str
    seed: int
    evaluations: Sequence[Evaluated] = ()
    lags: Sequence[Lag] = ()
    time_split: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Group of nodes → part → share of all its time, waits included."""
    notes: Sequence[str] = ()
    """What is missing or damaged, in words."""


def runs_of(words: Sequence[str]) -> list[Path]:
    """The run directories that `words` name: each is one, or a folder or a name under runs/ for all runs below it.

    Raises:
        UsageError: there is none; says where it looked.
    """
    if not words:
        return [find()]
    found: dict[Path, Path] = {}
    for word in words:
        below = [lock.parent for path in (Path(word), ROOT / word) for lock in _locks(path)]
        if not below:
            raise UsageError(f"no run in {word!r}: expected a run directory, a folder of runs, or a name under {ROOT}/")
        found |= {path.resolve(): path for path in below}
    return list(found.values())


def _locks(path: Path) -> list[Path]:
    own = path / LOCK_FILE
    return [own] if own.exists() else sorted(path.rglob(LOCK_FILE))


def read(run_dir: Path) -> History:
    """The history of one run, which may still be going on.

    Raises:
        UsageError: its meta.json, which names it, is missing or damaged.
    """
    about = meta(run_dir)
    if not {"name", "seed"} <= about.keys():
        raise UsageError(f"{run_dir}: meta.json is missing or damaged; it says which topology and seed this is")
    notes: list[str] = []
    lines = list(lines_of(run_dir / METRICS, notes))
    evaluations, lags = _evaluations(lines), list(_lags(lines))
    split = _time_split((read_json(run_dir / CLOSING) or {}).get("shares") or {})
    if not evaluations:
        notes.append(f"{run_dir}: no evaluation in {METRICS}")
    if not split:
        notes.append(f"{run_dir}: no time split: {CLOSING} is written when a run is over")
    return History(about["name"], about["seed"], evaluations, lags, split, notes)


def lines_of(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; a note for each other one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path}: {error.strerror}")
        return
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            record = json.loads(line)
            float(record["env_steps"]), float(record["wall_s"]), record["nodes"].items()
        except (ValueError, TypeError, KeyError, AttributeError):
            notes.append(f"{path}:{number}: damaged line, left out")
            continue
        yield record


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[Evaluated]:
    """Each once, however often it was reported."""
    found: dict[tuple[Any, ...], Evaluated] = {}
    for line in lines:
        evaluation = line.get("evaluation") or {}
        mean = evaluation.get("mean_return")
        if mean is not None:
            point = Evaluated(evaluation["env_steps"], line["wall_s"], mean, bool(evaluation["confirm"]))
            found.setdefault(tuple(evaluation.values()), point)
    return list(found.values())


def _lags(lines: Sequence[Mapping[str, Any]]) -> Iterator[Lag]:
    """One a line, from the first update on; of several learners the mean, and the worst p95 and maximum."""
    for line in lines:
        learners = [gauges for gauges in line["nodes"].values() if gauges.get("lag_mean") is not None]
        if learners and line.get("updates"):
            mean = sum(gauges["lag_mean"] for gauges in learners) / len(learners)
            p95, worst = (max(gauges[name] for gauges in learners) for name in ("lag_p95", "lag_max"))
            yield Lag(line["env_steps"], line["wall_s"], mean, p95, worst)


def _time_split(shares: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """From shares of busy time per node (`metrics.shares`) to shares of all time per group, the mean of its nodes."""
    members: dict[str, list[dict[str, float]]] = defaultdict(list)
    for node, parts in shares.items():
        waited = sum(parts.get(name, 0.0) for name in WAITS)
        whole = {name: parts[name] * (1 - waited) for name in (*WORK, *COMMUNICATION) if name in parts}
        whole |= {name: parts[name] for name in WAITS if name in parts}
        if whole:
            members[group_of(node)].append(whole)
    return {group: mean_of(splits) for group, splits in members.items()}


def mean_of(splits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Part by part; a part that one of them lacks counts as nothing there."""
    parts = {name for split in splits for name in split}
    return {name: sum(split.get(name, 0.0) for split in splits) / len(splits) for name in sorted(parts)}


def group_of(node: str) -> str:
    """`actor-3` is of group `actor`."""
    return node.rsplit("-", 1)[0]
