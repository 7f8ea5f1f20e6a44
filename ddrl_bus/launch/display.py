"""How a run shows itself on stderr: a live table on a terminal, a line now and then elsewhere. A gap is a "-"."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, Protocol, Self, TextIO

from ddrl_bus.launch.remote import Status
from ddrl_bus.metrics import WAITS
from ddrl_bus.topology.show import size

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_EVERY_S: Final = 5.0


class Display(Protocol):
    def note(self, text: str) -> None:
        """Say something once."""

    def show(self, status: Status) -> None:
        """This is how the run goes now."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...


def display(stream: TextIO | None = None) -> Display:
    """A live table where `stream` (stderr) is a terminal that may be coloured, else plain lines."""
    stream = stream or sys.stderr
    if stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        return Live(stream)
    return Plain(stream)


class Plain:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = 0.0

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed takes no run with it
            print(text, file=self._stream, flush=True)

    def show(self, status: Status) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY_S
            self.note(line(status))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Live:
    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(file=stream)
        self._live = RichLive(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text, markup=False, highlight=False)

    def show(self, status: Status) -> None:
        with contextlib.suppress(OSError):
            self._live.update(table(status), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────


def line(status: Status) -> str:
    """The status in one line."""
    roles = {node.get("role") for node in (status.get("nodes") or {}).values()}
    trainer = "param_server" if "param_server" in roles else "learner"
    lag, queue = gauge(status, trainer, "lag_mean"), gauge(status, "learner", "queue")
    shares = [f"{role} {percent(gauge(status, role, 'overhead'))}" for role in ("actor", "learner")]
    return (
        f"{number(status.get('wall_s')):>5} s  {status.get('phase') or '-'}  "
        f"return {number(status.get('return'), 1)} (best {number(status.get('best_return'), 1)})  "
        f"steps {number(status.get('env_steps'))}  {number(status.get('steps_per_s'))}/s  "
        f"updates {number(status.get('updates'))}  lag {number(lag, 1)}  queue {number(queue)}  "
        f"overhead {' '.join(shares)}{turnout(status)}"
    )


_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {  # title -> the gauges; what is shown is the sum of those there are
    "steps": ("env_steps",),
    "updates": ("updates",),
    "lag": ("lag_mean",),
    "queue": ("queue",),
    "items": ("items",),
    "samples/insert": ("samples_per_insert",),
    "return": ("return_mean",),
    "waiting": WAITS,
    "overhead": ("overhead",),
}
_OF_REPLAYS: Final = frozenset({"items", "samples/insert"})
_PERCENT: Final = frozenset({"waiting", "overhead"})
_DIGITS: Final = {"lag": 1, "return": 1, "samples/insert": 2}


def table(status: Status) -> RenderableType:
    """The status as one line, a row per node and one per link."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    nodes = Table(box=None, pad_edge=False, header_style="dim")
    nodes.add_column("node", no_wrap=True)
    nodes.add_column("state")
    everybody = status.get("nodes") or {}
    replays = any(node.get("role") == "replay" for node in everybody.values())
    titles = [title for title in _COLUMNS if replays or title not in _OF_REPLAYS]
    for title in titles:
        nodes.add_column(title, justify="right")
    for name, node in everybody.items():
        gauges = node.get("gauges") or {}
        nodes.add_row(name, str(node.get("state") or "-"), *(cell(gauges, title) for title in titles))
    phase = f"{status.get('phase') or '-'} {status.get('reason') or ''}".strip()
    head = f"{status.get('name')}  {phase}  {number(status.get('wall_s'))} s"
    body = (
        f"return {number(status.get('return'), 1)} (best {number(status.get('best_return'), 1)})   "
        f"env steps {number(status.get('env_steps'))}   {number(status.get('steps_per_s'))} steps/s   "
        f"updates {number(status.get('updates'))}{turnout(status)}"
    )
    return Group(Text(head, style="bold"), Text(body), nodes, *_links(status))


def _links(status: Status) -> Iterator[RenderableType]:
    from rich.table import Table

    links = Table(box=None, pad_edge=False, header_style="dim")
    links.add_column("link", no_wrap=True)
    links.add_column("bytes", justify="right")
    links.add_column("terms")
    for name, link in (status.get("links") or {}).items():
        links.add_row(name, size(link["bytes_in"]), link["terms"])
    if links.row_count:
        yield links


def turnout(status: Status) -> str:
    """What became of the nodes that were added; "" where there were none."""
    added = status.get("added") or {}
    return "  added " + ", ".join(f"{count} {what}" for what, count in added.items()) if any(added.values()) else ""


def cell(gauges: Mapping[str, float], title: str) -> str:
    values = [gauges[name] for name in _COLUMNS[title] if name in gauges]
    value = sum(values) if values else None
    return percent(value) if title in _PERCENT else number(value, _DIGITS.get(title, 0))


def gauge(status: Status, role: str, name: str) -> float | None:
    """Mean of a gauge over the nodes of a role that have it."""
    nodes = (status.get("nodes") or {}).values()
    values = [node["gauges"][name] for node in nodes if node.get("role") == role and name in (node.get("gauges") or {})]
    return sum(values) / len(values) if values else None


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None or value != value else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.1%}"
