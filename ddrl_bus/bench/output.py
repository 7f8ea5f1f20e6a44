"""Where a report goes: rows on stdout as they come, then files; and how it compares with an earlier one."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ddrl_bus.bench import report_page
from ddrl_bus.bench.report import About, Report, Row, as_csv, as_text
from ddrl_bus.errors import UsageError

STDOUT: Final = "-"
WORSE: Final = 1
"""Exit code."""


@dataclass(frozen=True)
class Output:
    """Files to write, each if named; of `json` "-" is stdout."""

    json: str | None = None
    csv: Path | None = None
    html: Path | None = None
    compare: Path | None = None
    """A report that `json` wrote."""
    fail_over: float = 0.1
    """How much worse than there, as a part of it, a row may be."""


def measured(about: About, rows: Iterable[Row], output: Output) -> int:
    """Measure, print and write; the exit code.

    Raises:
        UsageError: a file cannot be written, or what is to be compared with is no such report. Before any measuring.
    """
    before = _earlier(about, output.compare) if output.compare else None
    for path in (output.csv, output.html, Path(output.json) if output.json not in (None, STDOUT) else None):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: no folder {path.parent}")
    report = Report(about)
    stream = sys.stderr if output.json == STDOUT else sys.stdout
    for line in as_text(report.filled(rows)):
        print(line, file=stream, flush=True)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _write(report, output)
    if before is None:
        return 0
    worse = list(compared(before, report.rows, output.fail_over))
    for line in worse:
        print(f"worse: {line}", file=sys.stderr)
    return WORSE if worse else 0


def _write(report: Report, output: Output) -> None:
    text = json.dumps(report.as_json(), indent=1, ensure_ascii=False)
    try:
        if output.json == STDOUT:
            print(text)
        elif output.json:
            Path(output.json).write_text(text + "\n", encoding="utf-8")
        if output.csv:
            with output.csv.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(as_csv(report))
        if output.html:
            output.html.write_text(report_page.page(report), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}") from error


# ── against an earlier report ────────────────────────────────────────────────────────────────────────────────────

Earlier = Mapping[tuple[str, str], Mapping[str, Any]]
"""(section, name) → a row as JSON has it."""


def _earlier(about: About, path: Path) -> Earlier:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = {(each["section"], each["name"]): each for each in report["rows"]}
        for each in rows.values():
            [float(figure["median"]) for figure in each["figures"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: {error!r}; expected what `ddrl bench {about.bench} --json {path}` wrote") from None
    if report.get("bench") != about.bench:
        raise UsageError(f"{path}: a report of `ddrl bench {report.get('bench')}`, not of `ddrl bench {about.bench}`")
    return rows


def compared(before: Earlier, rows: Iterable[Row], limit: float) -> Iterator[str]:
    """A line for each row whose main figure is worse than before by more than `limit`, or that has lost it."""
    for each in rows:
        then = before.get((each.section, each.name), {}).get("figures", {}).get(each.main or _main_of(before, each))
        if then is None:
            continue
        now, was = each.headline, float(then["median"])
        if now is None:
            yield f"{each.section}, {each.name}: {each.note}, was {was:.4g} {then['unit']}"
        elif (change := _worse_by(now.median, was, now.kind.better)) > limit:
            values = f"{each.main} {was:.4g} → {now.median:.4g} {now.kind.unit}"
            yield f"{each.section}, {each.name}: {values}, {change:.0%} worse"


def _main_of(before: Earlier, each: Row) -> str:
    return str(before.get((each.section, each.name), {}).get("main", ""))


def _worse_by(now: float, was: float, better: str) -> float:
    """How much worse `now` is, as a part of the better of the two; negative: it is better."""
    if not better or min(now, was) <= 0:
        return 0.0
    return now / was - 1 if better == "less" else was / now - 1
