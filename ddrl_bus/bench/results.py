"""The learning results: runs the cases of bench/cases.py and writes them down.

docs/results.json          everything that was measured, a line a run; other cases than those run now are kept
docs/results.md            the page, made from it
docs/results/CASE.svg      the learning curves, made from it
docs/results/CASE.yaml     the topology that a case was measured with, every default written out

python -m ddrl_bus.bench.results [CASE...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ddrl_bus.bench import history, plot, results_page
from ddrl_bus.bench.cases import CASES, RULES, SEEDS, Case, named
from ddrl_bus.bench.results_page import CaseResults, Record
from ddrl_bus.errors import DdrlError, UsageError
from ddrl_bus.launch.closing import RESULT
from ddrl_bus.launch.run_dir import meta, read_json, write

PATIENCE_S: Final = 2 * 3600.0
"""Against hangs only."""
Records = dict[str, dict[str, Record]]
"""Case → seed → what was measured."""


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(case: Case, seed: int) -> Record:
    """One `ddrl run` to its end, as a record for results.json; a run that failed is one with its `problem`."""
    words = case.words(seed)
    record: Record = {"command": shlex.join(["ddrl", *words]), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    record["machine"] = machine()
    command = [sys.executable, "-m", "ddrl_bus.cli", *words, "--json"]
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return record | {"problem": f"no end within {PATIENCE_S:.0f} s"}
    if ended.returncode or not ended.stdout:
        return record | {"problem": f"exit code {ended.returncode}: {_last_words(ended.stderr)}"}
    return record | measured(json.loads(ended.stdout))


def _last_words(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["said nothing"])[-1].replace(f"{Path.cwd()}/", "")


def measured(closing: Mapping[str, Any]) -> Record:
    """What the closing object of a run, and its run directory, say."""
    folder = Path(closing["run_dir"])
    seen = history.read(folder)
    confirmed = bool((read_json(folder / RESULT) or {}).get("confirmed"))
    overhead: dict[str, list[float]] = defaultdict(list)
    for node, share in (closing["overhead"] or {}).items():
        if share is not None:
            overhead[history.group_of(node)].append(share)
    lags = seen.lags
    return {
        "final": closing["return"] if confirmed else None,
        "best": max((evaluated.mean_return for evaluated in seen.evaluations), default=None),
        "reason": closing["reason"],
        "env_steps": closing["env_steps"],
        "updates": closing["updates"],
        "wall_s": closing["wall_s"],
        "steps_per_s": closing["steps_per_s"],
        "overhead": {group: round(sum(shares) / len(shares), 4) for group, shares in overhead.items()},
        "lag": {
            "mean": round(sum(lag.mean for lag in lags) / len(lags), 2),
            "p95": round(sum(lag.p95 for lag in lags) / len(lags), 2),
            "max": max(lag.max for lag in lags),
        }
        if lags
        else None,
        "ledger_closed": closing["ledger"]["closed"],
        "lost": closing["ledger"]["lost"],
        "restarts": closing["restarts"],
        "versions": meta(folder).get("versions", {}),
        "problem": "" if closing["ledger"]["closed"] else "the ledger does not close",
        "curve": [[e.env_steps, round(e.wall_s, 2), round(e.mean_return, 3), e.confirmation] for e in seen.evaluations],
    }


def machine() -> str:
    """Cores and memory of this machine."""
    import psutil

    cores = len(os.sched_getaffinity(0))
    memory = psutil.virtual_memory().total / 2**30
    return f"{cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────


def load(path: Path) -> Records:
    """What results.json holds; nothing if there is none.

    Raises:
        UsageError: it is damaged; nothing is written over it then.
    """
    if not path.exists():
        return {}
    records = read_json(path)
    if not isinstance(records, dict):
        raise UsageError(f"{path}: not whole; mend it or remove it")
    return records


def store(path: Path, records: Records) -> None:
    """A line a run, so that a diff shows which were made anew."""
    blocks = []
    for name, seeds in records.items():
        lines = ",\n".join(f"  {json.dumps(seed)}: {json.dumps(record)}" for seed, record in sorted(seeds.items()))
        blocks.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    write(path, "{\n" + ",\n".join(blocks) + "\n}\n")


def draw(case: Case, records: Records, path: Path, cases: Sequence[Case] = CASES) -> None:
    """The learning curves of a case, of a control beside what it is the control of."""
    shown = [other for other in cases if other.name == case.control_of] + [case]
    histories = [
        history.History(one.name, int(seed), [history.Evaluated(*point) for point in record.get("curve", [])])
        for one in shown
        for seed, record in records.get(one.name, {}).items()
    ]
    if any(one.evaluations for one in histories):
        figure = plot.new_figure(7, 4)
        plot.learning_curves(figure.add_subplot(), plot.grouped(histories), bar=case.bar)
        plot.save(figure, path)


def results_of(case: Case, records: Records, docs: Path) -> CaseResults:
    return CaseResults(case, records.get(case.name, {}), case.matches(settings_path(case, docs)))


def settings_path(case: Case, docs: Path) -> Path:
    return docs / "results" / f"{case.name}.yaml"


def store_settings(path: Path, settings: str) -> None:
    """No file for a topology that cannot be loaded."""
    if settings:
        write(path, settings)
    else:
        path.unlink(missing_ok=True)


def write_down(docs: Path, records: Records, cases: Sequence[Case] = CASES) -> None:
    """The page and its pictures."""
    for case in cases:
        if case.name in records:
            draw(case, records, docs / "results" / f"{case.name}.svg", cases)
    write(docs / "results.md", results_page.page([results_of(case, records, docs) for case in cases]))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def run_all(chosen: Sequence[Case], seeds: Sequence[int], docs: Path, cases: Sequence[Case] = CASES) -> bool:
    """Run and write down `chosen`; whether all of them passed. What was measured of other cases is kept."""
    records = load(docs / "results.json")
    for case in chosen:
        for seed in seeds:
            say(f"{case.name} seed {seed} ...")
            kept, settings = results_of(case, records, docs).current, case.lock()  # as it starts: a run takes long
            record = run(case, seed)
            say(f"{case.name} seed {seed}: {results_page.in_words(record)}")
            records[case.name] = {**kept, str(seed): record}
            store(docs / "results.json", records)
            store_settings(settings_path(case, docs), settings)
        write_down(docs, records, cases)
        say(f"{case.name}: {results_of(case, records, docs).verdict}")
    return all(results_of(case, records, docs).passed for case in chosen)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Exit code 1: a case has failed."""
    parser = argparse.ArgumentParser(
        prog="bin/results", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all of them")
    parser.add_argument("--list", action="store_true", help="print the cases and their commands, run nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, metavar="N", help="default: 1 2 3")
    parser.add_argument("--only-write", action="store_true", help="write page and curves anew, run nothing")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder to write to, default docs")
    options = parser.parse_intermixed_args(arguments)
    try:
        chosen = named(options.cases, cases)
        if options.list:
            for case in chosen:
                print(f"{case.name}: {case.bar:g} within {case.steps:,} steps, {RULES[case.rule].words}")
                print(f"    {shlex.join(['ddrl', *case.words(seed=1)])}")
            return 0
        (options.docs / "results").mkdir(parents=True, exist_ok=True)
        plot.writable(options.docs / "results" / "any.svg")
        if options.only_write:
            write_down(options.docs, load(options.docs / "results.json"), cases)
            return 0
        return 0 if run_all(chosen, options.seeds, options.docs, cases) else 1
    except DdrlError as error:
        say(f"error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
