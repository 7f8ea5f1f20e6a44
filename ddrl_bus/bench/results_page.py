"""docs/results.md: what bench/results.py measured, as a page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ddrl_bus.bench.cases import RULES, SEEDS, SLACK, Case, Seed

Record = Mapping[str, Any]
Records = Mapping[str, Mapping[str, Record]]
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
`bin/results --only-write` makes this page from docs/results.json.
"""


def page(cases: Sequence[Case], records: Records) -> str:
    sections = [_section(case, records[case.name]) for case in cases if records.get(case.name)]
    return "\n".join([INTRODUCTION, *_summary(cases, records), "", *_machines(cases, records), "", *sections])


# ── verdicts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def outdated(case: Case, seed: str, record: Record) -> bool:
    """Whether it was measured by another command, or of another topology, than the case says now."""
    command = shlex.join(["ddrl", *case.words(int(seed))])
    return record["command"] != command or record.get("topology") != case.digest(int(seed))


def passed(case: Case, seeds: Mapping[str, Record]) -> bool:
    """Whether what has been run, by the case's present command, passes."""
    current = _current(case, seeds)
    return bool(current) and case.passes([seed_of(record) for record in current])


def _current(case: Case, seeds: Mapping[str, Record]) -> list[Record]:
    return [record for seed, record in seeds.items() if not outdated(case, seed, record)]


def verdict(case: Case, seeds: Mapping[str, Record]) -> str:
    """pass, FAIL, or why it is neither."""
    count = len(_current(case, seeds))
    if not count:
        return "settings changed since" if seeds else "not run"
    if not passed(case, seeds):
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


def _summary(cases: Sequence[Case], records: Records) -> list[str]:
    lines = [
        "| case | environment | bar | budget | passes if | return @ steps, seed by seed | |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        seeds = records.get(case.name, {})
        name = f"[{case.name}](#{case.name})" if seeds else case.name
        cells = "; ".join(_cell(case, seeds[seed]) for seed in sorted(seeds, key=int)) or GAP
        rule = RULES[case.rule].words
        lines.append(
            f"| {name} | {case.env} | {case.bar:g} | {case.steps:,} | {rule} | {cells} | {verdict(case, seeds)} |"
        )
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


def _machines(cases: Sequence[Case], records: Records) -> list[str]:
    """Where what was measured, and by which versions."""
    found: dict[str, list[str]] = {}
    for case in cases:
        for seed, record in records.get(case.name, {}).items():
            versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
            found.setdefault("; ".join(filter(None, (record["machine"], versions))), []).append(f"{case.name} {seed}")
    if len(found) == 1:
        return [f"Machine: {next(iter(found))}."]
    return [f"- {where}: {', '.join(runs)}" for where, runs in found.items()]


def _section(case: Case, seeds: Mapping[str, Record]) -> str:
    lines = [f"## {case.name}", "", f"{verdict(case, seeds)}: {_demand(case)}", ""]
    lines += ["```", _command(case), "```", ""]
    if any(record.get("curve") for record in seeds.values()):
        lines += [f"![learning curves of {case.name}](results/{case.name}.svg)", ""]
    lines += [
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    lines += [_row(case, seed, seeds[seed]) for seed in sorted(seeds, key=int)]
    return "\n".join([*lines, ""])


def _demand(case: Case) -> str:
    beside = f", beside [{case.control_of}](#{case.control_of})" if case.control_of else ""
    return f"bar {case.bar:g} within {case.steps:,} steps on {case.env}, {RULES[case.rule].words}{beside}"


def _command(case: Case) -> str:
    return shlex.join(["ddrl", *case.words(seed=0)]).replace("seed=0", "seed=SEED")


def _row(case: Case, seed: str, record: Record) -> str:
    if "wall_s" not in record:
        return f"| {seed} | failed: {record['problem']} |" + " |" * (len(COLUMNS) - 3) + f" {record['date']} |"
    overhead, lag = record["overhead"], record["lag"] or {}
    state = "closed" if record["ledger_closed"] else "**DOES NOT CLOSE**"
    state += f", {record['lost']} lost" if record["lost"] else ""
    state += f", {record['restarts']} restarts" if record["restarts"] else ""
    cells = (
        f"{seed} (other settings)" if outdated(case, seed, record) else seed,
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
