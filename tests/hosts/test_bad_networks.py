"""Networks that are cut, silent, late, lossy or narrow, under real runs: training goes on, and every book closes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from pathlib import Path

import pytest
from cables import ADDRESSES, MISSING, Cable, running
from ports import free_ports
from runs import FOREVER, Run, assert_closed

from ddrl_bus.bench.cable import ip
from ddrl_bus.bench.faults import BESIDE, PORT, between, between_hosts
from ddrl_bus.bench.proxy import Proxy
from ddrl_bus.transport import ledger

pytestmark = pytest.mark.hosts
needs_cable = pytest.mark.skipif(bool(MISSING) and os.environ.get("CI") != "true", reason=MISSING)

TOPOLOGY = (
    *("two-hosts", "run_id=bad", *FOREVER, "algo.hidden=[16]", "algo.batch=8"),
    *("nodes.actor.count=2", "nodes.actor.host=[gpu0, cpu1]", "nodes.actor.envs=8", "nodes.evaluator.count=0"),
    "links.trajectories.rate=300KiB",  # as `runs.CALM`
)
"""An actor on either host; the far one is actor-1."""
Keys = dict[str, Path]


def share(
    host: str, folder: Path, cable: Cable | None = None, keys: Keys | None = None, **addresses: str
) -> AbstractContextManager[Run]:
    """`ddrl-node --host HOST`; `addresses` are those of the hosts, as this one sees them."""
    variables = {name.upper(): address for name, address in addresses.items()}
    if keys is not None:
        variables["DDRL_KEYS"] = str(keys[host])
    insecure = f"insecure={str(keys is None).lower()}"
    return running(cable, host, folder, "-t", *TOPOLOGY, insecure, "--host", host, **variables)


def of_actor(run: Run, index: int) -> int:
    """Unrolls of an actor that the learner took."""
    books = run.counters("learner-0")
    return sum(n for name, n in books.items() if f"/actor-{index}@" in name and name.endswith("/taken"))


def takes(run: Run, index: int, messages: int = 10) -> None:
    before = of_actor(run, index)
    run.until(lambda: of_actor(run, index) >= before + messages, f"unrolls of actor-{index}")


def lost(run: Run) -> int:
    return sum(n for name, n in run.counters("learner-0").items() if name.endswith("/lost"))


def takes_none(run: Run, index: int, seconds: float) -> None:
    before = of_actor(run, index)
    time.sleep(seconds)
    assert of_actor(run, index) <= before + 1  # that was on its way


def heard_s_ago(run: Run) -> float:
    """The far actor, by the controller."""
    return float(run.answers()["nodes"]["actor-1"]["silent_s"])


def is_heard(run: Run) -> None:
    """Wait for a report of the far actor that came after now."""
    began = time.monotonic()
    run.until(lambda: heard_s_ago(run) < time.monotonic() - began, "a report of actor-1")


def ends_with_closed_books(learner: Run, actors: Run, killed: bool = False) -> None:
    """And each unroll that was taken was trained on once; but for those that a `killed` learner had just taken."""
    learner.process.send_signal(signal.SIGTERM)
    ended = learner.ends()
    assert actors.ends() == {}
    assert (ended["reason"], ended["restarts"], ended["ledger"]["closed"]) == ("stop", 0, True)
    pages = [ledger.read(page) for run in (learner, actors) for page in (run.folder / "ledger").glob("*.page")]
    balance = ledger.audit(pages)["trajectories"]
    assert_closed(balance)
    books = learner.counters("learner-0")
    evicted = sum(n for name, n in books.items() if name.startswith("trajectories/evicted/"))
    done = books["trajectories/trained"] + evicted
    assert done <= balance.taken <= done + (3 if killed else 0)


# ── a cable between two namespaces ───────────────────────────────────────────────────────────────────────────────


@contextmanager
def plugged(cable: Cable, folder: Path) -> Iterator[tuple[Run, Run]]:
    """Both hosts' shares, once unrolls of the far one are trained on."""
    with (
        share("gpu0", folder / "gpu0", cable, **ADDRESSES) as learner,
        share("cpu1", folder / "cpu1", cable, **ADDRESSES) as actors,
    ):
        takes(learner, 1)
        yield learner, actors


@needs_cable
def test_a_cable_that_is_silent_then_lossy_then_narrow(cable: Cable, tmp_path: Path) -> None:
    """Nobody is told that nothing arrives, at first for less than any limit, then for longer than all of them: the near
    actor is trained on. A cable that carries little is slower, and that is all: unrolls and reports go on,
    and nothing is lost. (They have connections of their own, each of which comes back when it does.)"""
    with plugged(cable, tmp_path) as (learner, actors):
        for silent_s in (2.0, 8.0):
            with cable.silent():
                takes_none(learner, 1, silent_s)
                takes(learner, 0)
                learner.until(lambda s=silent_s: heard_s_ago(learner) >= s, "word that actor-1 is not heard")
            takes(learner, 1)
            is_heard(learner)
        assert lost(learner) <= 2  # the window, each time
        before = lost(learner)
        for bad in (cable.lossy(5), cable.narrow(1 << 20)):
            with bad:
                takes(learner, 1, 20)
                is_heard(learner)
        assert lost(learner) == before
        ends_with_closed_books(learner, actors)


DEAF_S = 7.0
"""Longer than a connection is kept of which nothing is acknowledged."""
HEAD = "head.test"


class Names:
    """What /etc/hosts says on either host."""

    def __init__(self, cable: Cable) -> None:
        self._folders = {host: Path("/etc/netns") / name for host, name in cable.namespaces.items()}
        for folder in self._folders.values():
            folder.mkdir(parents=True)
            (folder / "nsswitch.conf").write_text("hosts: files\n")
            (folder / "hosts").touch()

    def __call__(self, host: str, address: str) -> None:
        """The head is there, as `host` sees it. Written in place, for the file is mounted."""
        with (self._folders[host] / "hosts").open("w") as hosts:
            hosts.write(f"127.0.0.1 localhost\n{address} {HEAD}\n")

    def close(self) -> None:
        for folder in self._folders.values():
            shutil.rmtree(folder)
        with suppress(OSError):
            Path("/etc/netns").rmdir()


@pytest.fixture
def names(cable: Cable) -> Iterator[Names]:
    with closing(Names(cable)) as names:
        yield names


@needs_cable
def test_by_keys_over_a_cable_that_is_deaf_on_one_side_and_narrow(cable: Cable, tmp_path: Path, keys: Keys) -> None:
    """What is sent one way arrives, and no answer; for longer than any limit. Then a line on which handshakes are slow,
    too: each fault ends every connection."""
    addresses = {host: f"{address}:{PORT}" for host, address in ADDRESSES.items()}
    with (
        share("gpu0", tmp_path / "gpu0", cable, keys, **addresses) as learner,
        share("cpu1", tmp_path / "cpu1", cable, keys, **addresses) as actors,
    ):
        takes(learner, 1)
        for deaf in ADDRESSES:
            with cable.deaf(deaf):
                takes_none(learner, 1, DEAF_S)
                takes(learner, 0)
            with cable.narrow(1 << 20):
                takes(learner, 1)
        assert lost(learner) <= 2  # the window, each time
        ends_with_closed_books(learner, actors)


@needs_cable
def test_by_keys_over_connections_that_are_mute_and_then_reset(cable: Cable, tmp_path: Path, keys: Keys) -> None:
    far = {"gpu0": f"{BESIDE}:{PORT}", "cpu1": ADDRESSES["cpu1"]}
    with (
        between_hosts(cable, range(PORT, PORT + 6)) as do,
        share("gpu0", tmp_path / "gpu0", cable, keys, **far | {"gpu0": f"{ADDRESSES['gpu0']}:{PORT}"}) as learner,
        share("cpu1", tmp_path / "cpu1", cable, keys, **far) as actors,
    ):
        takes(learner, 1)
        do(lambda proxy: proxy.mute(True))
        takes_none(learner, 1, DEAF_S)
        do(lambda proxy: proxy.mute(False))
        takes(learner, 1)
        do(Proxy.cut)
        takes(learner, 1)
        assert lost(learner) <= 2  # the window, each time
        ends_with_closed_books(learner, actors)


@needs_cable
def test_a_head_whose_name_is_known_late_and_that_moves(cable: Cable, names: Names, tmp_path: Path) -> None:
    """Nodes wait for the name that they bind, dial names, and look them up again each time: nobody is started anew."""
    addresses = {"gpu0": HEAD, "cpu1": ADDRESSES["cpu1"]}
    with share("cpu1", tmp_path / "cpu1", cable, **addresses) as actors:
        actors.pid("actor-1")
        with share("gpu0", tmp_path / "gpu0", cable, **addresses) as learner:
            learner.until(lambda: f"{HEAD} has no address on this machine yet" in learner.said, "what it waits for")
            names("gpu0", ADDRESSES["gpu0"])
            takes(learner, 0)
            assert of_actor(learner, 1) == 0
            names("cpu1", ADDRESSES["gpu0"])
            takes(learner, 1)
            assert len(learner.lives()) == len(dict(learner.lives()))
        moved = "10.77.0.3"
        ip("-n", cable.namespaces["gpu0"], "addr", "flush", "dev", cable.ends["gpu0"])
        ip("-n", cable.namespaces["gpu0"], "addr", "add", f"{moved}/24", "dev", cable.ends["gpu0"])
        names("gpu0", moved)
        names("cpu1", moved)
        with share("gpu0", tmp_path / "gpu0", cable, **addresses) as learner:
            takes(learner, 1)
            assert [life for life in actors.lives() if life[0] == "actor-1"] == [("actor-1", actors.pid("actor-1"))]
            ends_with_closed_books(learner, actors, killed=True)


# ── a proxy between two shares on this machine ───────────────────────────────────────────────────────────────────


def test_connections_that_are_late_and_then_mute(tmp_path: Path) -> None:
    """200 ms each way; then a line that keeps its connections, takes new ones and carries nothing."""
    port = free_ports(6)
    near, far = "127.0.0.1", "127.0.0.2"
    with (
        between(near, far, range(port, port + 6)) as do,
        share("gpu0", tmp_path / "gpu0", gpu0=f"{near}:{port}", cpu1="127.0.0.3") as learner,
        share("cpu1", tmp_path / "cpu1", gpu0=f"{far}:{port}", cpu1="127.0.0.3") as actors,
    ):
        takes(learner, 1)
        do(lambda proxy: setattr(proxy, "delay_s", 0.2))
        takes(learner, 1, 10)
        do(lambda proxy: setattr(proxy, "delay_s", 0.0))
        do(lambda proxy: proxy.mute(True))
        takes_none(learner, 1, DEAF_S)
        takes(learner, 0)
        do(lambda proxy: proxy.mute(False))
        takes(learner, 1)
        assert lost(learner) <= 1  # the window
        ends_with_closed_books(learner, actors)
