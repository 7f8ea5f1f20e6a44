"""Rows, their noise, and every form in which a report leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from ddrl_bus.bench import report_page
from ddrl_bus.bench.machine import versions_of
from ddrl_bus.bench.output import STDOUT, WORSE, Output, measured
from ddrl_bus.bench.report import MB_PER_S, NOISY, US, About, Figure, Report, Row, as_csv, as_text, row, settled
from ddrl_bus.errors import UsageError

ABOUT = About("trial", "Trial <one>", "First.\n\nSecond & last.", "Look.", "bare", {"link": ("link", "link p99")})
KINDS = {"link": US, "link p99": US, "raw": US, "rate": MB_PER_S}
RATIOS = {"ratio": ("link", "raw"), "gain": ("rate", "raw")}


def trial(*link: float, name: str = "a") -> Row:
    """Over a bare figure of 10."""
    repeats = [{"link": us, "link p99": 2 * us, "raw": 10.0, "rate": 1000 / us} for us in link]
    return row("things", name, repeats, KINDS, RATIOS)


def test_ratios_are_paired() -> None:
    repeats = [{"link": 10.0, "raw": 5.0}, {"link": 40.0, "raw": 10.0}, {"link": 9.0, "raw": 3.0}]
    made = row("s", "n", repeats, {"link": US, "raw": US}, {"ratio": ("link", "raw")})
    assert made.figures["ratio"].values == (2, 4, 3)
    assert made.headline is made.figures["ratio"]
    assert made.figures["ratio"].median == 3
    assert made.figures["ratio"].quartiles == (2.5, 3.5)
    assert made.figures["ratio"].spread == pytest.approx(1 / 3)


def test_more_is_better_of_a_ratio_of_rates() -> None:
    assert trial(10).figures["ratio"].kind.better == "less"
    assert trial(10).figures["gain"].kind.better == "more"


@pytest.mark.parametrize(("values", "repeats"), [((10, 10, 10), 3), ((10, 30, 10, 10, 10, 10), 5), ((5, 20) * 3, 6)])
def test_noise_is_measured_again_within_bounds(values: tuple[float, ...], repeats: int) -> None:
    given = iter(values)
    made = settled(lambda: {"us": next(given)}, lambda found: row("s", "n", found, {"us": US}), repeats=3)
    assert len(made.figures["us"].values) == repeats
    assert made.noisy == (repeats == 6)
    assert made.figures["us"].spread > NOISY or not made.noisy


def test_text_has_a_table_for_each_shape() -> None:
    other = row("others", "c", [{"us": 1.0}], {"us": US})
    lines = list(as_text([trial(10, 11), trial(10, 90, name="b"), other, Row("others", "d", note="not installed")]))
    assert [line.split()[0] if line else "" for line in lines] == ["things", "a", "b", "", "others", "c", "d"]
    assert lines[0].split() == [
        "things",
        "link",
        "µs",
        "link",
        "p99",
        "µs",
        "raw",
        "µs",
        "rate",
        "MB/s",
        "ratio",
        "gain",
    ]
    assert lines[1].endswith("ratio 1.02 to 1.08")
    assert lines[2].endswith("(noisy)")
    assert lines[-1].endswith("not installed")


@pytest.fixture
def report() -> Report:
    made = Report(ABOUT)
    list(made.filled([trial(8, 9), trial(12, 13, name="b <i>"), Row("things", "c", note="not installed")]))
    return made


def test_a_report_says_where_it_is_from(report: Report) -> None:
    said = json.loads(json.dumps(report.as_json()))
    assert {"processor", "cores", "kernel", "governor"} <= said["machine"].keys()
    assert {"python", "pyzmq", "libzmq", "msgpack", "numpy"} <= said["versions"].keys()
    assert (said["bench"], said["method"], len(said["load"])) == ("trial", ABOUT.method, 2)
    assert said["rows"][0]["figures"]["link"]["values"] == [8, 9]


@pytest.mark.parametrize(("load", "busy"), [((0.0, 0.1), False), ((0.0, 1e6), True)])
def test_it_warns_of_a_busy_machine(report: Report, load: tuple[float, float], busy: bool) -> None:
    report.load = load
    assert any("the machine was busy" in warning for warning in report.warnings) == busy


def test_it_names_noisy_rows(report: Report) -> None:
    report.rows.append(trial(10, 90, name="wild"))
    assert any("1 of 4 rows" in warning and warning.endswith("wild") for warning in report.warnings)


def test_csv_has_a_line_for_each_figure(report: Report) -> None:
    head, *lines = as_csv(report)
    assert len(lines) == 2 * 6
    assert dict(zip(head, lines[0], strict=True)) == {
        "section": "things",
        "row": "a",
        "figure": "link",
        "unit": "µs",
        "better": "less",
        "median": "8.5",
        "lower quartile": "8.25",
        "upper quartile": "8.75",
        "repeats": "2",
    }


# ── the page


class Tags(HTMLParser):
    """Checks that tags are closed in order, and keeps what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(report: Report) -> None:
    text = report_page.page(report)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {"src", "href", "onload"} & {name for name, _ in tags.attributes}
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert [value for _, value in tags.attributes if value and "//" in value] == ["http://www.w3.org/2000/svg"] * 2


def test_the_page_says_what_and_how(report: Report) -> None:
    text = report_page.page(report)
    for words in (
        "Trial &lt;one&gt;",
        "<p>Second &amp; last.</p>",
        "b &lt;i&gt;",
        "1 = bare",
        "not installed",
        "libzmq",
    ):
        assert words in text
    assert "<i>" not in text


def test_bars_are_as_long_as_their_figures() -> None:
    svg = report_page.bars([trial(5), trial(20), trial(40)], "bare")
    bars = [(float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)" [^>]*width="([\d.]+)"', svg)]
    (half, left), (twice, right), (_, longest) = bars
    assert (left, longest) == pytest.approx((right, 2 * right), rel=0.01)
    assert half + left == pytest.approx(twice, abs=0.2)  # they begin at 1
    assert re.findall(r'fill="(#\w+)"', svg) == ["#009E73", "#D55E00", "#D55E00"]  # better than bare, and worse


def test_bars_that_are_no_ratios_begin_at_nothing() -> None:
    svg = report_page.bars([row("s", str(us), [{"us": us}], {"us": US}) for us in (10.0, 20.0)], "")
    short, long = (float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg))
    assert long == pytest.approx(2 * short, rel=0.01)


def test_percentiles_go_from_left_to_right() -> None:
    svg = report_page.percentiles([trial(10)], {"link": ("link", "link p99")})
    first, second = (float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)[:2])
    assert first < second


def test_versions_of_libraries_and_programs() -> None:
    found = versions_of(("click", "python3", "no-such-thing"))
    assert found["click"] == metadata.version("click")
    assert found["python3"].startswith("3.")
    assert "no-such-thing" not in found


# ── files, and earlier reports


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(str(tmp_path / "r.json"), tmp_path / "r.csv", tmp_path / "r.html")
    assert measured(ABOUT, [trial(10)], output) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["name"] == "a"
    assert len((tmp_path / "r.csv").read_text().splitlines()) == 7
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith("things ")


def test_json_on_stdout_is_alone_there(capsys: pytest.CaptureFixture[str]) -> None:
    measured(ABOUT, [trial(10)], Output(STDOUT))
    said = capsys.readouterr()
    assert json.loads(said.out)["bench"] == "trial"
    assert said.err.startswith("things ")


@pytest.mark.parametrize(("now", "limit", "code"), [(10.5, 0.1, 0), (11.5, 0.1, WORSE), (11.5, 0.2, 0), (5, 0.1, 0)])
def test_a_row_that_got_worse(
    tmp_path: Path, now: float, limit: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "then.json"
    measured(ABOUT, [trial(10), trial(10, name="b")], Output(str(path)))
    assert (
        measured(ABOUT, [trial(10), trial(now, name="b"), trial(99, name="new")], Output(compare=path, fail_over=limit))
        == code
    )
    said = capsys.readouterr().err
    assert ("worse: things, b: ratio 1 → 1.15 ×, 15% worse" in said) == bool(code)
    assert "things, a" not in said


def test_of_what_should_be_large_less_is_worse(tmp_path: Path) -> None:
    path = tmp_path / "then.json"
    rates = [row("s", "n", [{"rate": rate}], {"rate": MB_PER_S}) for rate in (100.0, 80.0)]
    measured(ABOUT, rates[:1], Output(str(path)))
    assert measured(ABOUT, rates[1:], Output(compare=path)) == WORSE
    assert measured(ABOUT, rates[:1], Output(compare=path)) == 0


def test_a_row_that_lost_its_figures_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "then.json"
    measured(ABOUT, [trial(10)], Output(str(path)))
    assert measured(ABOUT, [Row("things", "a", note="not installed")], Output(compare=path)) == WORSE
    assert "not installed, was 1 ×" in capsys.readouterr().err


def untouched() -> Iterator[Row]:
    raise AssertionError("measured before the mistake was found")
    yield


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": [{"section": "s"}]}', '{"bench": "trial", "rows": 3}'])
def test_what_is_no_report_is_refused_first(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "then.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"then.json: .*expected what `ddrl bench trial --json"):
        measured(ABOUT, untouched(), Output(compare=path))


def test_a_report_of_another_benchmark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "then.json"
    path.write_text(json.dumps({"bench": "other", "rows": []}))
    with pytest.raises(UsageError, match="of `ddrl bench other`, not of `ddrl bench trial`"):
        measured(ABOUT, untouched(), Output(compare=path))


@pytest.mark.parametrize("name", ["json", "csv", "html"])
def test_a_folder_that_is_not_there_is_refused_first(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {name: tmp_path / "none" / "file"}
    given = {key: str(path) if key == "json" else path for key, path in given.items()}
    with pytest.raises(UsageError, match="no folder"):
        measured(ABOUT, untouched(), Output(**given))


def test_one_value_has_no_spread() -> None:
    assert Figure(US, (3.0,)).quartiles == (3.0, 3.0)
    assert Figure(US, (3.0,)).spread == 0
