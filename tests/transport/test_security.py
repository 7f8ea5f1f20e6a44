"""Strangers, impostors, other names and revoked keys, on every socket of a guarded node."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import zmq
from harness import WAIT_S, Net, number_of, numbered, until
from zmq.utils.monitor import recv_monitor_message

from ddrl_bus import keys
from ddrl_bus.errors import SecurityError, UnreachableError
from ddrl_bus.keys import AllowList, Entry, KeyPair
from ddrl_bus.transport import security, wire, zeromq
from ddrl_bus.transport.base import SocketKind, back_channel
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger
from ddrl_bus.transport.links.end import topic
from ddrl_bus.transport.security import Access, Guard, Peer
from ddrl_bus.transport.sessions.latest import NOTHING, Ask
from ddrl_bus.transport.sessions.request import REPEAT_S
from ddrl_bus.transport.zeromq import ZmqBackend

QUIET_S = 0.4
"""A handshake takes a few milliseconds; who is not in after this long is kept out."""
CUT_S = 2.0
LINKS = {"data": ("learner", "actor"), "weights": ("publisher", "subscriber"), "ask": ("server", "client")}
"""Link → (who binds, who dials). The binders are on gpu0, the diallers on cpu1."""
TARGETS = {  # socket → link, address of which node, and the kind of socket that dials it
    "data": ("data", "learner", zmq.PUSH),
    "credits": ("data", "learner", zmq.SUB),
    "weights": ("weights", "publisher", zmq.SUB),
    "requests": ("ask", "server", zmq.DEALER),
}
OTHER = Peer("cpu2", "evaluator")
"""A node of another host, which may ask, as `other`, and nothing else."""


@pytest.fixture
def scheme() -> str:
    return "tcp"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where all hosts of a test keep their keys, and their common allow-list."""
    monkeypatch.setenv(keys.ENVIRONMENT, str(tmp_path / "keys"))
    monkeypatch.setattr(security, "RELOAD_S", 0.1)
    for host in ("gpu0", "cpu1", "cpu2"):
        keys.new(host)
    return keys.folder()


class Guarded(Net):
    """The links of the harness between the hosts gpu0, cpu1 and cpu2, all guarded."""

    def __init__(self) -> None:
        super().__init__("tcp")
        self.guards: dict[str, Guard] = {}

    def access(self, node: str) -> Access:
        binds, servers, guests = set(), {}, {}
        for link, (binder, dialler) in LINKS.items():
            address = self.address(binder)
            addresses = [address, back_channel(address)]
            if node == binder:
                binds.update(addresses)
                guests[link] = {dialler: Peer("cpu1", "actor")} | ({"other": OTHER} if link == "ask" else {})
            elif node == dialler or (node == "other" and link == "ask"):
                servers.update(dict.fromkeys(addresses, Peer("gpu0", "learner")))
        return Access(binds=frozenset(binds), servers=servers, guests=guests)

    def guard(self, node: str, ledger: Ledger) -> Guard:
        host = "gpu0" if any(node == binder for binder, _ in LINKS.values()) else "cpu2" if node == "other" else "cpu1"
        self.guards[node] = Guard(node, self.access(node), keys.own(host), AllowList(), ledger)
        return self.guards[node]


@pytest.fixture
async def net() -> AsyncIterator[Guarded]:
    net = Guarded()
    yield net
    await net.close()
    assert net.unhandled == []


class World:
    """One of each end at work, and bare sockets that want to join in."""

    def __init__(self, net: Guarded, context: zmq.Context[zmq.Socket[bytes]], *, dialled: bool = True) -> None:
        self.net, self.context, self.i, self.asked = net, context, 0, list[str]()
        self._strangers: list[zmq.Socket[bytes]] = []
        self.receiver, self.publisher, self.server = net.receiver(window=4), net.publisher(), net.server()
        if dialled:
            self.sender, self.subscriber, self.client = net.sender(), net.subscriber(), net.client()
        net.spawn(self._serve())

    async def _serve(self) -> None:
        while True:
            request = await self.server.recv()
            self.asked.append(request.message.node)
            request.answer("echo")

    async def good(self) -> None:
        """Something passes over every link."""
        async with asyncio.timeout(WAIT_S):
            self.i += 1
            self.publisher.publish(self.i, numbered(self.i), {"i": self.i})
            await self.sender.send(numbered(self.i), {"i": self.i})
            while number_of(await self.receiver.recv()) != self.i:
                pass
            while number_of(await self.subscriber.next()) != self.i:
                pass
            await self.client.request("ask", timeout_s=WAIT_S)

    def address(self, target: str) -> str:
        address = self.net.address(TARGETS[target][1])
        return back_channel(address) if target == "credits" else address

    def stranger(self, target: str, pair: KeyPair | None, server: str, *, plain: bool = False) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.context.socket(TARGETS[target][2])
        self._strangers.append(socket)
        socket.setsockopt(zmq.LINGER, 0)
        if plain:
            socket.setsockopt(zmq.PLAIN_USERNAME, b"cpu1")
            socket.setsockopt(zmq.PLAIN_PASSWORD, b"x")
        elif pair is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
        socket.connect(self.address(target))
        return socket

    async def gets_something_done(self, target: str, socket: zmq.Socket[bytes]) -> bool:
        """Whether a message of the bare socket is read, or one reaches it. It speaks as the actor, or the client."""
        before = self._read(target)
        node = LINKS[TARGETS[target][0]][1]
        if socket.type == zmq.SUB:
            socket.subscribe(b"")
            own = topic(b"Q" if target == "credits" else b"S", node, 1)
            socket.subscribe(own)
            socket.subscribe(own + b"F" + Ask(1, 1, 0, NOTHING, NOTHING, 0).text())
        else:
            for seq in range(900, 903):
                socket.send(wire.encode("ask", node, 0, seq, {}, lane=seq), zmq.NOBLOCK)
        deadline = time.monotonic() + QUIET_S
        while time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            if self._read(target) != before or (socket.type != zmq.PUSH and socket.poll(0)):
                return True
            if target == "weights":
                self.i += 1
                self.publisher.publish(self.i, numbered(self.i), {"i": self.i})
        return False

    def _read(self, target: str) -> object:
        link, node, _ = TARGETS[target]
        counts = self.net.counts(node, f"{link}/")
        quiet = ["messages_out", "bytes_out", "value_bytes_out", "encode_ns", "questions"]  # its own doing
        if target == "requests":  # told later of what was read before
            quiet += ["decode_ns", "wire_ns"]
        return {name: count for name, count in counts.items() if name not in quiet}


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
async def world(net: Guarded, context: zmq.Context[zmq.Socket[bytes]]) -> AsyncIterator[World]:
    world = World(net, context)
    await world.good()
    yield world
    await world.good()


def pair() -> KeyPair:
    """Of somebody."""
    public = b"-"
    while not public[:1].isalnum():
        public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


# ── handshakes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
async def test_the_key_of_a_host_that_belongs_there_gets_in(target: str, world: World) -> None:
    """Else the tests below would prove nothing."""
    socket = world.stranger(target, keys.own("cpu1"), keys.own("gpu0").public)
    assert await world.gets_something_done(target, socket)


@pytest.mark.parametrize("who", ["null", "plain", "wrong server key", "unlisted", "another host's", "another role's"])
@pytest.mark.parametrize("target", TARGETS)
async def test_nobody_else_gets_in(target: str, who: str, world: World) -> None:
    server = keys.own("gpu0").public
    if who == "another role's":
        third = pair()  # a second key of cpu1, for evaluators only
        with (keys.folder() / keys.ALLOWED).open("a") as allowed:
            allowed.write(f"cpu1 {third.public} evaluator  # by hand\n")
        await until(lambda: third.public in world.net.guards[TARGETS[target][1]]._by_key)
        socket = world.stranger(target, third, server)
    elif who == "another host's":
        if target == "requests":
            pytest.skip("it belongs there")
        socket = world.stranger(target, keys.own("cpu2"), server)
    elif who == "wrong server key":
        socket = world.stranger(target, keys.own("cpu1"), pair().public)
    elif who == "unlisted":
        socket = world.stranger(target, pair(), server)
    else:
        socket = world.stranger(target, None, server, plain=who == "plain")

    assert not await world.gets_something_done(target, socket)


async def test_a_host_adds_nodes_in_its_own_name_only(world: World) -> None:
    access = Access(
        binds=frozenset({"tcp://10.0.0.1:1"}), hosts=frozenset({"cpu1"}), added={"data": {"actor": "actor"}}
    )
    guard, user = Guard("learner", access, keys.own("gpu0"), AllowList(), Ledger()), keys.own("cpu1").public
    theirs = guard.speakers("data", user)
    assert theirs
    assert "actor-7.cpu1" in theirs
    others = ("actor-7.cpu2", "actor-7", "learner-7.cpu1", "actor-7.cpu1.lan", "cpu1", "actor.cpu1")
    assert not [name for name in others if name in theirs]
    assert not guard.speakers("ask", user)
    assert not guard.speakers("data", keys.own("cpu2").public)  # it is not of `hosts`
    keys.allow(Entry("cpu1", user, frozenset({"learner"})))
    guard.refresh()
    assert not guard.speakers("data", user)


async def test_a_role_is_all_that_its_key_may_be(world: World) -> None:
    """A host that may run learners only, although the topology has an actor on it."""
    guard, user = world.net.guards["learner"], keys.own("cpu1").public
    assert guard.speakers("data", user) == {"actor"}
    keys.allow(Entry("cpu1", user, frozenset({"learner"})))
    assert guard.refresh()
    assert guard.speakers("data", user) == frozenset()
    keys.allow(Entry("cpu1", user, frozenset({"learner", "actor"})))
    guard.refresh()
    assert guard.speakers("data", user) == {"actor"}


async def test_an_impostor_with_the_address_of_a_server_hears_nothing(
    net: Guarded, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    """Whoever sits at the learner's address without its key gets no unroll."""
    thief = pair()
    with context.socket(zmq.PULL) as data, context.socket(zmq.XPUB) as credits:
        for socket, address in ((data, net.address("learner")), (credits, back_channel(net.address("learner")))):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.CURVE_SECRETKEY, thief.secret.encode())
            socket.bind(address)
        net.sender()
        client = net.client()  # to a server that is not there
        with pytest.raises(UnreachableError):
            await client.request("ask", timeout_s=QUIET_S)
        assert not data.poll(0)
        assert not credits.poll(0)


# ── the handler ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["absent", "crashed", "slow"])
@pytest.mark.parametrize("target", TARGETS)
async def test_without_an_answer_nobody_gets_in(
    target: str, state: str, net: Guarded, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    world = World(net, context, dialled=False)
    for bus in (net.bus("learner"), net.bus("publisher"), net.bus("server")):
        backend = bus._zeromq
        assert isinstance(backend, ZmqBackend)
        if state == "absent":
            backend._zap.close()
        elif state == "crashed":
            net.guards[bus.node].zap = lambda request: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        else:  # it hears and has not answered yet
            backend._zap._on_message = lambda parts: None
    socket = world.stranger(target, keys.own("cpu1"), keys.own("gpu0").public)

    assert not await world.gets_something_done(target, socket)


async def test_the_handler_is_there_before_anything_is_bound(net: Guarded) -> None:
    backend = ZmqBackend(net.guard("learner", Ledger()))
    assert backend._zap.raw.getsockopt(zmq.LAST_ENDPOINT) == security.ZAP_ADDRESS.encode()
    socket = backend.socket(SocketKind.PULL, lambda parts: None, bind=[net.address("learner")], link="data")
    assert socket.raw.getsockopt(zmq.ZAP_DOMAIN) == b"data"
    assert socket.raw.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1
    assert socket.raw.getsockopt(zmq.CURVE_SERVER) == 1
    assert socket.raw.getsockopt(zmq.MECHANISM) == zmq.CURVE
    backend.close()


# ── in whose name ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_key_speaks_for_the_nodes_of_its_host_only(world: World) -> None:
    """cpu2 may ask, as `other`; not as cpu1's client, whatever its header and its routing id say."""
    socket = world.stranger("requests", keys.own("cpu2"), keys.own("gpu0").public)
    socket.setsockopt(zmq.IDENTITY, b"client")
    before = len(world.asked)
    socket.send(wire.encode("ask", "client", 1 << 40, 1, {}))
    socket.send(wire.encode("ask", "server", 1 << 40, 1, {}))
    socket.send(wire.encode("ask", "other", 1, 2, {}))
    await until(lambda: world.asked[before:])
    assert world.asked[before:] == ["other"]
    assert world.net.count("server", "ask", "stray", "rights") == 2


async def test_nor_does_a_hello_in_another_name_open_a_lane(world: World) -> None:
    socket = world.stranger("credits", keys.own("cpu1"), keys.own("gpu0").public)
    socket.subscribe(topic(b"Q", "actor-of-another-host", 1))
    await until(lambda: world.net.count("learner", "data", "stray", "rights") == 1)
    assert list(world.receiver.senders) == ["actor"]


async def test_data_in_another_name_is_not_counted_as_anybodys(world: World) -> None:
    socket = world.stranger("data", keys.own("cpu1"), keys.own("gpu0").public)
    accepted = world.net.accepted("learner", "data")
    socket.send(wire.encode("unroll", "learner", 1, 2, {}, lane=1))
    await until(lambda: world.net.count("learner", "data", "stray", "rights") == 1)
    assert world.net.accepted("learner", "data") == accepted


async def test_a_receiver_speaks_of_its_own_credit_only(net: Guarded) -> None:
    """With two receivers on two hosts, the credit of one must not open or close the lane of the other."""
    import msgpack

    sender = net.sender()
    forged = msgpack.packb(["somebody", 5, "actor", 1, 0, 0, 100])
    sender._on_credit("learner", [topic(b"Q", "actor", 1), forged])
    assert not sender.connected
    assert net.count("actor", "data", "stray", "unknown_receiver") == 1


# ── shut out ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_revoked_key_is_cut_off_within_two_seconds_and_may_come_back(world: World) -> None:
    """Also where it has a connection, and where it only listens."""
    net, key = world.net, keys.own("cpu1").public
    other = net.client("other")
    await other.request("ask", timeout_s=WAIT_S)
    listening = world.stranger("weights", keys.own("cpu1"), keys.own("gpu0").public)
    assert await world.gets_something_done("weights", listening)
    keys.revoke("cpu1")
    await asyncio.sleep(CUT_S)
    before = {target: world._read(target) for target in TARGETS}
    while listening.poll(0):
        listening.recv_multipart()
    world.i += 1
    world.publisher.publish(world.i, numbered(world.i), {"i": world.i})
    with pytest.raises(UnreachableError):
        await world.client.request("ask", timeout_s=2 * REPEAT_S)
    assert not listening.poll(0)
    newest = world.subscriber.latest()
    assert newest is None or number_of(newest) < world.i
    assert {target: world._read(target) for target in TARGETS} == before
    await other.request("ask", timeout_s=WAIT_S)  # the others have come back

    keys.allow(Entry("cpu1", key))
    await world.good()


async def test_who_revokes_a_server_talks_to_it_no_more(world: World) -> None:
    gpu0 = keys.own("gpu0").public
    keys.revoke("gpu0")
    await asyncio.sleep(5 * security.RELOAD_S)
    before = len(world.asked)
    with pytest.raises(UnreachableError):
        await world.client.request("ask", timeout_s=2 * REPEAT_S)
    assert len(world.asked) == before
    keys.allow(Entry("gpu0", gpu0))
    await world.good()


async def test_a_list_that_others_can_write_to_lets_nobody_in(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard, user = world.net.guards["learner"], keys.own("cpu1").public
    assert guard.speakers("data", user)
    (folder / keys.ALLOWED).chmod(0o666)
    assert guard.refresh()
    assert not guard.speakers("data", user)
    assert "chmod 600" in caplog.text
    (folder / keys.ALLOWED).chmod(0o600)
    guard.refresh()
    assert guard.speakers("data", user) == {"actor"}


async def test_a_key_that_sends_garbage_is_quarantined(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on its messages are not read, its next handshake fails, and the books of the node name its host."""
    net, gpu0, cpu2 = world.net, keys.own("gpu0").public, keys.own("cpu2")
    clock = [time.monotonic()]
    net.guards["server"]._now = lambda: clock[0]
    socket = world.stranger("requests", cpu2, gpu0)
    for _ in range(security.REFUSALS + 50):
        socket.send(b"garbage")
    await until(lambda: net.count("server", "security", "cpu2", "quarantined") == 1)
    assert sum(net.counts("server", "ask/stray/").values()) == security.REFUSALS + 1
    assert not await world.gets_something_done("requests", world.stranger("requests", cpu2, gpu0))
    await world.good()  # the others do not notice
    assert sum(net.counts("server", "ask/stray/").values()) == security.REFUSALS + 1  # the rest was not read

    clock[0] += security.QUARANTINE_S
    socket.send(wire.encode("ask", "other", 1, 1, {}))
    await until(lambda: "other" in world.asked)
    assert net.count("server", "security", "cpu2", "quarantined") == 0


@pytest.mark.parametrize("topics", ["of garbage", "of lives of its own node"])
async def test_who_subscribes_to_too_much_loses_its_connections(topics: str, world: World) -> None:
    """Each topic is kept by libzmq for as long as the connection that subscribed to it."""
    process = psutil.Process()
    socket = world.stranger("weights", keys.own("cpu1"), keys.own("gpu0").public)
    events = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    assert await world.gets_something_done("weights", socket)
    before = process.memory_info().rss
    for number in range(20_000):
        socket.subscribe(b"%d" % number * 10 if topics == "of garbage" else topic(b"S", "subscriber", number + 2))
    await until(lambda: events.poll(0))
    assert world.net.count("publisher", "security", "cpu1", "quarantined") == 1
    assert process.memory_info().rss - before < 64 << 20
    socket.disable_monitor()
    events.close()
    socket.close()
    world.net.guards["publisher"]._release(keys.own("cpu1").public)  # its host is that of the good ends


async def test_a_huge_topic_is_not_taken_in(world: World) -> None:
    """libzmq keeps each of its bytes as a node of a tree."""
    socket = world.stranger("credits", keys.own("cpu1"), keys.own("gpu0").public)
    events = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    await until(lambda: events.poll(0))
    assert recv_monitor_message(events)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
    before = world._read("credits")
    socket.subscribe(b"Q" + bytes(4 << 10))
    await until(lambda: events.poll(0))
    assert recv_monitor_message(events)["event"] == zmq.EVENT_DISCONNECTED
    assert world._read("credits") == before
    socket.disable_monitor()
    events.close()
    socket.close()


async def test_a_flood_of_connections_stalls_nobody_and_leaves_nothing(
    net: Guarded, context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent ones, ones that stop in the middle of the handshake, and strangers that go on trying, on every socket."""
    monkeypatch.setitem(zeromq.OPTIONS, zmq.HANDSHAKE_IVL, 1_000)
    world, process, flood = World(net, context), psutil.Process(), list[socket.socket]()
    await world.good()
    before = process.num_fds()
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    for number in range(200):
        host, _, port = world.address(list(TARGETS)[number % len(TARGETS)]).removeprefix("tcp://").rpartition(":")
        flood.append(socket.create_connection((host, int(port)), timeout=WAIT_S))
        if number % 8 < 4:
            flood[-1].send(greeting)
        if number % 20 == 0:
            await world.good()
    strangers = [world.stranger(target, pair(), keys.own("gpu0").public) for target in TARGETS for _ in range(5)]
    await until(lambda: world.net.count("learner", "security", "denied") >= 10)
    for _ in range(20):
        await world.good()
    for stranger in strangers:
        stranger.close()
    await until(lambda: process.num_fds() <= before + len(flood) + 4)  # theirs are closed, ours not yet
    for plug in flood:
        plug.close()
    await world.good()
    assert process.num_fds() <= before + 4


async def test_a_few_refusals_a_minute_are_no_reason(net: Guarded) -> None:
    guard, user, clock = net.guard("server", Ledger()), keys.own("cpu2").public, [0.0]
    guard._now = lambda: clock[0]
    for _ in range(10 * security.REFUSALS):
        guard.refused(user)
        clock[0] += 1.1 * security.WITHIN_S / security.REFUSALS
    assert guard.speakers("ask", user) == {"other"}


# ── nothing by accident ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_address_that_nobody_spoke_of_is_neither_bound_nor_dialled(net: Guarded) -> None:
    bus = Bus("learner", 1, Ledger(), guard=Guard("learner", Access(), None, AllowList(), Ledger()))
    with pytest.raises(SecurityError, match="in the open"):
        bus.receiver("data", ["tcp://10.0.0.1:7077"], 4)
    with pytest.raises(SecurityError, match="in the open"):
        bus.client("ask", "tcp://10.0.0.1:7077")
    bus.close()


async def test_local_sockets_stay_as_they_are_beside_guarded_ones(net: Guarded) -> None:
    """One XPUB, PULL or ROUTER serves ipc in the open and tcp by key."""
    near = f"ipc://{net.folder}/near"
    server = net.bus("server").server("ask", [net.address("server"), near])
    local, far = Bus("people", 1, Ledger()), net.client()
    async with asyncio.timeout(WAIT_S):
        for client in (local.client("ask", near), far):
            answer = client.ask("ask", timeout_s=WAIT_S)
            (await server.recv()).answer("echo")
            await answer
    local.close()


@pytest.fixture
def everything_logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


async def test_logs_name_hosts_and_public_keys_but_no_secret(
    world: World, everything_logged: pytest.LogCaptureFixture
) -> None:
    socket = world.stranger("data", stranger := pair(), keys.own("gpu0").public)
    assert not await world.gets_something_done("data", socket)
    assert "denied link=data address=" in everything_logged.text
    assert stranger.public in everything_logged.text
    said = everything_logged.text + repr(vars(world.net.guards["learner"]))
    for host in ("gpu0", "cpu1", "cpu2"):
        assert keys.own(host).secret not in said
