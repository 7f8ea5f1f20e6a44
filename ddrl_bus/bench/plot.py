"""The picture of runs: how they learnt, where their nodes' time went, how old the weights were.

Runs of one name are taken for seeds of one thing. Where all of its seeds have data, a thick line is their mean and a
band reaches from the worst to the best; each seed is a thin line. Colours are Okabe and Ito's, which colour-blind
readers tell apart; in the time split the three kinds of time are three hues.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from ddrl_bus.bench.history import History, mean_of
from ddrl_bus.errors import UsageError
from ddrl_bus.metrics import COMMUNICATION, WAITS, WORK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = Literal["env_steps", "wall_s"]
Groups = Mapping[str, Sequence[History]]
Series = tuple[NDArray[np.float64], NDArray[np.float64]]

SUFFIXES: Final = (".png", ".svg")
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HUES: Final = (
    ("work", WORK, "Blues", 0.85),
    ("communication", COMMUNICATION, "Oranges", 0.85),
    ("waiting", WAITS, "Greys", 0.6),
)
"""Kind of time, its parts, their hue, and the darkest shade of it."""
X_LABELS: Final[Mapping[X, str]] = {"env_steps": "environment steps", "wall_s": "seconds from the command"}


def plot(histories: Sequence[History], path: Path, x: X = "env_steps") -> None:
    """Draw everything about `histories` into one picture.

    Raises:
        UsageError: there is nothing to draw, `path` is no PNG or SVG that can be written, or matplotlib is missing.
    """
    writable(path)
    if not any(history.evaluations or history.lags or history.time_split for history in histories):
        raise UsageError("nothing to draw: no run has an evaluation, an update or a time split yet")
    groups = grouped(histories)
    bars = len(_bars(groups))
    height = max(6.5, 3.8 + 0.3 * bars)
    figure = new_figure(13, height)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1), height_ratios=(height - 3, 3))
    learning_curves(figure.add_subplot(grid[:, 0]), groups, x)
    upper, lower = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    time_split(upper, groups)
    lags(lower, groups, x)
    save(figure, path)


def writable(path: Path) -> None:
    """Refuse what cannot become a picture, before any work.

    Raises:
        UsageError: it says what was expected.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: expected a file that ends in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("drawing needs matplotlib: pip install 'ddrl-bus[plot]'") from None


def grouped(histories: Sequence[History]) -> dict[str, list[History]]:
    """By name, in the order given."""
    groups: dict[str, list[History]] = defaultdict(list)
    for history in histories:
        groups[history.name].append(history)
    return dict(groups)


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of so many inches, without any window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write it as its suffix says; the same picture gives the same bytes.

    Raises:
        UsageError: the file cannot be written.
    """
    import matplotlib

    try:
        with matplotlib.rc_context({"svg.hashsalt": "ddrl_bus", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────


def learning_curves(axes: Axes, groups: Groups, x: X = "env_steps", bar: float | None = None) -> None:
    """Evaluation return over steps or time; a dot is a confirmation on fresh seeds."""

    def series(history: History) -> Series:
        return _series(history.evaluations, x, "mean_return")

    dots: Any = None
    for (name, histories), colour in zip(groups.items(), _colours(groups), strict=True):
        _over_seeds(axes, [series(history) for history in histories], colour, f"{name} ({_seeds(histories)})")
        confirmations = [e for history in histories for e in history.evaluations if e.confirmation]
        if confirmations:
            (dots,) = axes.plot(*_series(confirmations, x, "mean_return"), "o", color=colour, markersize=5)
    _dress(axes, "evaluation return: mean, and worst to best seed" if _several(groups) else "evaluation return", x)
    if bar is not None:
        axes.axhline(bar, color="black", linestyle="--", linewidth=0.9, label=f"bar: {bar:g}")
    handles, labels = axes.get_legend_handles_labels()
    if dots is not None:
        handles, labels = [*handles, _dot()], [*labels, "confirmation on fresh seeds"]
    if any(history.evaluations for histories in groups.values() for history in histories):
        axes.legend(handles, labels, loc="best", fontsize="small", framealpha=0.85)
    else:
        _say(axes, "no evaluation in these runs")


def _dot() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="0.35", marker="o", linestyle="none", markersize=5)


def _seeds(histories: Sequence[History]) -> str:
    return f"seed {histories[0].seed}" if len(histories) == 1 else f"{len(histories)} seeds"


def _series(points: Sequence[Any], x: X, y: str) -> Series:
    """x and y of points, in order of x."""
    ordered = sorted(points, key=lambda point: float(getattr(point, x)))
    return np.array([getattr(p, x) for p in ordered], float), np.array([getattr(p, y) for p in ordered], float)


def _over_seeds(axes: Axes, seeds: Sequence[Series], colour: str, label: str) -> None:
    """A thin line a seed, and mean and range over what all of them cover. One seed is its own mean."""
    seeds = [seed for seed in seeds if len(seed[0])]
    if len(seeds) == 1:
        axes.plot(*seeds[0], color=colour, linewidth=1.8, marker=_marker(seeds[0]), markersize=3, label=label)
        return
    for seed in seeds:
        axes.plot(*seed, color=colour, linewidth=0.8, alpha=0.45)
    if seeds:
        at, values = common(seeds)
        axes.plot(at, values.mean(axis=0), color=colour, linewidth=2.2, label=label)
        axes.fill_between(at, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def common(seeds: Sequence[Series], points: int = 200) -> Series:
    """Positions [P] that all of `seeds` cover, and their values there [seeds, P], interpolated; P may be 0."""
    start, end = max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds)
    at = np.linspace(start, end, points) if end >= start else np.zeros(0)
    return at, np.stack([np.interp(at, x, y) for x, y in seeds])


def _marker(series: Series) -> str:
    """A few points are shown as such."""
    return "o" if len(series[0]) <= 3 else ""


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def time_split(axes: Axes, groups: Groups) -> None:
    """A bar per group of nodes: its time as parts of a whole, the mean over its nodes and runs."""
    bars = _bars(groups)
    colours = _part_colours({part for bar in bars.values() for part in bar})
    left = np.zeros(len(bars))
    for part, colour in colours.items():
        width = np.array([100 * bar.get(part, 0.0) for bar in bars.values()])
        axes.barh(list(bars), width, left=left, color=colour, edgecolor="white", linewidth=0.4, label=part)
        left += width
    axes.set_title("where the time of a node goes, %", fontsize="medium", loc="left")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if bars:
        _legend_by_kind(axes, colours)
    else:
        _say(axes, "no run is over yet")


def _bars(groups: Groups) -> dict[str, dict[str, float]]:
    """Label → part → share of the time."""
    found: dict[str, dict[str, float]] = {}
    for name, histories in groups.items():
        for group in dict.fromkeys(group for history in histories for group in sorted(history.time_split)):
            label = group if len(groups) == 1 else f"{name}: {group}"
            found[label] = mean_of([history.time_split[group] for history in histories if group in history.time_split])
    return found


def _part_colours(parts: set[str]) -> dict[str, Any]:
    """Part → colour, in the order of the bar: one hue for each kind of time, dark to light."""
    import matplotlib

    colours: dict[str, Any] = {}
    for _, names, hue, darkest in HUES:
        shown = [name for name in names if name in parts]
        shades = np.linspace(darkest, 0.25, len(shown))
        colours |= dict(zip(shown, map(matplotlib.colormaps[hue], shades), strict=True))
    return colours


def _legend_by_kind(axes: Axes, colours: Mapping[str, Any]) -> None:
    """Under the bars, a column for each kind of time."""
    from matplotlib.patches import Patch

    columns = [
        [(kind, Patch(visible=False)), *((name, Patch(color=colours[name])) for name in names if name in colours)]
        for kind, names, *_ in HUES
    ]
    rows = max(map(len, columns))
    entries = [entry for column in columns for entry in column + [("", Patch(visible=False))] * (rows - len(column))]
    legend = axes.legend(
        [patch for _, patch in entries],
        [label for label, _ in entries],
        ncols=len(columns),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.08),
        fontsize="small",
        frameon=False,
        handlelength=1.2,
    )
    for text, (label, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_fontweight("bold" if label in {kind for kind, *_ in HUES} else "normal")


# ── lag ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def lags(axes: Axes, groups: Groups, x: X = "env_steps") -> None:
    """How many updates the learner was ahead of the weights that its rows were played with, the mean over seeds."""
    for (_, histories), colour in zip(groups.items(), _colours(groups), strict=True):
        seeds = {name: [_series(h.lags, x, name) for h in histories if h.lags] for name in ("mean", "p95", "max")}
        if seeds["mean"]:
            at, mean = _mean(seeds["mean"])
            axes.plot(at, mean, color=colour, linewidth=1.8, marker=_marker((at, mean)), markersize=3)
            axes.plot(*_mean(seeds["p95"]), "--", color=colour, linewidth=1.2)
            axes.fill_between(at, mean, _mean(seeds["max"])[1], color=colour, alpha=0.13, linewidth=0)
    _dress(axes, "policy lag in updates" + (", mean over seeds" if _several(groups) else ""), x)
    axes.set_ylim(bottom=0)
    if any(history.lags for histories in groups.values() for history in histories):
        axes.legend(handles=_lag_keys(), ncols=3, loc="best", fontsize="small", framealpha=0.85)
    else:
        _say(axes, "no update in these runs")


def _lag_keys() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    return [
        Line2D([], [], color="0.35", linestyle="-", label="mean"),
        Line2D([], [], color="0.35", linestyle="--", label="p95"),
        Patch(color="0.35", alpha=0.2, label="up to the maximum"),
    ]


def _mean(seeds: Sequence[Series], points: int = 200) -> Series:
    """The mean at each position over the seeds that cover it; a single seed as it is."""
    if len(seeds) == 1:
        return seeds[0]
    at = np.linspace(min(x[0] for x, _ in seeds), max(x[-1] for x, _ in seeds), points)
    values = np.stack([np.interp(at, x, y, left=np.nan, right=np.nan) for x, y in seeds])
    covered = ~np.isnan(values).all(axis=0)
    return at[covered], np.nanmean(values[:, covered], axis=0)


# ── what all of them share ───────────────────────────────────────────────────────────────────────────────────────


def _colours(groups: Groups) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(len(groups))]


def _several(groups: Groups) -> bool:
    return any(len(histories) > 1 for histories in groups.values())


def _dress(axes: Axes, title: str, x: X) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, fontsize="medium", loc="left")
    axes.set_xlabel(X_LABELS[x])
    axes.set_xlim(left=0)
    if x == "env_steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _say(axes: Axes, words: str) -> None:
    """In place of what is not there."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="0.4")
