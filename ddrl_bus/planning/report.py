"""Predictions for people: a table, a sweep over one setting, and its picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ddrl_bus.bench import plot
from ddrl_bus.errors import UsageError
from ddrl_bus.launch.start import plan_of
from ddrl_bus.planning import calibrate, check
from ddrl_bus.planning.costs import Costs
from ddrl_bus.planning.places import Setting
from ddrl_bus.planning.predict import Prediction, as_json, predict
from ddrl_bus.topology.plan import Plan

STEPS: Final = (1, 2, 5)
"""Of each power of ten, what a range is sampled at."""
SAME_COSTS: Final = re.compile(r"(nodes\..+\.(envs|host)|algo\.batch|links\..+|hosts\..+)")
"""Settings that change sizes which costs are interpolated for, or nothing that costs depend on."""


class Asked:
    """A topology with changes, and where it is to run.

    Args:
        overrides: KEY=VALUE, as everywhere.
        sets: GROUP.FIELD=VALUE; a count may be beyond what a topology file allows, and bundles follow it.
    Raises:
        UsageError: one of them is none, or does not fit the topology.
    """

    def __init__(
        self, topology: str, overrides: Sequence[str], sets: Sequence[str], setting: Setting, calibrate: bool = False
    ) -> None:
        self.topology, self.overrides, self.setting = topology, list(overrides), setting
        self._known: Costs | None = None
        self._calibrate = calibrate
        for word in sets:
            self._set(*_split(word))
        self.plan = self._plan()

    def _set(self, key: str, value: str) -> None:
        if key.endswith(".count"):
            counts = {**self.setting.counts, key.removesuffix(".count"): _count(key, value)}
            self.setting = replace(self.setting, counts=counts)
        else:
            self.overrides.append(f"nodes.{key}={value}")

    def _plan(self) -> Plan:
        return plan_of(self.topology, self.overrides, probe=False, starts=False)

    def costs(self) -> Costs:
        """Of its parts; measured once, if at all."""
        if self._known is None:
            self._known = calibrate.of(self.plan, calibrate=self._calibrate)
        return self._known

    def predict(self) -> Prediction:
        return predict(self.plan, self.costs(), self.setting)

    def sweep(self, word: str) -> Iterator[tuple[int, Prediction]]:
        """A prediction for each value of KEY=FROM..TO or KEY=N,N,…; KEY is GROUP.FIELD or a topology's."""
        key, text = _split(word)
        values = _values(key, text)
        counted = re.fullmatch(r"(nodes\.)?(\w+)\.count", key)
        full = key if counted or key.split(".")[0] in ("nodes", "algo", "links", "env") else f"nodes.{key}"
        for value in values:
            each = Asked(self.topology, self.overrides, (), self.setting)
            if counted:
                each._set(f"{counted[2]}.count", str(value))
            else:
                each.overrides.append(f"{full}={value}")
                each.plan = each._plan()
            if counted or SAME_COSTS.fullmatch(full):
                each._known = self.costs()
            yield value, each.predict()


class Answer:
    """What was asked for, as lines or as plain data; one of the two, once."""

    def __init__(self, asked: Asked, sweep: str | None, output: Path | None, run: Path | None) -> None:
        self._asked, self._sweep, self._output, self._run = asked, sweep, output, run

    def lines(self) -> Iterator[str]:
        if self._run is not None:
            yield from check.compared(as_json(self._asked.predict()), check.measured(self._run))
        elif self._sweep is not None:
            yield from sweep_as_text(self._sweep.partition("=")[0], self._rows())
        else:
            yield from as_text(self._asked.predict(), self._asked.costs())

    def data(self) -> Any:
        if self._sweep is not None:
            return [{"value": value, **as_json(found)} for value, found in self._rows()]
        predicted = as_json(self._asked.predict())
        return predicted if self._run is None else {"predicted": predicted, "measured": check.measured(self._run)}

    def _rows(self) -> Iterator[tuple[int, Prediction]]:
        """Of the sweep, whose picture is drawn once it is over."""
        assert self._sweep is not None
        rows = []
        for row in self._asked.sweep(self._sweep):
            rows.append(row)
            yield row
        if self._output is not None:
            draw(self._sweep.partition("=")[0], rows, self._output)


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", key):
        raise UsageError(f"got {word!r}, expected GROUP.FIELD=VALUE such as actor.count=8")
    return key, value


def _count(key: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise UsageError(f"{key}: got {text!r}, expected a whole number of at least 1")
    return int(text)


def _values(key: str, text: str) -> list[int]:
    first, dots, last = text.partition("..")
    if not dots:
        return [_count(key, word) for word in text.split(",")]
    low, high = _count(key, first), _count(key, last)
    if low > high:
        raise UsageError(f"{key}: got {text}, expected the smaller number first")
    inside = {step * 10**power for power in range(8) for step in STEPS if low < step * 10**power < high}
    return sorted(inside | {low, high})


# ---- text


def as_text(prediction: Prediction, known: Costs) -> Iterator[str]:
    """What a topology will do, a line for each figure."""
    age = "as old as what the replay draws" if prediction.staleness is None else f"{prediction.staleness:.1f} versions"
    yield f"{prediction.name}, {prediction.actors:,} actors; costs of {known.machine}, measured {known.measured}"
    yield f"  env steps       {prediction.env_steps_per_s:>14,.0f} /s"
    yield f"  updates         {prediction.updates_per_s:>14,.1f} /s"
    yield f"  learner idle    {prediction.learner_idle:>14.0%}"
    yield f"  staleness       {age:>14}"
    for link, size in prediction.bytes_per_s.items():
        yield f"  {link:<16}{_bytes(size):>14} /s"
    for host, size in prediction.memory.items():
        yield f"  memory, {host:<8}{_bytes(size):>14}"
    yield f"  bottleneck: {prediction.bottleneck}"


def sweep_as_text(key: str, rows: Iterator[tuple[int, Prediction]]) -> Iterator[str]:
    """A table, a line at a time as it is predicted."""
    head = f"{key:>14}{'env steps/s':>14}{'updates/s':>12}{'idle':>7}{'stale':>9}"
    yield f"{head}{'bytes/s':>12}{'memory':>12}  bottleneck"
    for value, found in rows:
        age = "-" if found.staleness is None else f"{found.staleness:,.1f}"
        size, memory = _bytes(sum(found.bytes_per_s.values())), _bytes(max(found.memory.values()))
        figures = f"{found.env_steps_per_s:>14,.0f}{found.updates_per_s:>12,.1f}{found.learner_idle:>7.0%}{age:>9}"
        yield f"{value:>14,}{figures}{size:>12}{memory:>12}  {found.bottleneck}"


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


# ---- picture


def draw(key: str, rows: Sequence[tuple[int, Prediction]], path: Path) -> None:
    """Rates, and what is busy, over the values of a setting.

    Raises:
        UsageError: `path` is no PNG or SVG that can be written, or matplotlib is missing.
    """
    plot.writable(path)
    figure: Any = plot.new_figure(11, 4)
    rates, shares = figure.subplots(1, 2)
    at = [value for value, _ in rows]
    _line(rates, at, rows, lambda found: found.env_steps_per_s, plot.COLOURS[0], "env steps/s")
    _line(shares, at, rows, lambda found: found.learner_idle, plot.COLOURS[1], "learner idle")
    _line(shares, at, rows, lambda found: _cores(found.load), plot.COLOURS[2], "cores busy, fullest host")
    rates.set_yscale("log")
    shares.set_ylim(0, 1.02)
    for axes, title in ((rates, f"{rows[0][1].name}: predicted env steps/s"), (shares, "share of the time")):
        axes.set_xscale("log")
        axes.set_xlabel(key)
        axes.set_title(title, fontsize="medium", loc="left")
        axes.grid(color="0.9", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    shares.legend(fontsize="small")
    plot.save(figure, path)


def _line(
    axes: Any,
    at: Sequence[int],
    rows: Sequence[tuple[int, Prediction]],
    value: Callable[[Prediction], float],
    colour: str,
    label: str,
) -> None:
    axes.plot(at, [value(found) for _, found in rows], "o-", color=colour, markersize=3, linewidth=1.5, label=label)


def _cores(load: Mapping[str, float]) -> float:
    return max(share for name, share in load.items() if name.startswith("cores"))
