"""The reference topology over tcp, on two hosts that both have its file."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, ddrl_keys, running
from replicas import forms, train, updates
from runs import CALM, FOREVER, Run, assert_closed

from ddrl_bus.launch import closing
from ddrl_bus.transport import ledger

LATE_S = 6.0
"""Longer than anybody waits before it says who is missing."""
CUT_S = 2.0
DOWN_S = 2.0
TWO_HOSTS = ("two-hosts", "nodes.actor.count=2")
LEARNT = "stop.reward=100"
"""Chance is 22; test_tutorial.py goes on until it is solved."""
DDPPO = (
    *("ddppo", *(f"hosts.{host}={address}" for host, address in ADDRESSES.items()), "insecure=true"),
    *("nodes.actor.host=[gpu0, cpu1]", "nodes.learner.host=[gpu0, cpu1]", "nodes.learner.deadline=3s", *FOREVER, *CALM),
)
"""A worker on each host; everybody else is on the first."""

pytestmark = [
    pytest.mark.hosts,
    pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING),
]


def share(
    cable: Cable,
    host: str,
    folder: Path,
    *overrides: str,
    topology: Sequence[str] = TWO_HOSTS,
    keys: Path | None = None,
) -> AbstractContextManager[Run]:
    """`ddrl-node --host HOST` on that host, with the keys of its user."""
    variables = {"GPU0": ADDRESSES["gpu0"], "CPU1": ADDRESSES["cpu1"], "DDRL_KEYS": str(keys or folder / "none")}
    return running(cable, host, folder, "-t", *topology, "--host", host, *overrides, **variables)


def assert_books_agree(learner: Run, actors: Run) -> ledger.Balance:
    """What the controller heard of the other host closes the books exactly as that host's own ledgers do."""
    told = learner.books()
    pages = [ledger.read(page) for run in (learner, actors) for page in (run.folder / "ledger").glob("*.page")]
    assert ledger.audit(pages)["trajectories"] == told
    assert len(list(closing.lives(learner.folder))) == len(pages)
    assert_closed(told)
    return told


def test_the_actors_come_late_and_it_learns(cable: Cable, tmp_path: Path) -> None:
    with share(cable, "gpu0", tmp_path / "gpu0", LEARNT) as learner:
        learner.pid("learner-0")
        time.sleep(LATE_S)
        with share(cable, "cpu1", tmp_path / "cpu1", LEARNT) as actors:
            ended = learner.ends()
            assert actors.ends() == {}  # the controller is elsewhere
            assert ended["reason"] == "reward"
            assert ended["return"] >= 100
            balance = assert_books_agree(learner, actors)
            assert balance.lost == balance.refused == balance.queued == 0
            assert ended["ledger"]["closed"]
            steps = sum(actors.counters(f"actor-{n}")["env_steps"] for n in (0, 1))
            assert ended["env_steps"] == steps
            assert {"actor-0", "actor-1", "learner-0", "evaluator-0"} <= ended["overhead"].keys()


def test_the_learner_comes_late_and_the_cable_is_pulled(cable: Cable, tmp_path: Path) -> None:
    """For two seconds nothing goes through; training goes on, and every unroll is accounted for."""
    overrides = ("stop.reward=null", "stop.steps=200000")
    with share(cable, "cpu1", tmp_path / "cpu1", *overrides) as actors:
        actors.pid("actor-0")
        time.sleep(LATE_S)
        assert actors.process.poll() is None, actors.said
        with share(cable, "gpu0", tmp_path / "gpu0", *overrides) as learner:
            learner.until(lambda: learner.trained() > 20, "training over tcp")
            with cable.unplugged():
                time.sleep(DOWN_S)
            learner.trains_on(50, "training after the cable was plugged in again")
            ended = learner.ends()
            assert actors.ends() == {}
            assert (ended["reason"], ended["restarts"]) == ("steps", 0)
            assert ended["return"] > 60
            assert_books_agree(learner, actors)
            assert ended["ledger"]["closed"]


def test_a_killed_actor_of_another_host_closes_the_books_exactly(cable: Cable, tmp_path: Path) -> None:
    """Its last heartbeat was older than its last unroll: the next life tells what the ledger of the dead one holds."""
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *FOREVER, *CALM) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *FOREVER, *CALM) as actors,
    ):
        learner.until(lambda: learner.trained() > 20, "training over tcp")
        actors.kill("actor-0")
        actors.pid("actor-0", life=2)
        learner.trains_on(50, "training after the restart")
        learner.process.send_signal(signal.SIGTERM)
        ended = learner.ends()
        assert actors.ends() == {}
        assert_books_agree(learner, actors)
        assert ended["ledger"]["closed"]


def test_replicas_on_two_hosts_lose_each_other_and_meet_again(cable: Cable, tmp_path: Path) -> None:
    """Without its cable the host that has no controller trains nothing: there are never two groups."""
    with (
        share(cable, "gpu0", tmp_path / "gpu0", topology=DDPPO) as first,
        share(cable, "cpu1", tmp_path / "cpu1", topology=DDPPO) as second,
    ):
        both = forms(second, 0, 1)
        train(first, 0)
        train(second, 1)
        with cable.unplugged():
            alone = forms(first, 0, after=both.generation)
            made = updates(second, 1)
            train(first, 0)
            assert updates(second, 1) == made
        again = forms(second, 0, 1, after=alone.generation)
        assert again.updates > alone.updates
        train(second, 1)
        second.close()
        last = forms(first, 0, after=again.generation)
        train(first, 0)
        first.process.send_signal(signal.SIGTERM)
        assert first.ends()["reason"] == "stop"
        assert last.updates > again.updates
        for host, run in (("gpu0", first), ("cpu1", second)):
            assert "DivergedError" not in run.said, host
        pages = [ledger.read(page) for run in (first, second) for page in (run.folder / "ledger").glob("*.page")]
        assert_closed(ledger.audit(pages)["trajectories"])


def test_with_keys_it_trains_and_nothing_secret_is_left_behind(
    cable: Cable, tmp_path: Path, keys: dict[str, Path]
) -> None:
    secrets = [(keys[host] / f"{host}.key").read_text().strip() for host in ADDRESSES]
    with (
        share(cable, "gpu0", tmp_path / "gpu0", "insecure=false", LEARNT, keys=keys["gpu0"]) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", "insecure=false", LEARNT, keys=keys["cpu1"]) as actors,
    ):
        learner.until(lambda: learner.trained() > 20, "training by key")
        status = learner.answers()
        assert status["quarantined"] == []
        said = [json.dumps(status), *(Path(f"/proc/{pid}/cmdline").read_text() for _, pid in actors.alive())]
        ended = learner.ends()
        assert ended["reason"] == "reward"
        assert actors.ends() == {}
        assert assert_books_agree(learner, actors).refused == 0
        assert ended["ledger"]["closed"]
        said += [learner.said, actors.said]
        files = [path for run in (learner, actors) for path in run.folder.rglob("*") if path.is_file()]
    assert files
    for secret in secrets:
        assert not any(secret in text for text in said)
        assert not any(secret.encode() in path.read_bytes() for path in files)


def test_a_host_that_is_revoked_is_cut_off_from_a_run(cable: Cable, tmp_path: Path, keys: dict[str, Path]) -> None:
    """The others go on without it, and it trains again once it is allowed."""
    words = ("insecure=false", *FOREVER, *CALM, "nodes.actor.count=1")
    with (
        share(cable, "gpu0", tmp_path / "gpu0", *words, keys=keys["gpu0"]) as learner,
        share(cable, "cpu1", tmp_path / "cpu1", *words, keys=keys["cpu1"]),
    ):
        learner.until(lambda: learner.trained() > 20, "training by key")
        entry = next(line for line in ddrl_keys(keys["gpu0"], "list").splitlines() if line.startswith("cpu1"))
        ddrl_keys(keys["gpu0"], "revoke", "cpu1")
        learner.until(lambda: learner.answers()["nodes"]["actor-0"]["silent_s"] > CUT_S, "word that it is not heard")
        before = learner.trained()
        time.sleep(CUT_S)
        assert learner.trained() - before <= 1  # what was received already may fill one batch more
        learner.kill("learner-0")  # whoever starts anew goes on without the host as well
        learner.pid("learner-0", life=2)
        ddrl_keys(keys["gpu0"], "allow", *entry.split()[:2])
        learner.trains_on(50, "training after it was allowed again")
        learner.process.send_signal(signal.SIGTERM)
        assert learner.ends()["reason"] == "stop"
