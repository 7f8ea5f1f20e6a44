"""Four hosts on a switch: one learns, three play. The head sends each its topology, and one copy of the weights."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
from cables import MISSING, running, switched
from runs import SMALL, assert_closed

HOSTS = {"gpu0": "10.78.0.1", "cpu1": "10.78.0.2", "cpu2": "10.78.0.3", "cpu3": "10.78.0.4"}
PLAYERS = [host for host in HOSTS if host != "gpu0"]
HEAD = (
    *("run", "quickstart", *(f"hosts.{host}={address}" for host, address in HOSTS.items()), "insecure=true"),
    *("nodes.actor.count=6", f"nodes.actor.host=[{', '.join(PLAYERS)}]", "nodes.actor.envs=16", *SMALL),
    "stop={reward: 75, steps: 400_000}",
)

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


def test_four_hosts_train_until_it_is_good_enough(tmp_path: Path) -> None:
    with switched(HOSTS) as cable, ExitStack() as stack:
        head = stack.enter_context(running(cable, "gpu0", tmp_path / "gpu0", *HEAD, name="ddrl"))
        join = ("--join", f"tcp://{HOSTS['gpu0']}", "--host")
        others = [stack.enter_context(running(cable, host, tmp_path / host, *join, host)) for host in PLAYERS]
        result = head.ends()
        assert result["reason"] == "reward"
        for number, other in enumerate(others):
            nodes = sorted({node for node, _ in other.lives()})
            assert nodes == [f"actor-{number}", f"actor-{number + 3}", f"relay-{number}"]
            books = other.counters(f"actor-{number}")
            assert sum(count for name, count in books.items() if name.endswith("/produced")) > 0
            assert other.ends() == {}
        assert_closed(head.books())
