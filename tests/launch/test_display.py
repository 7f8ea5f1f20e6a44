import io

import pytest
from rich.console import Console

from ddrl_bus.launch import display
from ddrl_bus.launch.remote import Status

STATUS: Status = {
    "name": "quickstart",
    "phase": "run",
    "reason": "",
    "wall_s": 12.3,
    "env_steps": 312_400,
    "updates": 488,
    "steps_per_s": 61_200.4,
    "return": 213.44,
    "best_return": 250.0,
    "nodes": {
        "actor-0": {
            "role": "actor",
            "state": "running",
            "gauges": {"overhead": 0.02, "send_wait": 0.3, "weights_wait": 0.2},
        },
        "actor-1": {"role": "actor", "state": "running", "gauges": {"overhead": 0.04}},
        "learner-0": {"role": "learner", "state": "running", "gauges": {"lag_mean": 1.25, "queue": 2, "updates": 488}},
        "evaluator-0": {"role": "evaluator", "state": "unheard", "gauges": {}},
    },
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def rendered(status: Status) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(display.table(status))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_line() -> None:
    assert display.line(STATUS) == (
        "   12 s  run  return 213.4 (best 250.0)  steps 312,400  61,200/s  updates 488  lag 1.2  queue 2  "
        "overhead actor 3.0% learner -"
    )


def test_table_has_a_row_per_node() -> None:
    rows = {words[0]: words[1:] for line in rendered(STATUS).splitlines() if (words := line.split())}

    assert rows["actor-0"] == ["running", "-", "-", "-", "-", "-", "50.0%", "2.0%"]
    assert rows["learner-0"] == ["running", "-", "488", "1.2", "2", "-", "-", "-"]
    assert rows["evaluator-0"][0] == "unheard"


def test_replays_show_what_they_hold_and_how_often_it_is_drawn() -> None:
    held = {"items": 120_000, "samples_per_insert": 3.987, "requests_wait": 0.25, "return_mean": 87.0}
    nodes = {**STATUS["nodes"], "replay-0": {"role": "replay", "state": "running", "gauges": held}}
    rows = {words[0]: words[1:] for line in rendered({"nodes": nodes}).splitlines() if (words := line.split())}

    assert rows["node"][4:7] == ["queue", "items", "samples/insert"]
    assert rows["replay-0"] == ["running", *"----", "120,000", "3.99", "87.0", "25.0%", "-"]
    assert rows["actor-0"] == ["running", *"-------", "50.0%", "2.0%"]


def test_links_show_their_terms_and_what_came_over_them() -> None:
    links = {
        "trajectories": {"terms": "queue, window 2, rate 10MiB/s", "bytes_in": 3 << 19},
        "weights": {"terms": "latest", "bytes_in": 0},
    }
    rows = {words[0]: words[1:] for line in rendered({"links": links}).splitlines() if (words := line.split())}

    assert rows["trajectories"] == ["1.5MiB", *["queue,", "window", "2,", "rate", "10MiB/s"]]
    assert rows["weights"] == ["0B", "latest"]


def test_gaps_are_dashes() -> None:
    assert "return - (best -)  steps -  -/s" in display.line({})
    assert "return - (best -)" in rendered({"nodes": {"actor-0": {}}})
    assert display.number(float("nan")) == "-"


def test_plain_says_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with display.Plain(stream) as plain:
        plain.show(STATUS)
        plain.show(STATUS)
        now += display.PLAIN_EVERY_S
        plain.show(STATUS)
        plain.note("done")

    assert stream.getvalue() == f"{display.line(STATUS)}\n" * 2 + "done\n"


def test_live_shows_the_table_and_keeps_the_notes() -> None:
    stream = Terminal()
    with display.Live(stream) as live:
        live.show(STATUS)
        live.note("actor-0 [was] killed")

    assert "quickstart" in stream.getvalue()
    assert "actor-0 [was] killed" in stream.getvalue()


@pytest.mark.parametrize(
    ("stream", "environ", "expected"),
    [
        (io.StringIO(), {}, display.Plain),
        (Terminal(), {"NO_COLOR": "1"}, display.Plain),
        (Terminal(), {"TERM": "dumb"}, display.Plain),
        (Terminal(), {}, display.Live),
    ],
)
def test_which_display(
    stream: io.StringIO, environ: dict[str, str], expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert isinstance(display.display(stream), expected)
