"""Weights for a host with several subscribers: one copy over the cable, whatever becomes of the relay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, running
from runs import CALM, FOREVER, Run, assert_closed

TWO_HOSTS = ("two-hosts", "nodes.actor.count=3", "nodes.evaluator.episodes=5", *FOREVER)
WIDE = ("algo.hidden=[256, 256]", "nodes.learner.publish_every=5")
"""Weights that most of the cable is for."""
HEARING = ("actor-0", "actor-1", "actor-2", "evaluator-0")

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


def share(cable: Cable, host: str, folder: Path, *words: str) -> AbstractContextManager[Run]:
    where = {"GPU0": ADDRESSES["gpu0"], "CPU1": ADDRESSES["cpu1"]}
    return running(cable, host, folder, "-t", *TWO_HOSTS, "--host", host, *words, **where)


def sent(cable: Cable, host: str) -> int:
    """Bytes that a host has put on the cable."""
    told = subprocess.run(
        ["ip", "-j", "-s", "-n", cable.namespaces[host], "link", "show", cable.ends[host]],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(json.loads(told.stdout)[0]["stats64"]["tx"]["bytes"])


def weights_in(run: Run, node: str) -> int:
    """Bytes of values, however they came."""
    return run.counters(node).get("weights/value_bytes_in", 0)


def test_one_copy_of_the_weights_crosses_the_cable(cable: Cable, tmp_path: Path) -> None:
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *WIDE) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *WIDE) as actors,
    ):
        actors.until(lambda: min(weights_in(actors, name) for name in HEARING) > 5_000_000, "weights for everybody")
        learner.process.send_signal(signal.SIGTERM)
        ended = learner.ends()
        assert actors.ends() == {}
        assert ended["ledger"]["closed"]
        assert ended["restarts"] == 0
        assert_closed(learner.books())
        assert (learner.books().lost, learner.books().queued) == (0, 0)  # a signal to one host drains both
        crossed, relayed = sent(cable, "gpu0"), actors.counters("relay-0")["weights/bytes_in"]
    # besides weights there are headers, control, credits and answers to heartbeats
    assert relayed <= crossed < 1.5 * relayed
    assert sum(weights_in(actors, name) for name in HEARING) > 2 * crossed
    assert relayed <= learner.counters("learner-0")["weights/bytes_out"]


def test_a_killed_relay_comes_back_and_no_actor_goes_back(cable: Cable, tmp_path: Path) -> None:
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *CALM) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *CALM) as actors,
    ):
        seen: dict[str, list[float]] = {f"actor-{n}": [-1.0] for n in range(3)}

        def versions(above: float) -> bool:
            """Looks at what each acts by; whether all are beyond this version."""
            nodes = (learner.status() or {}).get("nodes", {})
            for name, versions in seen.items():
                versions.append(nodes.get(name, {}).get("gauges", {}).get("version", versions[-1]))
            return min(versions[-1] for versions in seen.values()) > above

        learner.until(lambda: versions(20), "actors with newer weights")
        actors.kill("relay-0")
        actors.pid("relay-0", life=2)
        held = max(versions[-1] for versions in seen.values())
        learner.until(lambda: versions(held + 20), "newer weights from the relay's second life")
        learner.process.send_signal(signal.SIGTERM)
        ended = learner.ends()
        assert actors.ends() == {}
        assert ended["ledger"]["closed"]
        assert "relay-0 was killed by SIGKILL; restart 1 of 3" in actors.said
        for name, versions in seen.items():
            assert versions == sorted(versions), name
        assert "state=stopped was=draining" in (actors.folder / "logs" / "relay-0.log").read_text()
