"""What cannot work is refused in words, end to end; garbage at the sockets of a run that trains harms nobody."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import zmq
from runs import CALM, ENVIRON, FOREVER, SMALL, Run, assert_closed, command, running

from ddrl_bus.launch.catalog import load_lock
from ddrl_bus.transport import wire

Strangers = Callable[[int, str], zmq.Socket[bytes]]
TINY = ("nodes.actor.envs=4", "algo.batch=8", "algo.unroll=5")


def refused(folder: Path, *words: str, name: str = "ddrl") -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    argv = command(*words, name=name)
    return subprocess.run(argv, capture_output=True, text=True, timeout=150, env=ENVIRON, cwd=folder, check=False)


# ── environments ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_environment_that_does_not_exist(tmp_path: Path) -> None:
    found = refused(tmp_path, "run", "quickstart", "env.id=CartPoel-v1")
    assert found.returncode == 65
    assert found.stdout == ""
    assert re.search(r"env\.id: CartPoel-v1: no such environment; did you mean 'CartPole-v1'\?", found.stderr)
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "walks:Walk-v0: environment 0, step 1: RuntimeError: fell over"),
        ("nan", "walks:Walk-v0: environment 0, step 1: observation [nan nan] is not finite"),
    ],
)
def test_an_environment_that_always_fails(tmp_path: Path, fault: str, words: str) -> None:
    with running(tmp_path / "run", *FOREVER, *TINY, "env.id=walks:Walk-v0", f"env.kwargs.fault={fault}") as run:
        ended = run.ends(code=65)
        assert ended["reason"] == "failed"
        assert words in run.said
        assert "Traceback" in run.said
        log = r"(actor-\d|evaluator-0) on \S+ failed with exit code 65; its log is \S+/logs/\1\.log\n"
        assert re.search(log, run.said)
        assert not run.alive()


@pytest.mark.slow
def test_an_environment_that_fails_once_in_a_while(tmp_path: Path) -> None:
    """One actor's one fault: its environments are rebuilt, nobody restarts, no end of an episode is made up."""
    once = f"env.kwargs.once={tmp_path}/fell"
    walk = ["env.id=walks:Walk-v0", "env.kwargs.fault=raise", "env.kwargs.at=300", once]
    with running(tmp_path / "run", "stop.reward=null", "stop.steps=12000", *TINY, *walk) as run:
        ended = run.ends()
        assert (ended["reason"], ended["restarts"]) == ("steps", 0)
        assert sum(run.counters(f"actor-{n}")["env_faults"] for n in (0, 1)) == 1
        assert "rebuilding environments, fault 1 of 3 in a row: walks:Walk-v0: environment" in run.said
        assert_closed(run.books())


# ── places that are taken ────────────────────────────────────────────────────────────────────────────────────────


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        hosts = f"hosts={{a: '127.0.0.1:{port}', b: 127.0.0.2}}"
        where = ["nodes.actor.host=b", "nodes.learner.host=a", "insecure=true"]
        found = refused(tmp_path, "-t", "quickstart", hosts, *where, *SMALL, "--host", "a", name="ddrl_node")
    assert found.returncode == 64
    assert f"cannot bind tcp://127.0.0.1:{port}: the address is in use" in found.stderr


# ── hostile bytes ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def strangers() -> Iterator[Strangers]:
    with zmq.Context() as context, ExitStack() as held:

        def stranger(kind: int, address: str) -> zmq.Socket[bytes]:
            made = held.enter_context(context.socket(kind))
            made.linger = 0
            made.connect(address)
            return made

        yield stranger


def garbage(seed: int) -> Iterator[list[bytes]]:
    """Random, truncated, grown, oversized and multi-part messages, and valid ones from strangers."""
    dice = random.Random(seed)
    fields = {"version": 0, "learner_epoch": 0, "returns": [], "lengths": []}
    valid = [
        bytes(wire.encode(kind, "actor-7", 1 << 32, 1, fields))
        for kind in ("trajectory", "progress", "weights", "_probe", "status", "nonsense")
    ]
    for _ in range(60):
        frame = dice.choice(valid)
        yield [dice.randbytes(dice.choice((0, 1, 16, 64, 1000, 100_000)))]
        yield [frame[: dice.randrange(len(frame))]]
        yield [frame + dice.randbytes(dice.randrange(1, 200))]
        flipped = bytearray(frame)
        flipped[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
        yield [bytes(flipped)]
        yield [dice.randbytes(20) for _ in range(dice.randrange(2, 5))]
        yield [frame]
    yield [b"DDRL" + bytes(4) + b"\xff" * 8 + bytes(1 << 20)]


def bound_sockets(run: Run) -> dict[str, int]:
    """Every address that a node of the run has bound, and the kind of socket that can talk to it."""
    plan = load_lock(run.folder)
    found = {}
    for name in plan.nodes:
        for port in plan.ports(name).values():
            for address in port.binds:
                match port.link.kind:
                    case "queue":
                        found |= {address: zmq.PUSH, f"{address}.c": zmq.XSUB}
                    case "latest":
                        found[address] = zmq.XSUB
                    case "request":
                        found[address] = zmq.DEALER
    return found


@contextmanager
def streams_that_are_no_zmq(addresses: Iterable[str]) -> Iterator[None]:
    """Each is sent some bytes and connected to for the time of the block, in silence."""
    dice = random.Random(1)
    with ExitStack() as silent:
        for address in addresses:
            path = address.removeprefix("ipc://")
            for size in (0, 1, 10, 64, 5000):
                with socket.socket(socket.AF_UNIX) as raw:
                    raw.connect(path)
                    raw.settimeout(1)
                    try:
                        raw.sendall(dice.randbytes(size))
                    except OSError:
                        assert size == 5000  # it was cut off already
            silent.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        yield


@pytest.mark.slow
def test_garbage_at_every_bound_socket(tmp_path: Path, strangers: Strangers) -> None:
    """Messages, then raw bytes at the ipc paths, connections that say nothing, and ones that come and go."""
    with running(tmp_path / "run", *FOREVER, *CALM) as run:
        run.until(lambda: run.trained() > 20, "training")
        sockets = bound_sockets(run)
        assert len(sockets) == 5  # trajectories and its credits, weights, control, progress
        for seed, (address, kind) in enumerate(sockets.items()):
            stranger = strangers(kind, address)
            for parts in garbage(seed):
                if kind == zmq.XSUB:  # what looks like a subscription to anything, or to everything
                    parts = [b"\x01" + parts[0][:200]]
                stranger.send_multipart(parts)
        time.sleep(1.0)
        run.trains_on(50, "training after garbage")
        with streams_that_are_no_zmq(sockets):
            run.trains_on(50, "training beside strangers")
        assert {node["state"] for node in run.answers()["nodes"].values()} == {"running"}
        run.process.send_signal(signal.SIGTERM)
        ended = run.ends()
        assert (ended["reason"], ended["restarts"]) == ("stop", 0)
        assert_closed(run.books())
        assert run.books().lost == run.books().refused == 0
        strays = {name: n for name, n in run.counters("learner-0").items() if "/stray/" in name and n}
        assert {"trajectories/stray/magic", "trajectories/stray/parts", "trajectories/stray/hello"} <= strays.keys()
        controller = run.counters("controller-0")
        assert sum(n for name, n in controller.items() if name.startswith("progress/stray/")) > 100
