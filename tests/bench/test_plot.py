from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from ddrl_bus.bench import history, plot
from ddrl_bus.bench.history import Evaluated, History, Lag
from ddrl_bus.cli import ddrl
from ddrl_bus.errors import UsageError
from ddrl_bus.metrics import WAITS


def made(name: str = "impala", seed: int = 1, returns: Sequence[tuple[int, float]] = ((0, 20), (100, 60))) -> History:
    evaluations = [Evaluated(steps, steps / 10, mean, confirmation=False) for steps, mean in returns]
    lags = [Lag(steps, steps / 10, 1.0, 2.0, 3.0) for steps, _ in returns]
    return History(name, seed, evaluations, lags, {"actor": {"env": 0.75, "send_wait": 0.25}})


def drawn(draw: Any, histories: Sequence[History]) -> Any:
    axes = plot.new_figure(6, 4).add_subplot()
    draw(axes, plot.grouped(histories))
    return axes


@pytest.fixture
def copy(recorded: Any, tmp_path: Path) -> Path:
    """Of a real run, to damage."""
    return Path(shutil.copytree(recorded.folder, tmp_path / "copy"))


# ── a real run ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_real_run_tells(recorded: Any) -> None:
    seen = history.read(recorded.folder)
    assert (seen.name, seen.seed, seen.notes) == ("tiny", 1, [])
    assert len(set(seen.evaluations)) == len(seen.evaluations) >= 2
    assert seen.evaluations[-1].confirmation, "the last evaluation of a run is the one that was asked for"
    assert seen.evaluations[-1].env_steps == 20_480  # whole batches
    assert [e.env_steps for e in seen.evaluations] == sorted(e.env_steps for e in seen.evaluations)
    assert all(0 <= lag.mean <= lag.p95 <= lag.max for lag in seen.lags)
    assert seen.lags
    assert seen.time_split.keys() == {"actor", "learner", "evaluator"}
    for parts in seen.time_split.values():
        assert sum(parts.values()) == pytest.approx(1.0)
    assert seen.time_split["actor"]["env"] > 0


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_the_picture_of_a_real_run(recorded: Any, tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"out{suffix}"
    result = CliRunner().invoke(ddrl, ["plot", str(recorded.folder), "-o", str(path)])
    assert (result.exit_code, result.stdout) == (0, f"{path}\n"), result.output
    picture = path.read_bytes()
    assert picture.startswith(magic)
    assert len(picture) > 5_000
    if suffix == ".svg":
        for words in (b"tiny (seed 1)", b"environment steps", b"queue_wait", b"up to the maximum"):
            assert words in picture


def test_the_same_runs_give_the_same_svg(recorded: Any, tmp_path: Path) -> None:
    seen = history.read(recorded.folder)
    for name in ("a.svg", "b.svg"):
        plot.plot([seen], tmp_path / name, "wall_s")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


# ── which runs ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_or_folder_stands_for_all_runs_below(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recorded.root)
    for words in (["tiny"], ["runs/tiny"], ["runs"], [str(recorded.folder)], ["tiny", "runs/tiny/latest"], []):
        assert [path.resolve() for path in history.runs_of(words)] == [recorded.folder], words


def test_an_unknown_run_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(ddrl, ["plot", "nothing"])
    assert result.exit_code == 64
    assert "no run in 'nothing': expected a run directory, a folder of runs, or a name under runs/" in result.stderr


def test_damaged_lines_are_named_and_left_out(copy: Path) -> None:
    metrics = copy / "metrics.jsonl"
    whole = history.read(copy)
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(
        "".join([*lines, '{"time": 1, "env_st\n', "[1]\n", '{"env_steps": null, "wall_s": 1, "nodes": {}}'])
    )
    seen = history.read(copy)
    assert seen.notes == [f"{metrics}:{len(lines) + n}: damaged line, left out" for n in (1, 2, 3)]
    assert (seen.evaluations, seen.lags) == (whole.evaluations, whole.lags)


def test_an_evaluation_that_is_told_again_counts_once(copy: Path) -> None:
    whole = history.read(copy)
    metrics = copy / "metrics.jsonl"
    metrics.write_text(2 * metrics.read_text())
    assert history.read(copy).evaluations == whole.evaluations


def test_a_run_without_evaluations_says_so(copy: Path, tmp_path: Path) -> None:
    metrics = copy / "metrics.jsonl"
    records = [json.loads(line) | {"evaluation": None} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    (copy / "closing.json").unlink()
    result = CliRunner().invoke(ddrl, ["plot", str(copy), "-o", str(tmp_path / "out.svg")])
    assert result.exit_code == 0
    assert f"{copy}: no evaluation in metrics.jsonl\n" in result.stderr
    assert f"{copy}: no time split: closing.json is written when a run is over\n" in result.stderr
    assert "no evaluation in these runs" in (tmp_path / "out.svg").read_text()
    metrics.unlink()
    result = CliRunner().invoke(ddrl, ["plot", str(copy), "-o", str(tmp_path / "none.svg")])
    assert result.exit_code == 64
    assert "metrics.jsonl: No such file or directory" in result.stderr
    assert "nothing to draw" in result.stderr


def test_a_run_directory_that_does_not_say_whose_it_is(copy: Path) -> None:
    (copy / "meta.json").write_text("{")
    with pytest.raises(UsageError, match=r"copy: meta\.json is missing or damaged"):
        history.read(copy)


@pytest.mark.parametrize(
    ("name", "words"),
    [("out.pdf", "ends in .png or .svg"), ("no/out.png", "no folder no"), ("d.png", "Is a directory")],
)
def test_a_file_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.png").mkdir()
    with pytest.raises(UsageError, match=words):
        plot.plot([made()], Path(name))


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'ddrl-bus\[plot\]'"):
        plot.plot([made()], tmp_path / "out.png")


# ── what is drawn ────────────────────────────────────────────────────────────────────────────────────────────────


def test_curves_of_seeds_their_mean_and_range() -> None:
    seeds = [made(seed=1), made(seed=2, returns=[(0, 40), (200, 240)]), made("seed", 1)]
    axes = drawn(plot.learning_curves, seeds)
    thin, others = [[line for line in axes.lines if (line.get_alpha() is not None) == faint] for faint in (True, False)]
    assert len(thin) == 2, "a group of one seed has no thin lines"
    assert [line.get_label() for line in others] == ["impala (2 seeds)", "seed (seed 1)"]
    at, mean = others[0].get_data()
    assert (at[0], at[-1]) == (0, 100), "as far as both seeds went"
    assert (mean[0], mean[-1]) == pytest.approx((30, 100))
    (band,) = axes.collections
    reach = band.get_paths()[0].vertices
    assert (reach[:, 1].min(), reach[:, 1].max()) == pytest.approx((20, 140))
    assert others[0].get_color() != others[1].get_color()


def test_seeds_without_a_common_stretch_have_no_mean() -> None:
    axes = drawn(plot.learning_curves, [made(returns=[(0, 1), (10, 2)]), made(seed=2, returns=[(20, 1), (30, 2)])])
    assert [len(line.get_xdata()) for line in axes.lines] == [2, 2, 0]


def test_confirmations_and_the_bar_are_marked() -> None:
    history_ = History("impala", 1, [Evaluated(0, 0, 20.0, False), Evaluated(9, 1, 480.0, True)])
    axes = plot.new_figure(6, 4).add_subplot()
    plot.learning_curves(axes, plot.grouped([history_]), bar=475)
    (dots,) = [line for line in axes.lines if line.get_marker() == "o" and line.get_linestyle() == "None"]
    assert dots.get_xydata().tolist() == [[9, 480]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["impala (seed 1)", "bar: 475", "confirmation on fresh seeds"]


def test_bars_are_parts_of_a_whole() -> None:
    halves = [{"actor": {"env": 1.0}}, {"actor": {"env": 0.5, "send_wait": 0.5}, "learner": {"learn": 1.0}}]
    axes = drawn(plot.time_split, [History("a2c", seed, time_split=split) for seed, split in enumerate(halves)])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["actor", "learner"]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {"env": [75, 0], "learn": [0, 100], "send_wait": [25, 0]}


def test_waits_are_shares_of_all_time() -> None:
    """In a closing object they are, and work is a share of busy time."""
    busy = {"env": 0.75, "pack": 0.25, WAITS[0]: 0.2, "overhead": 0.25}
    split = history._time_split({"actor-0": busy, "actor-1": {}})
    assert split["actor"] == pytest.approx({"env": 0.6, "pack": 0.2, WAITS[0]: 0.2})


def test_lag_is_the_mean_over_the_seeds_that_got_there() -> None:
    def lagging(seed: int, steps: int, lag: float) -> History:
        return History("impala", seed, lags=[Lag(at, 0, lag, lag + 1, lag + 2) for at in (0, steps)])

    axes = drawn(plot.lags, [lagging(1, 100, 1), lagging(2, 200, 3)])
    mean, p95 = axes.lines
    assert np.interp([50, 150], *mean.get_data()).tolist() == [2, 3]
    assert np.interp([50, 150], *p95.get_data()).tolist() == [3, 4]
