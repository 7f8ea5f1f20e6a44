"""Every payload, over every transport, both ways; and what a user may ask for."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from itertools import pairwise
from multiprocessing.connection import Connection

import psutil
import pytest

from ddrl_bus.bench import links
from ddrl_bus.bench.crew import crew
from ddrl_bus.bench.ends import PAYLOADS, SHARED, Transport
from ddrl_bus.bench.links import Scope, scope_of
from ddrl_bus.bench.schedule import Schedule
from ddrl_bus.errors import UsageError

ONE_OF_EACH_LINK = ("small unroll, 320 B", "weights, 6.7 MB", "request, 64 B")
LEAST = Scope(ONE_OF_EACH_LINK, peers=(2,), repeats=1, seconds=0.1, part=0.02, rates=1)


@pytest.mark.parametrize("transport", links.TRANSPORTS)
def test_rows_of_each_payload(transport: Transport) -> None:
    scope = replace(LEAST, transports=(transport,))
    rows = list(links.measure(scope))
    payloads = 1 if transport == SHARED else len(ONE_OF_EACH_LINK)
    assert len({(row.section, row.name) for row in rows}) == len(rows) == 2 * payloads
    for row in rows:
        values = {name: figure.median for name, figure in row.figures.items()}
        assert min(values.values()) > 0, row
        if "link p50" in values:
            assert values["link p50"] <= values["link p99"] <= values["link p99.9"] < 1e6
            assert values["ratio"] == pytest.approx(values["link p50"] / values["raw p50"])
        else:
            assert values["ratio"] == pytest.approx(values["link"] / values["raw"])


def test_what_a_user_asks_for() -> None:
    scope = scope_of(payloads=("unroll", "64 B"), transports=("tcp",), peers=[3], repeats=2)
    assert [str(cell) for cell in scope.cells()] == [
        *("small unroll, 320 B, tcp, 3 peers", "pixel unroll, 567 KB, tcp, 3 peers", "request, 64 B, tcp, 3 peers")
    ]
    assert scope.repeats == 2
    assert len(scope_of().cells()) == 4 * 3 * len(PAYLOADS) + 3
    assert [cell.payload.link for cell in scope_of(transports=(SHARED,)).cells()] == ["latest"] * 3
    assert len(scope_of(quick=True).cells()) == 9


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"transports": ("udp",)}, "'udp': expected one of memory, ipc, ipc.shared, tcp, tcp.CURVE"),
        ({"transports": (SHARED,), "payloads": ("unroll",)}, "only weights are shared"),
        ({"payloads": ("video",)}, "'video': expected words of one of: small unroll"),
    ],
)
def test_what_there_is_not(given: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        scope_of(**given)


# ── the schedule


def test_moments_are_set_in_advance() -> None:
    schedule, came = Schedule(rate=1000, count=30), []
    assert list(schedule.due()) == []
    while not schedule.over:
        schedule.wait()
        came += list(schedule.due())
        time.sleep(0.01)  # whoever is late finds all that were due meanwhile
    assert len(came) == 30
    assert {later - earlier for earlier, later in pairwise(came)} == {1_000_000}
    assert time.monotonic_ns() >= came[-1]
    schedule.close()


# ── processes


def _ends_badly(pipe: Connection, how: str) -> None:
    pipe.send(None)
    pipe.recv()
    if how == "raise":
        raise ValueError("no such thing")
    raise SystemExit


@pytest.mark.parametrize(("how", "words"), [("raise", "no such thing"), ("exit", "was killed")])
def test_an_end_that_fails_is_heard(how: str, words: str) -> None:
    with crew(1) as (member,):
        member.start(_ends_badly, how)
        member.answer()
        member.tell("go")
        with pytest.raises(RuntimeError, match=words):
            member.answer()


def _boss(told: Connection) -> None:
    with crew(1) as (member,):
        member.start(_names_itself)
        member.answer()
        member.tell("go")
        told.send(member.answer())
        time.sleep(60)


def _names_itself(pipe: Connection) -> None:
    pipe.send(None)
    pipe.recv()
    pipe.send(os.getpid())
    time.sleep(60)  # it reads nothing meanwhile


def test_a_crew_leaves_with_whoever_started_it() -> None:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    boss = spawn.Process(target=_boss, args=(theirs,))
    boss.start()
    member = psutil.Process(ours.recv())
    boss.kill()
    boss.join()
    member.wait(timeout=30)


def _spin(pipe: Connection) -> None:
    pipe.send(None)
    while (seconds := pipe.recv()) is not None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        pipe.send("done")


def test_processor_time_of_another_process() -> None:
    with crew(2) as (busy, idle):
        for member in (busy, idle):
            member.start(_spin)
            member.answer()
            member.tell(0)
            member.answer()
        before = busy.cpu_s, idle.cpu_s
        busy.tell(0.2)
        assert busy.answer() == "done"
        assert busy.cpu_s - before[0] == pytest.approx(0.2, abs=0.05)
        assert idle.cpu_s - before[1] < 0.05
