"""Actors that hosts without the topology add to a run: one that the head lists for that, and one that nobody lists."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, running
from runs import CALM, FOREVER, SMALL, Run, assert_closed

HEAD = (
    *("run", "quickstart", *(f"hosts.{host}={address}" for host, address in ADDRESSES.items()), "insecure=true"),
    *("nodes.actor.count=1", *SMALL, *FOREVER, *CALM),
)
ADD = ("--join", f"tcp://{ADDRESSES['gpu0']}", "--add", "actor")

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


def taken(run: Run, node: str) -> int:
    books = run.counters("learner-0").items()
    return sum(n for name, n in books if name.startswith(f"trajectories/{node}@") and name.endswith("/taken"))


def test_actors_of_other_hosts_join_and_leave(cable: Cable, tmp_path: Path) -> None:
    with running(cable, "gpu0", tmp_path / "head", *HEAD, name="ddrl") as head:
        head.until(lambda: head.trained() > 5, "training")
        with (
            running(cable, "cpu1", tmp_path / "listed", *ADD, "--count", "2") as listed,
            running(cable, "cpu1", tmp_path / "new", *ADD, "--host", "far.lan") as new,
        ):
            names = {
                *listed.until(lambda: [n for n, _ in listed.lives()][1:], "two"),
                new.until(new.lives, "one")[0][0],
            }
            names |= {name for name, _ in listed.lives()}
            assert {name.partition(".")[2] for name in names} == {"cpu1", "far.lan"}
            assert len({name.partition(".")[0] for name in names}) == 3
            head.until(lambda: all(taken(head, name) > 3 for name in names), "training on what they play")
            listed.kill(listed.lives()[0][0])
            again = listed.lives()[0][0]
            listed.pid(again, life=2)
            before = taken(head, again)
            head.until(
                lambda: taken(head, again) > before + 3, "training on what the next life of the killed one plays"
            )
            new.process.send_signal(signal.SIGINT)
            assert new.ends() == {}
            head.until(lambda: head.answers()["added"] == {"here": 2, "left": 1, "lost": 0}, "word that it left")
            head.process.send_signal(signal.SIGTERM)
            assert head.ends()["reason"] == "stop"
            assert listed.ends() == {}
        assert_closed(head.books())


def test_with_keys_a_listed_host_adds_actors(cable: Cable, tmp_path: Path, keys: dict[str, Path]) -> None:
    """They speak in names of their own host alone, which its key is for."""
    by_key = tuple(word for word in HEAD if word != "insecure=true")
    add = ("--join", f"tcp://gpu0@{ADDRESSES['gpu0']}", "--add", "actor", "--count", "2")
    with (
        running(cable, "gpu0", tmp_path / "head", *by_key, name="ddrl", DDRL_KEYS=str(keys["gpu0"])) as head,
        running(cable, "cpu1", tmp_path / "cpu1", *add, DDRL_KEYS=str(keys["cpu1"])) as added,
    ):
        names = sorted(node for node, _ in added.until(lambda: added.lives()[1:] and added.lives(), "two"))
        assert names == ["actor-1.cpu1", "actor-2.cpu1"]
        head.until(lambda: all(taken(head, name) > 3 for name in names), "training on what they play")
        head.process.send_signal(signal.SIGTERM)
        assert head.ends()["reason"] == "stop"
        assert added.ends() == {}
        assert_closed(head.books())
