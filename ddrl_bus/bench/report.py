"""What every benchmark says, in one shape: what was measured and how, on which machine, and rows of figures.

A figure keeps the value of each repeat. It is quoted as its median; its spread reaches from the lower to the upper
quartile. A ratio is taken within each repeat, whose two ways met the same moods of the machine.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from ddrl_bus.bench.machine import cores, facts, load_average, versions_of

Better = Literal["less", "more", ""]
NOISY: Final = 0.25
"""Spread of a row's main figure, as a part of its median, above which it is measured again and marked."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a figure counts, which of two is better, and how many digits of it are worth printing."""

    unit: str
    better: Better = "less"
    digits: int = 1


US: Final = Kind("µs")
MS: Final = Kind("ms")
S: Final = Kind("s", digits=2)
RATIO: Final = Kind("×", digits=2)
GAIN: Final = Kind("×", "more", 2)
PER_S: Final = Kind("/s", "more", 0)
MB_PER_S: Final = Kind("MB/s", "more", 0)
BYTES: Final = Kind("B", digits=0)
SHARE: Final = Kind("%")
COUNT: Final = Kind("", "", 0)


@dataclass(frozen=True, slots=True)
class Figure:
    """One value of each repeat, of which there is at least one."""

    kind: Kind
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.values) == 1:
            return self.values[0], self.values[0]
        low, _, high = statistics.quantiles(self.values, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Between the quartiles, as a part of the median."""
        low, high = self.quartiles
        return (high - low) / abs(self.median) if self.median else 0.0

    def __str__(self) -> str:
        return f"{self.median:,.{self.kind.digits}f}"


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one thing. `main` names the one that is plotted, compared and watched for noise."""

    section: str
    name: str
    figures: Mapping[str, Figure] = field(default_factory=dict)
    main: str = ""
    note: str = ""
    """Why there are no figures."""

    @property
    def headline(self) -> Figure | None:
        return self.figures.get(self.main)

    @property
    def noisy(self) -> bool:
        return self.headline is not None and self.headline.spread > NOISY


Repeat = Mapping[str, float]
"""Figure → its value in one repeat."""


def row(
    section: str,
    name: str,
    repeats: Sequence[Repeat],
    kinds: Mapping[str, Kind],
    ratios: Mapping[str, tuple[str, str]] | None = None,
    main: str = "",
) -> Row:
    """The row that these repeats come to.

    Args:
        kinds: the figures to keep, in order.
        ratios: name → (figure, the one that it is divided by); they follow the figures.
        main: default: the first ratio, else the first figure.
    """
    ratios = ratios or {}
    figures = {figure: Figure(kind, tuple(repeat[figure] for repeat in repeats)) for figure, kind in kinds.items()}
    for ratio, (ours, theirs) in ratios.items():
        kind = GAIN if kinds[ours].better == "more" else RATIO
        figures[ratio] = Figure(kind, tuple(repeat[ours] / repeat[theirs] for repeat in repeats))
    return Row(section, name, figures, main or next(iter(ratios), next(iter(kinds))))


def settled(once: Callable[[], Repeat], make: Callable[[Sequence[Repeat]], Row], repeats: int) -> Row:
    """The row of so many repeats, or while it is noisy of up to twice as many."""
    found = [once() for _ in range(repeats)]
    while (result := make(found)).noisy and len(found) < 2 * repeats:
        found.append(once())
    return result


def us_a_call(call: Callable[[], object], seconds: float) -> float:
    """Microseconds a call, of calls for so long."""
    began, calls = time.perf_counter(), 0
    while (now := time.perf_counter()) < began + seconds:
        call()
        calls += 1
    return (now - began) / calls * 1e6


@dataclass(frozen=True)
class About:
    """What a benchmark measures, for people who have never seen this project."""

    bench: str
    title: str
    method: str
    """Paragraphs."""
    reading: str
    """How to read the rows."""
    baseline: str = ""
    """What a ratio of 1 is."""
    spans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name → figures that are drawn as one line, least first."""
    libraries: tuple[str, ...] = ()
    """Distributions and programs that it measures: the report says their versions."""


@dataclass
class Report:
    """One run of a benchmark; `rows` fills as they come."""

    about: About
    command: str = field(default_factory=lambda: shlex.join(["ddrl", *sys.argv[1:]]))
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    machine: Mapping[str, str] = field(default_factory=facts)
    versions: Mapping[str, str] = field(default_factory=versions_of)
    load: tuple[float, float] = field(default_factory=lambda: (load_average(),) * 2)
    """Processes that want a core, mean of a minute, at the start and at the end."""
    rows: list[Row] = field(default_factory=list)

    def filled(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Keep and pass on each row; then the load and the versions are those of the end."""
        for each in rows:
            self.rows.append(each)
            yield each
        self.load, self.versions = (self.load[0], load_average()), versions_of(self.about.libraries)

    @property
    def warnings(self) -> list[str]:
        """Why not to trust it."""
        found = []
        if max(self.load) > cores():
            found.append(
                f"the machine was busy: load {self.load[0]:.1f} before and {self.load[1]:.1f} after, on "
                f"{cores()} cores; trust ratios, if anything"
            )
        if noisy := [each.name for each in self.rows if each.noisy]:
            limit = f"spread by more than {NOISY:.0%} of their median"
            found.append(f"{len(noisy)} of {len(self.rows)} rows {limit}: {'; '.join(noisy)}")
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            **asdict(self.about),
            **{name: getattr(self, name) for name in ("command", "date", "machine", "versions", "load", "warnings")},
            "rows": [_row_as_json(each) for each in self.rows],
        }


def _row_as_json(each: Row) -> dict[str, Any]:
    figures = {
        name: {**asdict(f.kind), "median": f.median, "quartiles": f.quartiles, "values": f.values}
        for name, f in each.figures.items()
    }
    return {"section": each.section, "name": each.name, "main": each.main, "note": each.note, "figures": figures}


# ── as text ──────────────────────────────────────────────────────────────────────────────────────────────────────

_NAME_WIDTH: Final = 50


def as_text(rows: Iterable[Row]) -> Iterator[str]:
    """Tables, a line at a time as the rows come; a new one wherever section or figures change."""
    shape = None
    for each in rows:
        heads = [heading(name, figure) for name, figure in each.figures.items()]
        if heads and shape != (each.section, heads):
            yield from [""] * (shape is not None)
            yield f"{each.section:<{_NAME_WIDTH}}" + "".join(f"{head:>{_width(head)}}" for head in heads)
            shape = each.section, heads
        cells = zip(heads, each.figures.values(), strict=True)
        yield (f"{each.name:<{_NAME_WIDTH}}" + "".join(f"{figure!s:>{_width(head)}}" for head, figure in cells)
               + _remark(each))  # fmt: skip


def heading(name: str, figure: Figure) -> str:
    return f"{name} {figure.kind.unit}".rstrip() if figure.kind.unit != "×" else name


def _width(head: str) -> int:
    return max(len(head), 8) + 2


def _remark(each: Row) -> str:
    if each.headline is None:
        return each.note
    if len(each.headline.values) == 1:
        return ""
    low, high = (f"{value:,.{each.headline.kind.digits}f}" for value in each.headline.quartiles)
    return f"   {each.main} {low} to {high}" + " (noisy)" * each.noisy


def as_csv(report: Report) -> Iterator[list[str]]:
    """A line a figure."""
    yield ["section", "row", "figure", "unit", "better", "median", "lower quartile", "upper quartile", "repeats"]
    for each in report.rows:
        for name, figure in each.figures.items():
            numbers = [f"{value:.6g}" for value in (figure.median, *figure.quartiles)]
            kind = figure.kind
            yield [each.section, each.name, name, kind.unit, kind.better, *numbers, str(len(figure.values))]
