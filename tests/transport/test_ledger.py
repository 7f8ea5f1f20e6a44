"""The ledger: counters that outlive their process, and the law that closes a link's books."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from ddrl_bus.transport.ledger import Balance, Ledger, audit, read

LANE = "actor-0@1>learner-0@1"


def test_counts_in_memory() -> None:
    ledger = Ledger()
    ledger.counter("data", LANE, "produced").add()
    ledger.counter("data", LANE, "produced").add(4)
    ledger.counter("data", "bytes").set(-7)
    assert ledger.snapshot() == {f"data/{LANE}/produced": 5, "data/bytes": -7}
    ledger.close()


def test_another_reader_sees_a_living_file(tmp_path: Path) -> None:
    path = tmp_path / "actor-0.ledger"
    ledger = Ledger(path)
    assert read(path) == {}
    counter = ledger.counter("a", "b")
    for n in (1, 2**40, -3):
        counter.set(n)
        assert read(path) == {"a/b": n} == ledger.snapshot()
    ledger.counter("c")
    assert read(path) == {"a/b": -3, "c": 0}
    ledger.close()
    assert read(path) == {"a/b": -3, "c": 0}


def test_counters_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "victim.ledger"
    code = f"""
from pathlib import Path
from ddrl_bus.transport.ledger import Ledger
ledger = Ledger(Path({str(path)!r}))
produced, other = ledger.counter("data", {LANE!r}, "produced"), ledger.counter("other")
other.set(2**62)
for n in range(1000): produced.add()
print("counted", flush=True)
while True: other.add(-1)
"""
    victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"counted\n"
        alive = read(path)
    finally:
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
    dead = read(path)
    assert alive[f"data/{LANE}/produced"] == dead[f"data/{LANE}/produced"] == 1000
    assert dead["other"] <= alive["other"] <= 2**62
    assert read(path) == dead


def test_file_is_private_and_sparse(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    Ledger(path).counter("one")
    stat = path.stat()
    assert stat.st_mode & 0o777 == 0o600
    assert stat.st_blocks * 512 <= 64 << 10 < stat.st_size


def test_another_lifes_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    Ledger(path).counter("one").add()
    with pytest.raises(FileExistsError):
        Ledger(path)
    assert read(path) == {"one": 1}


@pytest.mark.parametrize("name", ["", "x" * 249, "ü" * 125, "nul\0"])
def test_names_that_do_not_fit_are_refused(name: str) -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="cannot hold"):
        ledger.counter(name)
    assert ledger.snapshot() == {}


def test_longest_name_and_last_slot(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    ledger.counter("x" * 248).set(-1)
    for n in range(1, 1 << 14):
        ledger.counter(str(n))
    with pytest.raises(ValueError, match="slot 16384"):
        ledger.counter("one too many")
    assert len(read(path)) == 1 << 14
    assert read(path)["x" * 248] == -1


def test_a_cut_or_foreign_file_is_read_without_an_error(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"")
    assert read(path) == {}
    path.write_bytes(b"\xff\xfe" * 10)
    assert list(read(path).values()) == [0]


# -- audit -----------------------------------------------------------------------------------------------------------

LIVES = ("actor-0@1", "learner-0@1")


def lane(lane_name: str = LANE, link: str = "data", **counts: int) -> dict[str, int]:
    return {f"{link}/{lane_name}/{what}": n for what, n in counts.items()}


@pytest.mark.parametrize(
    ("counts", "living", "expected"),
    [
        ({"produced": 9, "accepted": 9, "taken": 9}, LIVES, {"closed": True}),
        ({"produced": 9, "accepted": 6, "refused": 2, "lost": 1, "taken": 6}, LIVES, {"closed": True}),
        ({"produced": 9, "accepted": 7, "taken": 7}, LIVES, {"in_flight": 2, "closed": False}),
        ({"produced": 9, "accepted": 7, "taken": 7}, ("learner-0@1",), {"lost": 2, "closed": True}),
        ({"produced": 9, "accepted": 7, "taken": 7}, ("actor-0@1",), {"lost": 2, "closed": True}),
        ({"produced": 9, "accepted": 7, "taken": 7}, ("actor-0@2", "learner-0@1"), {"lost": 2, "closed": True}),
        ({"produced": 9, "accepted": 6, "lost": 1, "taken": 6}, (), {"lost": 3, "closed": True}),
        ({"produced": 9, "accepted": 9, "taken": 7}, LIVES, {"queued": 2, "closed": False}),
        ({"produced": 9, "accepted": 9, "taken": 7}, ("learner-0@1",), {"queued": 2, "closed": False}),
        ({"produced": 9, "accepted": 9, "taken": 7}, ("actor-0@1",), {"queued": 2, "closed": True}),
        ({"produced": 9, "accepted": 10, "taken": 10}, LIVES, {"in_flight": -1, "closed": False}),
        ({"produced": 9, "accepted": 10, "taken": 10}, (), {"lost": -1, "closed": False}),
        ({"produced": 9, "accepted": 8, "taken": 9, "lost": 1}, (), {"queued": -1, "closed": False}),
        ({"accepted": 3, "taken": 3}, (), {"lost": -3, "closed": False}),
        ({"produced": 5, "accepted": 5, "taken": 5, "duplicates": 4}, LIVES, {"closed": True}),
        ({"produced": 5}, (), {"lost": 5, "closed": True}),
    ],
)
def test_books_of_one_lane(counts: dict[str, int], living: tuple[str, ...], expected: Mapping[str, int]) -> None:
    produced = {k: v for k, v in counts.items() if k == "produced"}
    received = {k: v for k, v in counts.items() if k != "produced"}
    balance = audit([lane(**produced), lane(**received)], frozenset(living))["data"]
    assert balance == Balance(**{**counts, **expected})  # type: ignore[arg-type]
    assert balance.produced == balance.accepted + balance.refused + balance.lost + balance.in_flight
    assert balance.accepted == balance.taken + balance.queued


def test_one_open_lane_leaves_the_link_open_and_other_links_alone() -> None:
    balances = audit(
        [
            lane(produced=3, accepted=3, taken=3),
            lane("actor-1@1>learner-0@1", produced=3, accepted=2, taken=2),
            lane("actor-1@1>learner-0@1", "other", produced=1, accepted=1, taken=1),
        ],
        frozenset(("actor-0@1", "actor-1@1", "learner-0@1")),
    )
    assert balances["data"] == Balance(produced=6, accepted=5, in_flight=1, taken=5, closed=False)
    assert balances["other"].closed


def test_errors_of_two_lanes_do_not_hide_each_other() -> None:
    over = lane(produced=3, accepted=4, taken=4)
    under = lane("actor-1@1>learner-0@1", produced=3, accepted=2, taken=2)
    assert not audit([over, under])["data"].closed


def test_counters_that_are_no_lanes_are_left_out() -> None:
    assert audit([{"data/bytes_in": 7, "data/stray/fenced": 1, "weights/snapshots": 2, "plain": 3}]) == {}
