"""Joining a run: what a head may answer, and what becomes of it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddrl_bus.errors import (
    DdrlError,
    EnvError,
    RemoteError,
    SecurityError,
    TopologyError,
    UnreachableError,
    UsageError,
    VersionError,
    WireError,
)
from ddrl_bus.launch import join as joining
from ddrl_bus.launch.join import address_of, join
from ddrl_bus.launch.start import plan_of
from ddrl_bus.messages import Join, Joined, fields_of, parse
from ddrl_bus.topology import Plan
from ddrl_bus.transport import wire
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links import Request
from ddrl_bus.versions import versions

HOSTS = ["hosts={gpu0: 127.0.0.1, cpu1: 127.0.0.1:7177, idle: 127.0.0.1:7277}", "nodes.actor.host=cpu1"]
CPU1 = Join(versions(), host="cpu1")
OURS = ".".join(map(str, wire.PROTOCOL))
OTHER = wire.PROTOCOL[0] + 1, 0
"""Of the protocol."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("quickstart", HOSTS, probe=False)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found: int = free.getsockname()[1]
        return found


def answer(plan: Plan, text: str | None = None, **change: Any) -> Callable[[Request], None]:
    """A head of this plan."""
    data = (plan.lock() if text is None else text).encode()
    joined = Joined(hashlib.sha256(data).hexdigest(), versions(), {"actor-1": 3 << 32}, [])

    def handle(request: Request) -> None:
        fields = fields_of(dataclasses.replace(joined, **change))
        request.answer(Joined.KIND, fields, {"topology": np.frombuffer(data, np.uint8)})

    return handle


@asynccontextmanager
async def head(handle: Callable[[Request], None], port: int) -> AsyncIterator[str]:
    address = f"tcp://127.0.0.1:{port}"
    bus = Bus("controller-0", 1, Ledger())
    serving = asyncio.create_task(bus.server("progress", [address]).serve(handle))
    try:
        yield address
    finally:
        serving.cancel()
        bus.close()


async def test_the_plan_is_the_head_s_and_lives_are_told(plan: Plan, port: int, said: list[str]) -> None:
    asked: list[Join] = []

    def handle(request: Request) -> None:
        asked.append(parse(Join, request.message))
        answer(plan)(request)

    async with head(handle, port) as address:
        share = await join(address, CPU1, said.append)
        process = await join(address, Join({}, process="actor-1"), said.append)
    assert dataclasses.replace(share.plan, ipc_dir=Path()) == dataclasses.replace(plan, ipc_dir=Path())
    assert (share.host, share.lives, process.host) == ("cpu1", {"actor-1": 3 << 32}, "cpu1")
    assert asked == [CPU1, Join({}, process="actor-1")]
    assert said == []


async def test_other_versions_are_named_with_both_sides(plan: Plan, port: int, said: list[str]) -> None:
    mine = versions()
    there = mine | {"torch": "9.9.9", "python": f"{mine['python']}9", "numpy": "0.1", "gymnasium": None}
    async with head(answer(plan, versions=there), port) as address:
        await join(address, CPU1, said.append)
    assert said == [
        f"warning: cpu1 has torch {mine['torch']}, gpu0 has 9.9.9",
        f"warning: cpu1 has gymnasium {mine['gymnasium']}, gpu0 has none",
    ]


async def test_an_environment_that_is_not_here_names_both_sides(plan: Plan, port: int, said: list[str]) -> None:
    text = plan.lock().replace("CartPole-v1", "CartPole-v9")
    async with head(answer(plan, text, versions=versions() | {"gymnasium": "9.9"}), port) as address:
        with pytest.raises(EnvError, match=r"cpu1 \(gymnasium .*\): CartPole-v9: .*; gpu0 has gymnasium 9\.9"):
            await join(address, CPU1, said.append)


async def test_a_head_that_comes_late(plan: Plan, port: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "FIRST_S", 0.0)
    monkeypatch.setattr(joining.remote.Controller.ask, "__defaults__", (None, 0.2))
    spoke = asyncio.Event()

    def note(words: str) -> None:
        said.append(words)
        spoke.set()

    waiting = asyncio.create_task(join(f"tcp://127.0.0.1:{port}", CPU1, note))
    await spoke.wait()
    assert said[0].endswith(" s (Connection refused); on the head type:  ddrl run TOPO")
    async with head(answer(plan), port):
        assert (await waiting).host == "cpu1"


async def test_a_head_that_never_comes(port: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "WAIT_S", 0.3)
    monkeypatch.setattr(joining.remote.Controller.ask, "__defaults__", (None, 0.2))
    with pytest.raises(UnreachableError, match=rf"nobody answers at tcp://127\.0\.0\.1:{port} for .*; is the head"):
        await join(f"tcp://127.0.0.1:{port}", CPU1, said.append)


async def test_an_earlier_start_is_waited_for_and_not_for_ever(
    plan: Plan, port: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "AGAIN_S", 0.01)
    present = iter([["actor-0"], ["actor-0"], []])

    def handle(request: Request) -> None:
        answer(plan, present=next(present))(request)

    async with head(handle, port) as address:
        await join(address, CPU1, said.append)
    assert said == ["waiting until actor-0 of an earlier start left"]
    monkeypatch.setattr(joining, "LEAVE_S", 0.0)
    async with head(answer(plan, present=["actor-0", "actor-1"]), port) as address:
        with pytest.raises(UsageError, match="there already: actor-0, actor-1 of cpu1; end that start"):
            await join(address, CPU1, said.append)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Join({}, host="cpu7"), "'cpu7' is no host of it with nodes; can join: cpu1"),
        (Join({}, host="idle"), "'idle' is no host of it with nodes; can join: cpu1"),
        (Join({}, host="gpu0"), "'gpu0' is the head, which needs the file: -t TOPO; can join: cpu1"),
        (Join({}, process="learner-0"), "'gpu0' is the head"),
        (Join({}, process="actor-9"), "no node 'actor-9'; have actor-0"),
    ],
)
async def test_who_cannot_join(plan: Plan, port: int, said: list[str], wanted: Join, words: str) -> None:
    async with head(answer(plan), port) as address:
        with pytest.raises(UsageError, match=words):
            await join(address, wanted, said.append)


async def test_what_the_head_refuses(port: int, said: list[str]) -> None:
    async with head(lambda request: request.refuse("quickstart is ending (steps)"), port) as address:
        with pytest.raises(RemoteError, match=r"quickstart is ending \(steps\)"):
            await join(address, CPU1, said.append)


LOCK = plan_of("quickstart", HOSTS, probe=False).lock()


@pytest.mark.parametrize(
    ("text", "change", "error", "words"),
    [
        (None, {"digest": "0" * 64}, DdrlError, "does not match its digest"),
        ("", {}, TopologyError, "topology of tcp://127.0.0.1:[0-9]*: expected a locked topology"),
        ("a: [", {}, TopologyError, "not YAML"),
        (f"extends: ../x.yaml\n{LOCK}", {}, TopologyError, "extends: a locked topology stands for itself"),
        (LOCK.replace("seed: 1", "seed: ${HOME}"), {}, TopologyError, r"\$\{HOME\} is not set"),
        (LOCK.replace("seed: 1", "seed: !!python/name:os.system 1"), {}, TopologyError, "refused; a topology is plain"),
        (LOCK + "# " + "x" * (1 << 20), {}, DdrlError, "no topology"),
        (None, {"lives": {"actor-0": "later"}}, WireError, "fields: joined"),
    ],
)
async def test_a_hostile_head(
    plan: Plan, port: int, said: list[str], text: str | None, change: Any, error: type[Exception], words: str
) -> None:
    async with head(answer(plan, text, **change), port) as address:
        with pytest.raises(error, match=words):
            await join(address, CPU1, said.append)


async def test_no_module_is_imported_by_a_name_from_the_wire(plan: Plan, port: int, said: list[str]) -> None:
    text = plan.lock().replace("CartPole-v1", "antigravity:CartPole-v1")
    async with head(answer(plan, text), port) as address:
        with pytest.raises(SecurityError, match=r"import 'antigravity'.*add  --import antigravity"):
            await join(address, CPU1, said.append)
        assert "antigravity" not in sys.modules
        text = plan.lock().replace("CartPole-v1", "gymnasium.envs:CartPole-v1")
    async with head(answer(plan, text), port) as address:
        assert (await join(address, CPU1, said.append, ["gymnasium.envs"])).host == "cpu1"


async def test_another_major_of_the_protocol_is_refused_and_both_are_named(
    plan: Plan, port: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head answers in its own version, whatever it was asked in."""

    def handle(request: Request) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(wire, "PROTOCOL", OTHER)
            answer(plan)(request)

    async with head(handle, port) as address:
        with pytest.raises(
            VersionError, match=rf"127.0.0.1:\d+: .*protocol {OTHER[0]}\.0 here, we speak {OURS}; install the same"
        ):
            await join(address, CPU1, said.append)
    assert VersionError.exit_code == 64


async def test_a_server_tells_a_client_of_another_major(port: int) -> None:
    import zmq.asyncio

    frame = bytearray(wire.encode(Join.KIND, "people-1", 1, 1, fields_of(CPU1)))
    frame[4] = 7
    async with head(lambda request: request.answer("never"), port) as address:
        with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.connect(address)
            await dealer.send(bytes(frame))
            async with asyncio.timeout(10):
                told = wire.decode(await dealer.recv())
    assert told.fields["error"].endswith(f"protocol 7.0 here, we speak {OURS}")


@pytest.mark.parametrize("text", ["tcp://10.0.0.1:7077", "10.0.0.1:7077", "10.0.0.1", "tcp://10.0.0.1"])
def test_addresses(text: str) -> None:
    assert address_of(text) == "tcp://10.0.0.1:7077"
    assert address_of("gpu0.lan:80") == "tcp://gpu0.lan:80"
    assert address_of("gpu0@10.0.0.1") == address_of("tcp://gpu0@10.0.0.1:7077") == "tcp://gpu0@10.0.0.1:7077"
    assert address_of("tcp://[fd00::5]:80") == "tcp://[fd00::5]:80"


@pytest.mark.parametrize(
    "text",
    ["", "tcp://", "ipc:///tmp/x", "@10.0.0.1", "-x@10.0.0.1", "10.0.0.1:0", "0.0.0.0", "tcp://*:7077", "http://a"],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match=r"expected the head's address, such as tcp://10\.0\.0\.1:7077"):
        address_of(text)
