"""Predictions against runs: `python -m ddrl_bus.planning.check [TOPO...]`.

For one reference topology after the other its parts are measured, and then round by round: trials, predictions at 1, 2
and 4 actors, which are written down, and at once these runs. How fast the cores are is measured before and after each.

docs/plan.json      predictions and measurements, with their times; other topologies than those run now are kept

At the end there is a table of all that was run, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from ddrl_bus.bench import history
from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.launch.closing import CLOSING, lives
from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.launch.start import plan_of
from ddrl_bus.metrics import WAITS
from ddrl_bus.planning import calibrate, pace, trial
from ddrl_bus.planning.pace import Pace
from ddrl_bus.planning.predict import as_json, predict
from ddrl_bus.planning.trial import WARM_S
from ddrl_bus.topology.plan import Plan

ACTORS: Final = (1, 2, 4)
ROUNDS: Final = 2
"""Of trials, predictions and runs, whose means are compared."""
BAR: Final = 0.15
ALONE: Final = ("stop.reward=null", "nodes.evaluator.count=0")
CASES: Final[Mapping[str, Sequence[str]]] = {
    "quickstart": ("nodes.actor.count={n}",),
    "a2c": ("nodes.actor.count={n}", "algo.batch={batch}"),
    "apex": ("nodes.actor.count={n}",),
    "seed": ("nodes.actor.count={n}",),
    "ga3c": ("nodes.actor.count={n}", "nodes.inference.predictors=1", "nodes.learner.trainers=1"),
    "ddppo": ("nodes.actor.count={n}", "nodes.learner.count={n}"),
}
"""Topology → what makes it one of n actors (of 32 environments, where a batch is a round of all)."""
Figures = dict[str, Any]


def words(topology: str, actors: int) -> list[str]:
    """The overrides of a case: without the evaluator, whose episodes grow as the policy learns."""
    return [*(word.format(n=actors, batch=32 * actors) for word in CASES[topology]), *ALONE]


def measured(run: Path) -> Figures:
    """What a run that is over came to, under the names of `Prediction`.

    Raises:
        UsageError: it has no closing.json, or trained on nothing.
    """
    closing = read_json(run / CLOSING) or {}
    if not closing.get("steps_per_s"):
        raise UsageError(f"{run}: no rate in {CLOSING}, expected a run that is over and has trained for a few seconds")
    (rate, updates), seen = _steady(run), history.read(run)
    seconds = closing["env_steps"] / rate
    idle = [_idle(parts) for node, parts in closing["shares"].items() if node.startswith("learner") and parts]
    lags = [lag.mean for lag in seen.lags[1:] or seen.lags]
    return {
        "env_steps_per_s": rate,
        "updates_per_s": updates,
        "learner_idle": sum(idle) / len(idle) if idle else None,
        "staleness": sum(lags) / len(lags) if lags else None,
        "bytes_per_s": {link: size / seconds for link, size in _bytes(run).items()},
    }


def _steady(run: Path) -> tuple[float, float]:
    """Env steps and updates a second from a moment after the first update on, as in a trial.

    Raises:
        UsageError: it was over before.
    """
    rows = list(history.lines_of(run / history.METRICS, []))
    start = next((row for row in rows if row["wall_s"] >= rows[0]["wall_s"] + WARM_S), None)
    if start is None or start is rows[-1]:
        raise UsageError(f"{run}: {len(rows)} lines in {history.METRICS}, expected a run of a few seconds")
    seconds = rows[-1]["wall_s"] - start["wall_s"]
    env_steps, updates = ((rows[-1][what] - start[what]) / seconds for what in ("env_steps", "updates"))
    return env_steps, updates


def _idle(parts: Mapping[str, float]) -> float:
    """Share of the time in which a learner's thread stood idle: it waited for others, or its work was handed over."""
    waited = sum(parts.get(what, 0.0) for what in WAITS)
    return waited + (1 - waited) * parts.get("handoff", 0.0)


def _bytes(run: Path) -> dict[str, float]:
    """Link → bytes that its senders counted; weights are counted once, and go to each that listens."""
    found: dict[str, float] = {}
    for counters in lives(run):
        for name, value in counters.items():
            link, _, what = name.rpartition("/")
            if what == "bytes_out" and value:
                found[link] = found.get(link, 0) + value
    plan = load_lock(run, starts=False)
    for name in found.keys() & {name for name, link in plan.links.items() if link.kind == "latest"}:
        publishers, listeners = (
            len(list(plan.members(end))) for end in (plan.links[name].sources, plan.links[name].targets)
        )
        found[name] *= listeners / publishers
    return found


def off(predicted: float, found: float) -> float:
    """By what share of the measured figure the prediction is too high."""
    return predicted / found - 1 if found else 0.0


def compared(prediction: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each figure that both have."""
    lines = [f"{'':24}{'predicted':>14}{'measured':>14}{'off':>8}"]
    rows = [(name, prediction[name], found.get(name)) for name in ("env_steps_per_s", "updates_per_s")]
    rows += [(name, prediction[name], found.get(name)) for name in ("learner_idle", "staleness")]
    rows += [
        (f"{link}, bytes/s", size, found["bytes_per_s"].get(link)) for link, size in prediction["bytes_per_s"].items()
    ]
    for name, ours, theirs in rows:
        if ours is None or theirs is None:
            continue
        share = name == "learner_idle"
        values = (
            (f"{ours:>14.0%}{theirs:>14.0%}{'':>8}")
            if share
            else f"{ours:>14,.1f}{theirs:>14,.1f}{off(ours, theirs):>+8.0%}"
        )
        lines.append(f"{name:24}{values}")
    return [*lines, f"bottleneck, predicted: {prediction['bottleneck']}"]


# ---- the reference topologies


def case_plan(topology: str, actors: int) -> Plan:
    return plan_of(topology, words(topology, actors), probe=False, starts=False)


def check(topology: str, path: Path) -> list[str]:
    """Predict, write it down, run, write that down, round by round; the lines of the table that come out."""
    parts = calibrate.parts(case_plan(topology, 2), calibrate.BUDGET_S)
    rounds: list[Figures] = []
    with pace.of_cores() as now:
        for _ in range(ROUNDS):
            known = calibrate.strained(case_plan(topology, 2), parts, now)
            foretold = {str(n): as_json(predict(case_plan(topology, n), known)) for n in ACTORS}
            fitted = {"strains": [asdict(strain) for strain in known.strains], "pace": known.pace}
            rounds.append({"predicted": foretold, "predicted_at": _utc(), **fitted, "measured": {}})
            _keep(path, topology, rounds)
            for n in ACTORS:
                rounds[-1]["measured"][str(n)] = run(topology, n, now)
                rounds[-1]["measured_at"] = _utc()
                _keep(path, topology, rounds)
    lines = [_line(topology, n, rounds) for n in ACTORS]
    print(*lines, sep="\n", flush=True)
    return lines


def run(topology: str, actors: int, now: Pace) -> Figures:
    """One run as long as a trial, as `measured` and with the machine's pace, or its `problem`."""
    before = now()
    with tempfile.TemporaryDirectory(prefix="ddrl-check-") as folder:
        path = Path(folder) / "run"
        try:
            ran = trial.run(trial.alone(case_plan(topology, actors), actors), path)
            found = measured(path)
        except UsageError as error:
            return {"problem": str(error)}
    return {
        **found,
        "env_steps_per_s": ran.env_steps_per_s,
        "learner_idle": ran.idle,
        "pace": (before + now()) / 2,
    }


def _keep(path: Path, topology: str, rounds: Sequence[Figures]) -> None:
    records = (read_json(path) or {}) | {topology: {"machine": calibrate.machine(), "rounds": rounds}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(records, indent=1, sort_keys=True) + "\n")


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


HEAD: Final = (
    "| topology, actors | predicted | measured | off | cores since | off but for these | rounds | learner idle |"
    " staleness |",
    "|---" * 9 + "|",
)


def _line(topology: str, actors: int, rounds: Sequence[Figures]) -> str:
    """Of the table: predicted and measured env steps a second; by how much the prediction is too high; how much more
    the cores did in runs than in trials, and how far off it would be but for that."""
    found = [each["measured"][str(actors)] for each in rounds]
    if problems := [each["problem"] for each in found if "problem" in each]:
        return f"| {topology}, {actors} | {problems[0]} |"
    told = [each["predicted"][str(actors)] for each in rounds]
    drifts = [theirs["pace"] / each["pace"] for each, theirs in zip(rounds, found, strict=True)]
    pairs = [(ours["env_steps_per_s"], theirs["env_steps_per_s"]) for ours, theirs in zip(told, found, strict=True)]
    ours, theirs = (fmean(side) for side in zip(*pairs, strict=True))
    drift = fmean(drifts)
    each = ", ".join(f"{off(*pair):+.0%}" for pair in pairs)
    return (
        f"| {topology}, {actors} | {ours:,.0f} | {theirs:,.0f} | {_marked(off(ours, theirs))} | {drift - 1:+.0%} "
        f"| {_marked(off(ours * drift, theirs))} | {each} | {_both(told, found, 'learner_idle', '.0%')} "
        f"| {_both(told, found, 'staleness', '.1f')} |"
    )


def _marked(share: float) -> str:
    """What is beyond the bar is bold."""
    return f"**{share:+.0%}**" if abs(share) > BAR else f"{share:+.0%}"


def _both(told: Sequence[Figures], found: Sequence[Figures], what: str, form: str) -> str:
    """Predicted and measured, where both are known."""
    sides = [[each[what] for each in side if each[what] is not None] for side in (told, found)]
    return " / ".join(format(fmean(side), form) for side in sides) if all(sides) else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", metavar="TOPO", help=f"default: {', '.join(CASES)}")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/plan.json"))
    args = parser.parse_args()
    try:
        if unknown := [name for name in args.topologies if name not in CASES]:
            raise UsageError(f"no reference topology {unknown[0]!r}; have {', '.join(CASES)}")
        lines = [line for topology in args.topologies or CASES for line in check(topology, args.output.resolve())]
        print("", *HEAD, *lines, sep="\n")
    except DdrlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
