"""Predictions against runs: `python -m ddrl_bus.planning.check [TOPO...]`.

For one reference topology after the other: measure its costs, write down what is predicted at 1, 2 and 4 actors, and
only then run these and write what was measured beside it. Trials and runs are made three times, and the middle one
counts: one and the same run may take half as long again a minute later.

docs/plan.json      predictions and measurements, with their times; other topologies than those run now are kept

With --predict nothing is run, and with --measure nothing is predicted: the runs are compared with what the file holds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddrl_bus.bench import history
from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.launch.closing import CLOSING, lives
from ddrl_bus.launch.run_dir import read_json, write
from ddrl_bus.launch.start import plan_of
from ddrl_bus.metrics import WAITS
from ddrl_bus.planning import calibrate
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import as_json, predict
from ddrl_bus.planning.trial import WARM_S, Company, end
from ddrl_bus.topology.plan import Plan

ACTORS: Final = (1, 2, 4)
SECONDS: Final = 7.0
"""Of training that a run is to take, if it goes as predicted; the first one is left out, as of a trial."""
ROUNDS: Final = 3
"""Trials, and runs of each count, of which the one in the middle counts."""
PATIENCE_S: Final = 180.0
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
    rate, seen = _steady_rate(run), history.read(run)
    seconds = closing["env_steps"] / rate
    idle = [_idle(parts) for node, parts in closing["shares"].items() if node.startswith("learner") and parts]
    lags = [lag.mean for lag in seen.lags[1:] or seen.lags]
    return {
        "env_steps_per_s": rate,
        "updates_per_s": closing["updates"] / seconds,
        "learner_idle": sum(idle) / len(idle) if idle else None,
        "staleness": sum(lags) / len(lags) if lags else None,
        "bytes_per_s": {link: size / seconds for link, size in _bytes(run).items()},
    }


def _steady_rate(run: Path) -> float:
    """Env steps a second from a moment after the first update on, as in a trial.

    Raises:
        UsageError: it was over before.
    """
    rows = list(history.lines_of(run / history.METRICS, []))
    start = next((row for row in rows if row["wall_s"] >= rows[0]["wall_s"] + WARM_S), None)
    if start is None or start is rows[-1]:
        raise UsageError(f"{run}: {len(rows)} lines in {history.METRICS}, expected a run of a few seconds")
    rate: float = (rows[-1]["env_steps"] - start["env_steps"]) / (rows[-1]["wall_s"] - start["wall_s"])
    return rate


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


def foretold(topology: str, known: Costs) -> dict[str, Figures]:
    """Predictions by number of actors."""
    return {str(n): as_json(predict(case_plan(topology, n), known, Setting())) for n in ACTORS}


def run(topology: str, actors: int, rate: float) -> Figures:
    """One run of about `SECONDS` at the predicted rate, as `measured`, or its `problem`."""
    steps = max(1000, round(rate * SECONDS))
    with tempfile.TemporaryDirectory(prefix="ddrl-check-") as folder:
        overrides = [*words(topology, actors), f"stop.steps={steps}"]
        command = [sys.executable, "-m", "ddrl_bus.cli", "run", topology, *overrides, "--run-dir", f"{folder}/run"]
        silent, said = subprocess.DEVNULL, subprocess.PIPE
        with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=said, text=True) as running:
            company = Company(running.pid)
            company.start()
            try:
                last = running.communicate(timeout=PATIENCE_S)[1].strip().splitlines()[-1:]
                return measured(Path(folder) / "run") | {"others": company.mean()}
            except subprocess.TimeoutExpired:
                return {"problem": f"no end within {PATIENCE_S:.0f} s"}
            except UsageError:
                return {"problem": last[0] if last else "said nothing"}
            finally:
                company.over.set()
                end(running)


def check(topology: str, path: Path, *, predicts: bool, runs: bool) -> None:
    """Predict, write it down, run, write that down."""
    records: dict[str, Any] = read_json(path) or {}
    if predicts:
        known = calibrate.of(case_plan(topology, 2), calibrate=True, trials=ROUNDS)
        records[topology] = {
            "predicted": foretold(topology, known),
            "predicted_at": _now(),
            "machine": known.machine,
            "words": words(topology, 2),
            "fitted": {name: getattr(known, name) for name in ("levels", "locked", "hop", "took")},
        }
        _keep(path, records)
    if not runs:
        return
    record = records.get(topology)
    if record is None:
        raise UsageError(f"{path}: no prediction of {topology}; leave out --measure")
    ran: dict[int, list[Figures]] = {n: [] for n in ACTORS}
    for n in ACTORS * ROUNDS:  # round by round: the machine's mood changes
        ran[n].append(run(topology, n, record["predicted"][str(n)]["env_steps_per_s"]))
    record["measured"] = {str(n): _typical(found) for n, found in ran.items()}
    record["measured_at"] = _now()
    _keep(path, records)
    for n in ACTORS:
        print(_line(topology, n, record["predicted"][str(n)], record["measured"][str(n)]), flush=True)


def _typical(runs: Sequence[Figures]) -> Figures:
    """The one that was neither the slowest nor the fastest, with the rates of all."""
    if problems := [found for found in runs if "problem" in found]:
        return problems[0]
    by_rate = sorted(runs, key=lambda found: float(found["env_steps_per_s"]))
    return by_rate[len(runs) // 2] | {"rates": [round(found["env_steps_per_s"]) for found in by_rate]}


def _keep(path: Path, records: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(records, indent=1, sort_keys=True) + "\n")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _line(topology: str, actors: int, prediction: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if "problem" in found:
        return f"{topology} × {actors}: {found['problem']}"
    ours, theirs = prediction["env_steps_per_s"], found["env_steps_per_s"]
    idle = f"idle {prediction['learner_idle']:.0%} / {found['learner_idle']:.0%}"
    lag = (
        ""
        if None in (prediction["staleness"], found["staleness"])
        else (f", staleness {prediction['staleness']:.1f} / {found['staleness']:.1f}")
    )
    within = "within" if abs(off(ours, theirs)) <= BAR else "beyond"
    return (
        f"{topology} × {actors}: {ours:,.0f} / {theirs:,.0f} env steps/s, "
        f"{off(ours, theirs):+.0%} ({within} {BAR:.0%}); "
        f"{idle}{lag}; {prediction['bottleneck']}; of {_listed(found['rates'])}, {found['others']} other busy threads"
    )


def _listed(rates: Sequence[int]) -> str:
    return ", ".join(f"{rate:,}" for rate in rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topologies", nargs="*", metavar="TOPO", help=f"default: {', '.join(CASES)}")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/plan.json"))
    parser.add_argument("--predict", action="store_true", help="write predictions down, run nothing")
    parser.add_argument("--measure", action="store_true", help="run, and compare with the predictions in the file")
    args = parser.parse_args()
    try:
        if unknown := [name for name in args.topologies if name not in CASES]:
            raise UsageError(f"no reference topology {unknown[0]!r}; have {', '.join(CASES)}")
        for topology in args.topologies or CASES:
            check(topology, args.output.resolve(), predicts=not args.measure, runs=not args.predict)
    except DdrlError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
