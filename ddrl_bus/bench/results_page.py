"""docs/results.md: what bench/results.py measured, as a page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ddrl_bus.bench.cases import RULES, SEEDS, SLACK, Case, Seed

Record = dict[str, Any]
GAP: Final = "–"
COLUMNS: Final = (
    "seed",
    "final return",
    "best",
    "steps",
    "wall s",
    "steps/s",
    "overhead",
    "lag mean / p95 / max",
    "ledger",
    "date",
)

INTRODUCTION: Final = """\
# Learning results

<!-- Written by bin/results from docs/results.json; changes made by hand are lost. -->

Each line is an ordinary `ddrl run` over ZeroMQ, its nodes in processes of their own (bundles excepted); how far actors
were behind is in the tables. A run goes to the end of its steps, whatever it reached on the way. Then the learner holds
still and its last weights play 20 full episodes on fresh seeds, with *sampled* actions, once: **that is the return
given**. Nothing is picked among evaluations. Controls are the same agent with something taken away; they are there to
fail. Settings were tuned on CartPole-v1 with these and other seeds, so this shows that the systems learn, not how they
would do on an environment that nobody has tuned them for.

Steps a second are those in steady state, start-up left out; overhead is communication's share of a node's busy time as
[performance.md](performance.md) defines it; lags are means of what the learner reported over the run, and its maximum.

A run whose ledger does not close, or that ended without a confirmed evaluation, counts as failed whatever it learnt.
`bin/results` runs everything again and exits with 1 if a case fails; `bin/results CASE` replaces one case;
`bin/results --only-write` makes this page from docs/results.json. What a case was measured with, every default written
out, is in docs/results/CASE.yaml, a topology like any other; once the case says something else, its results no longer
count.
"""


def page(cases: Sequence[CaseResults]) -> str:
    sections = [_section(results) for results in cases if results.seeds]
    return "\n".join([INTRODUCTION, *_summary(cases), "", *_machines(cases), "", *sections])


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CaseResults:
    """What is known of one case."""

    case: Case
    seeds: Mapping[str, Record]
    """Seed → what was measured."""
    same_settings: bool
    """Whether the case would run with the settings that it was measured with."""

    def outdated(self, seed: str) -> bool:
        """Whether it was measured by another command, or with other settings, than the case has now."""
        command = shlex.join(["ddrl", *self.case.words(int(seed))])
        return not self.same_settings or self.seeds[seed]["command"] != command

    @property
    def current(self) -> dict[str, Record]:
        return {seed: record for seed, record in self.seeds.items() if not self.outdated(seed)}

    @property
    def passed(self) -> bool:
        """Whether what has been run, as the case is now, passes."""
        return bool(self.current) and self.case.passes([seed_of(record) for record in self.current.values()])

    @property
    def verdict(self) -> str:
        """pass, FAIL, or why it is neither."""
        count = len(self.current)
        if not count:
            return "settings changed since" if self.seeds else "not run"
        if not self.passed:
            return "**FAIL**"
        return "pass" if count >= len(SEEDS) else f"pass so far, {count} of {len(SEEDS)} seeds"


def seed_of(record: Record) -> Seed:
    return Seed(record.get("final"), record.get("best"), record.get("env_steps") or 0, record["problem"])


def in_words(record: Record) -> str:
    """One run in a line."""
    if record["problem"]:
        return str(record["problem"])
    return f"{_number(record['final'], 1)} @ {record['env_steps']:,} steps, {record['wall_s']:.1f} s"


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(cases: Sequence[CaseResults]) -> list[str]:
    lines = [
        "| case | environment | bar | budget | passes if | return @ steps, seed by seed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for results in cases:
        case, seeds = results.case, results.seeds
        name = f"[{case.name}](#{case.name})" if seeds else case.name
        cells = "; ".join(_cell(case, seeds[seed]) for seed in sorted(seeds, key=int)) or GAP
        rule = RULES[case.rule].words
        lines.append(f"| {name} | {case.env} | {case.bar:g} | {case.steps:,} | {rule} | {cells} | {results.verdict} |")
    return lines


def _cell(case: Case, record: Record) -> str:
    if record["problem"]:
        return "failed"
    note = ""
    if RULES[case.rule].control:
        note = f" (best {_number(record['best'], 1)})"
    elif record["env_steps"] > SLACK * case.steps:
        note = " (over the budget)"
    return f"{_number(record['final'], 1)} @ {record['env_steps'] / 1000:,.0f} k{note}"


def _machines(cases: Sequence[CaseResults]) -> list[str]:
    """Where what was measured, and by which versions."""
    found: dict[str, list[str]] = {}
    for results in cases:
        for seed, record in results.seeds.items():
            versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
            found.setdefault("; ".join(filter(None, (record["machine"], versions))), []).append(
                f"{results.case.name} {seed}"
            )
    if len(found) == 1:
        return [f"Machine: {next(iter(found))}."]
    return [f"- {where}: {', '.join(runs)}" for where, runs in found.items()]


def _section(results: CaseResults) -> str:
    case, seeds = results.case, results.seeds
    lines = [f"## {case.name}", "", f"{results.verdict}: {_demand(case)}", ""]
    lines += ["```", _command(case), "```", ""]
    if any(record.get("curve") for record in seeds.values()):
        lines += [f"![learning curves of {case.name}](results/{case.name}.svg)", ""]
    lines += [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [_row(results, seed) for seed in sorted(seeds, key=int)]
    return "\n".join([*lines, ""])


def _demand(case: Case) -> str:
    beside = f", beside [{case.control_of}](#{case.control_of})" if case.control_of else ""
    return f"bar {case.bar:g} within {case.steps:,} steps on {case.env}, {RULES[case.rule].words}{beside}"


def _command(case: Case) -> str:
    return shlex.join(["ddrl", *case.words(seed=0)]).replace("seed=0", "seed=SEED")


def _row(results: CaseResults, seed: str) -> str:
    record = results.seeds[seed]
    if "wall_s" not in record:
        return f"| {seed} | failed: {record['problem']} |" + " |" * (len(COLUMNS) - 3) + f" {record['date']} |"
    overhead, lag = record["overhead"], record["lag"] or {}
    state = "closed" if record["ledger_closed"] else "**DOES NOT CLOSE**"
    state += f", {record['lost']} lost" if record["lost"] else ""
    state += f", {record['restarts']} restarts" if record["restarts"] else ""
    cells = (
        f"{seed} (other settings)" if results.outdated(seed) else seed,
        _number(record["final"], 1),
        _number(record["best"], 1),
        _number(record["env_steps"]),
        _number(record["wall_s"], 1),
        _number(record["steps_per_s"] or None),
        ", ".join(f"{group} {_percent(share)}" for group, share in sorted(overhead.items()) if group != "evaluator"),
        " / ".join(_number(lag.get(name), 1) for name in ("mean", "p95", "max")),
        state,
        record["date"],
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, digits: int = 0) -> str:
    return GAP if value is None else f"{value:,.{digits}f}"


def _percent(share: float | None) -> str:
    return GAP if share is None else f"{share:.1%}"
