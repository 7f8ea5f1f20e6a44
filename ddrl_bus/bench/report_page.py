"""A report as one HTML page that needs nothing else: what was measured, how to read it, bars, tables.

A bar is a row's main figure with its quartiles. Where that is a ratio, bars begin at 1, which is what it is measured
against, on a scale that grows by powers: twice and half are equally far. Figures that belong together (percentiles)
are dots on one line, on such a scale too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Final

from ddrl_bus.bench.report import Report, Row, heading

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } code { background: #f2f4f6; padding: .1em .3em }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #dde2e7; text-align: right; white-space: nowrap }
th:first-child, td:first-child, .facts td { text-align: left } th { border-bottom: 2px solid #9aa5b1; font-weight: 600 }
.main { font-weight: 600 } .quiet { color: #5d6b79 } .warning { background: #fff3d6; padding: .6rem .8rem }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #1b1f24 }
"""
_PROJECT: Final = "A benchmark of ddrl_bus: distributed deep reinforcement learning as a message bus on ZeroMQ."
_BETTER_IS: Final = {"less": ", less is better", "more": ", more is better", "": ""}
_WORSE, _BETTER, _PLAIN = "#D55E00", "#009E73", "#0072B2"  # Okabe and Ito's
_COLOURS: Final = (_PLAIN, "#E69F00", "#009E73", "#CC79A7")
_LEFT, _WIDTH, _LINE, _ROOM = 330, 520, 22, 90


def page(report: Report) -> str:
    about = report.about
    sections = [(name, list(rows)) for name, rows in groupby(report.rows, key=lambda each: each.section)]
    facts = {**report.machine, "load before, after": "{:.1f}, {:.1f}".format(*report.load), **report.versions}
    parts = [
        f"<h1>{escape(about.title)}</h1>",
        f"<p class=quiet>{_PROJECT}</p>",
        f"<p class=quiet>{escape(report.date)} · <code>{escape(report.command)}</code></p>",
        *(f"<p class=warning>{escape(warning)}</p>" for warning in report.warnings),
        "<h2>What was measured</h2>",
        *_prose(about.method),
        "<h2>How to read it</h2>",
        *_prose(f"{about.reading}\n\n{_general(report)}"),
        *(text for name, rows in sections for text in _section(report, name, rows)),
        "<h2>Machine and versions</h2>",
        f"<div class=facts>{_table([], [[escape(name), escape(value)] for name, value in facts.items()])}</div>",
    ]
    head = f"<meta charset=utf-8><title>{escape(about.title)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _prose(paragraphs: str) -> Iterator[str]:
    for paragraph in paragraphs.split("\n\n"):
        yield "<p>" + re.sub("`(.+?)`", r"<code>\1</code>", escape(paragraph)) + "</p>"


def _general(report: Report) -> str:
    repeats = {len(each.headline.values) for each in report.rows if each.headline is not None} or {0}
    times = " to ".join(map(str, sorted({min(repeats), max(repeats)})))
    words = (
        f"Figures are medians of {times} repeats: more where they differ much. The thin line on each bar reaches from "
        "the lower to the upper quartile of the repeats: two bars whose lines overlap may well be equal."
    )
    if report.about.baseline:
        words += (
            f" Bars of ratios begin at 1, which is {report.about.baseline}: green is better than that, orange worse."
        )
    return words


def _section(report: Report, name: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"<h2>{escape(name)}</h2>"
    if shown := [each for each in rows if each.headline is not None]:
        main, first = shown[0].main, shown[0].figures[shown[0].main]
        yield f"<p class=quiet>Bars: {escape(heading(main, first))}{_BETTER_IS[first.kind.better]}.</p>"
        yield bars(shown, report.about.baseline)
        spans = {label: names for label, names in report.about.spans.items() if set(names) <= shown[0].figures.keys()}
        if spans:
            yield percentiles(shown, spans)
    heads = list(dict.fromkeys(heading(*item) for each in rows for item in each.figures.items()))
    yield _table(["", *map(escape, heads), "quartiles", ""], [_cells(each, heads) for each in rows])


def _cells(each: Row, heads: Sequence[str]) -> list[str]:
    values = {heading(name, f): f"<span class=main>{f}</span>" if name == each.main else str(f)
              for name, f in each.figures.items()}  # fmt: skip
    spread = ""
    if each.headline is not None and len(each.headline.values) > 1:
        spread = " to ".join(f"{value:,.{each.headline.kind.digits}f}" for value in each.headline.quartiles)
    remark = "noisy" if each.noisy else each.note
    return [escape(each.name), *(values.get(head, "") for head in heads), spread, escape(remark)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n" for cells in rows)
    return f"<table>{head}\n{body}</table>"


# ── plots ────────────────────────────────────────────────────────────────────────────────────────────────────────


def bars(rows: Sequence[Row], baseline: str) -> str:
    """A bar for each row's main figure."""
    figures = [each.headline for each in rows if each.headline is not None]
    is_ratio = figures[0].kind.unit == "×" and bool(baseline)
    ends = [end for figure in figures for end in figure.quartiles]
    x, ticks = _ratios(min(ends), max(ends)) if is_ratio else (_linear(max(ends)), [])
    height, start = len(rows) * _LINE + 4, x(1) if is_ratio else _LEFT
    parts = [f'<path d="M{x(tick):.1f} 0V{height}" stroke="#dde2e7"/>' for tick in ticks]
    parts += [_text(x(tick), height + 14, f"{tick:g}", "middle") for tick in ticks]
    for line, (each, figure) in enumerate(zip(rows, figures, strict=True)):
        y, at, (low, high) = line * _LINE + 4, x(figure.median), map(x, figure.quartiles)
        better = figure.median >= 1 if figure.kind.better == "more" else figure.median <= 1
        colour = (_BETTER if better else _WORSE) if is_ratio else _PLAIN
        parts += [
            _text(_LEFT - 8, y + 12, each.name, "end"),
            f'<rect x="{min(start, at):.1f}" y="{y}" width="{abs(at - start):.1f}" height="16" fill="{colour}" '
            'fill-opacity=".75"/>',
            f'<path d="M{low:.1f} {y + 8}H{high:.1f}" stroke="#1b1f24"/>' if low < high else "",
            _text(max(start, at, high) + 6, y + 12, f"{figure} {figure.kind.unit}"),
        ]
    if is_ratio:
        parts.append(f'<path d="M{start:.1f} 0V{height}" stroke="#1b1f24" stroke-dasharray="4 3"/>')
        parts.append(_text(start, height + 30, f"1 = {baseline}", "middle"))
    return _svg(parts, height + 36, f"{rows[0].main} of each row")


def percentiles(rows: Sequence[Row], spans: Mapping[str, tuple[str, ...]]) -> str:
    """For each row a line for each of `spans`, a dot for each of its figures, on a logarithmic scale."""
    values = [each.figures[name].median for each in rows for names in spans.values() for name in names]
    x, ticks = _logarithmic(min(values), max(values))
    step, height = _LINE + 8, len(rows) * (_LINE + 8) + 4
    parts = [f'<path d="M{x(tick):.1f} 0V{height}" stroke="#dde2e7"/>' for tick in ticks]
    parts += [_text(x(tick), height + 14, f"{tick:,.6g}", "middle") for tick in ticks]
    for line, each in enumerate(rows):
        parts.append(_text(_LEFT - 8, line * step + 17, each.name, "end"))
        for place, (names, colour) in enumerate(zip(spans.values(), _COLOURS, strict=False)):
            parts += _dots([x(each.figures[name].median) for name in names], line * step + 9 + 9 * place, colour)
    for place, (label, colour) in enumerate(zip(spans, _COLOURS, strict=False)):
        parts += _dots([_LEFT + 160 * place], height + 32, colour)
        parts.append(_text(_LEFT + 160 * place + 10, height + 36, label))
    first = next(iter(spans.values()))
    unit, words = rows[0].figures[first[0]].kind.unit, ", ".join(name.split()[-1] for name in first)
    caption = f"Dots from left to right: {words}, in {unit}."
    return _svg(parts, height + 44, caption) + f"<p class=quiet>{escape(caption)}</p>"


def _dots(at: Sequence[float], y: float, colour: str) -> Iterator[str]:
    """The first is the largest."""
    yield f'<path d="M{at[0]:.1f} {y}H{at[-1]:.1f}" stroke="{colour}" stroke-width="2"/>'
    for place, x in enumerate(at):
        yield f'<circle cx="{x:.1f}" cy="{y}" r="{max(2, 5 - place)}" fill="{colour}"/>'


def _linear(most: float) -> Callable[[float], float]:
    return lambda value: _LEFT + _WIDTH * value / (most or 1)


def _ratios(least: float, most: float) -> tuple[Callable[[float], float], list[float]]:
    """As `_logarithmic`, for ratios: from somewhat below the least, or 1/2, to somewhat above the most, or 2."""
    low, high = math.log10(min(max(least, 1e-9) / 1.1, 0.5)), math.log10(max(most * 1.1, 2))
    grid = (digit * 10.0**power for power in range(math.floor(low), math.ceil(high)) for digit in (1, 2, 5))
    ticks = [tick for tick in grid if low <= math.log10(tick) <= high]
    return lambda value: _LEFT + _WIDTH * (math.log10(max(value, 1e-9)) - low) / (high - low), ticks


def _logarithmic(least: float, most: float) -> tuple[Callable[[float], float], list[float]]:
    """Where a value is, and what to write on the axis."""
    low, high = math.floor(math.log10(max(least, 1e-9))), math.ceil(math.log10(max(most, 1e-9)))
    high = max(high, low + 1)
    ticks = [float(10**power) for power in range(low, high + 1)]
    return lambda value: _LEFT + _WIDTH * (math.log10(max(value, 1e-9)) - low) / (high - low), ticks


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    width = _LEFT + _WIDTH + _ROOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )
