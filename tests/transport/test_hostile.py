"""Strangers on every bound socket: whatever they send is refused and counted, and good ends never notice."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator

import msgpack
import numpy as np
import pytest
import zmq
from harness import LARGE, WAIT_S, Net, number_of, numbered, until

from ddrl_bus.errors import UnreachableError
from ddrl_bus.transport import wire
from ddrl_bus.transport.base import back_channel
from ddrl_bus.transport.links import queue
from ddrl_bus.transport.links.end import topic
from ddrl_bus.transport.sessions.latest import CHUNK, NOTHING, Ask, digest
from ddrl_bus.transport.wire import MAX_FRAME

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(20, b"\0") + bytes(32)
TARGETS = ["data", "credits", "weights", "requests"]
TYPES = (
    *(zmq.PAIR, zmq.PUB, zmq.SUB, zmq.REQ, zmq.REP, zmq.DEALER),
    *(zmq.ROUTER, zmq.PULL, zmq.PUSH, zmq.XPUB, zmq.XSUB, zmq.STREAM),
)


@pytest.fixture(params=["ipc", "tcp"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Plugged = Callable[[int], "zmq.Socket[bytes]"]


@pytest.fixture
def plugged() -> Iterator[Plugged]:
    """Makes bare sockets."""
    context, sockets = zmq.Context(), list[zmq.Socket[bytes]]()

    def plugged(kind: int) -> zmq.Socket[bytes]:
        sockets.append(context.socket(kind))
        return sockets[-1]

    yield plugged
    context.destroy(linger=0)


class World:
    """One of each end, at work: `good` passes something over every link and looks at what arrives."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.receiver, self.sender = net.receiver(window=4), net.sender()
        self.publisher, self.subscriber = net.publisher(), net.subscriber()
        self.server, self.client = net.server(), net.client()
        self.ran: list[tuple[str, int]] = []
        self.i = 0
        self.forged = False
        """Whether a stranger's message was accepted: then the books show more outcomes than products."""
        self.context = zmq.Context()
        self.strangers: list[zmq.Socket[bytes]] = []
        net.spawn(self._serve())
        data = net.address("learner")
        self.addresses = {
            "data": data,
            "credits": back_channel(data),
            "weights": net.address("publisher"),
            "requests": net.address("server"),
        }

    async def _serve(self) -> None:
        while True:
            request = await self.server.recv()
            self.ran.append((request.message.node, request.message.seq))
            request.answer("echo", {"i": request.message.fields.get("i")})

    async def good(self, rounds: int = 5) -> None:
        async with asyncio.timeout(WAIT_S):
            for _ in range(rounds):
                self.i += 1
                await self.sender.send(numbered(self.i), {"i": self.i})
                assert number_of(await self.receiver.recv()) == self.i
                self.publisher.publish(self.i, numbered(self.i), {"i": self.i})
                assert number_of(await self.subscriber.next()) == self.i
                answer = await self.client.request("ask", {"i": self.i}, timeout_s=WAIT_S)
                assert answer.fields == {"i": self.i}

    def refusals(self, target: str) -> dict[str, int]:
        node, link = {"weights": ("publisher", "weights"), "requests": ("server", "ask")}.get(
            target, ("learner", "data")
        )
        return dict(self.net.counts(node, f"{link}/stray/"))

    def stranger(self, target: str, kind: int) -> zmq.Socket[bytes]:
        stranger: zmq.Socket[bytes] = self.context.socket(kind)
        self.strangers.append(stranger)
        stranger.connect(self.addresses[target])
        return stranger

    def plug(self, target: str) -> socket.socket:
        """A bare stream connection."""
        scheme, _, where = self.addresses[target].partition("://")
        if scheme == "ipc":
            plug = socket.socket(socket.AF_UNIX)
            plug.connect(where)
        else:
            host, _, port = where.rpartition(":")
            plug = socket.create_connection((host, int(port)))
        plug.setblocking(False)
        return plug


@pytest.fixture
async def world(net: Net) -> AsyncIterator[World]:
    world = World(net)
    await world.good(1)
    yield world
    await world.good(2)
    world.context.destroy(linger=0)
    assert await world.sender.flush(WAIT_S)
    assert net.balance().closed != world.forged


# ── bytes that are not even ZMTP ────────────────────────────────────────────────────────────────────────────────────


def ready(kind: str) -> bytes:
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind.encode()
    return bytes([4, len(body)]) + body


def streams(rng: random.Random, peer: str) -> Iterator[bytes]:
    hello = GREETING + ready(peer)
    yield b""
    yield b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200)  # a TLS hello
    yield b"\x01\x00"  # ZMTP 1
    yield b"\xff" * 4096
    yield bytes(4096)
    for size in (1, 9, 10, 11, 64, 65_536):
        yield rng.randbytes(size)
    for cut in range(1, len(GREETING), 7):
        yield GREETING[:cut]
    yield GREETING.replace(b"NULL", b"PLAIN"[:4]) + rng.randbytes(64)
    yield GREETING + rng.randbytes(300)
    yield GREETING + ready("PUSH\x00\xff") + rng.randbytes(50)
    yield hello + b"\x04\xff" + rng.randbytes(255)  # an unknown command
    yield hello + b"\x02" + struct.pack(">Q", 1 << 62) + rng.randbytes(64)
    yield hello + b"\x02" + struct.pack(">Q", MAX_FRAME + 1) + rng.randbytes(64)
    yield hello + b"\x02" + struct.pack(">Q", MAX_FRAME) + rng.randbytes(64)  # announced, never sent
    yield hello + b"\x01\x05never" * 100  # a message that never ends


async def feed(plug: socket.socket, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):  # cut off already
        await loop.sock_sendall(plug, data)


@pytest.mark.parametrize("target", TARGETS)
async def test_streams_of_garbage(world: World, target: str) -> None:
    peers = {"data": "PUSH", "requests": "DEALER"}
    plugs = []
    for stream in streams(world.net.random, peers.get(target, "SUB")):
        plugs.append(world.plug(target))
        await feed(plugs[-1], stream)
    await world.good()  # while every one of them still hangs on the line
    for plug in plugs:
        plug.close()
    await world.good()
    # libzmq still speaks ZMTP 1, which asks nobody for his socket type: some of it arrives as messages.
    assert world.refusals(target).keys() <= {*wire.REASONS, "parts", "hello"}


@pytest.mark.parametrize("size", [MAX_FRAME + 1, 1 << 62])
@pytest.mark.parametrize("target", ["data", "requests"])
async def test_an_oversized_frame_is_cut_off_before_it_comes(world: World, target: str, size: int) -> None:
    plug = world.plug(target)
    await feed(plug, GREETING + ready({"data": "PUSH"}.get(target, "DEALER")))
    await feed(plug, b"\x02" + struct.pack(">Q", size) + bytes(1000))
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(WAIT_S):
        try:
            while await loop.sock_recv(plug, 4096):
                pass
        except ConnectionError:
            pass
    plug.close()


async def test_idle_connections_shut_nobody_out(world: World) -> None:
    plugs = [world.plug(target) for target in TARGETS for _ in range(40)]
    await world.good()
    late = world.net.sender("late")
    await late.send(numbered(0), {"i": 0})
    assert (await world.receiver.recv()).node == "late"
    for plug in plugs:
        plug.close()


# ── ZMTP sockets that send what they like ───────────────────────────────────────────────────────────────────────────


def valid(node: str = "stranger", epoch: int = 1, seq: int = 1, lane: int = 1, kind: str = "ask") -> bytes:
    return bytes(wire.encode(kind, node, epoch, seq, {"i": seq}, {"v": np.full(4, seq)}, lane=lane))


def corpus(rng: random.Random, n: int) -> Iterator[list[bytes]]:
    """Messages in parts; no single frame of them comes from a node that anybody knows."""
    for i in range(n):
        frame = bytearray(valid(seq=i + 1))
        match i % 9:
            case 0:
                yield [rng.randbytes(rng.randrange(2, 300))]
            case 1:
                yield [bytes(frame[: rng.randrange(1, len(frame))])]
            case 2 | 3:
                bit = rng.randrange(8 * 128)
                frame[bit // 8] ^= 1 << bit % 8
                yield [bytes(frame)]
            case 4:
                yield [bytes(frame), bytes(frame)]
            case 5:
                yield [bytes(frame) + rng.randbytes(64)]
            case 6:
                yield [b"DDRL\x02\x00\x00\x00" + rng.randbytes(200)]
            case 7:  # a compressed arena that is not
                frame[6] = 1
                yield [bytes(frame)]
            case _:
                yield [b"", b"", rng.randbytes(20_000)]


@pytest.mark.parametrize("target", ["data", "requests"])
async def test_every_message_of_a_stranger_is_refused_or_answered(world: World, target: str) -> None:
    n, stranger = 1_000, world.stranger(target, {"data": zmq.PUSH}.get(target, zmq.DEALER))
    for i, parts in enumerate(corpus(world.net.random, n)):
        await _send(stranger, parts)
        if i % 250 == 0:
            await world.good(1)
    await until(lambda: _accounted(world, target) == n)
    assert sum(world.refusals(target).values()) > n / 2
    assert world.refusals(target).keys() <= {*wire.REASONS, "parts", "unknown_sender", "running", "old", "fenced"}


async def test_a_run_of_a_stranger_is_refused_message_by_message(world: World) -> None:
    rng, stranger, refused = world.net.random, world.stranger("data", zmq.PUSH), 0
    layout = wire.Layout("ask", {"v": ("int64", (4,))})
    for seq in range(1, 300):
        count = rng.randrange(1, 20)
        maps, arenas = [wire.packed({"i": seq})] * count, [layout.arena()] * count
        run = bytes(wire.encode_run(layout, "stranger", 1, seq, maps, arenas, 1, 1))
        await _send(stranger, [run])
        await _send(stranger, [run[: rng.randrange(len(run))]])  # as a whole
        await _send(stranger, [run + bytes(64)])
        refused += count + 2
    await until(lambda: sum(world.refusals("data").values()) == refused)
    await world.good()


def _accounted(world: World, target: str) -> int:
    strays = sum(world.refusals(target).values())
    answered = sum(node != "client" for node, _ in world.ran) + world.net.count("server", "ask", "repeated")
    return strays + answered if target == "requests" else strays


async def _send(stranger: zmq.Socket[bytes], parts: list[bytes]) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                stranger.send_multipart(parts, zmq.NOBLOCK)
                return
            except zmq.Again:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("target", ["credits", "weights"])
async def test_every_subscription_of_a_stranger_is_refused(world: World, target: str) -> None:
    rng, stranger = world.net.random, world.stranger(target, zmq.XSUB)
    other = {"credits": b"S", "weights": b"Q"}[target]
    own = {"credits": b"Q", "weights": b"S"}[target]
    topics = [
        b"\x01" + other + b"actor\x00" + b"0" * 16 + b"\x00",  # of another link's kind
        b"\x01" + own,
        b"\x01" + own + b"actor\x00" + b"0" * 15 + b"\x00",
        b"\x01" + own + b"actor\x00" + b"g" * 16 + b"\x00",
        b"\x01" + own + b"actor\x00" + b"0" * 16 + b"\x00more",
        b"\x01" + own + b"a" * 65 + b"\x00" + b"0" * 16 + b"\x00",
        b"\x01" + own + b"../\x1b[2J\x00" + b"0" * 16 + b"\x00",
        b"\x01" + own + "актёр".encode() + b"\x00" + b"0" * 16 + b"\x00",
        b"\x01" + bytes(1_000),
    ]
    topics += [b"\x01" + rng.randbytes(rng.randrange(1, 40)) + bytes([i]) for i in range(200)]
    topics += [bytes([rng.randrange(2, 256)]) + rng.randbytes(rng.randrange(300)) for _ in range(200)]
    for each in topics:
        await _send(stranger, [each])
    await until(lambda: world.refusals(target).get("hello") == len(topics))
    for parts in ([b"\x02a", b"b"], [b"", b""], [b"\x00never", b"\x00subscribed"]):
        await _send(stranger, parts)
    await world.good()
    assert world.refusals(target).keys() == {"hello"}


@pytest.mark.parametrize("target", TARGETS)
async def test_sockets_of_every_type_may_knock(world: World, target: str) -> None:
    strangers = [world.stranger(target, kind) for kind in TYPES]
    for stranger in strangers:
        for parts in corpus(world.net.random, 16):
            try:
                stranger.send_multipart(parts, zmq.NOBLOCK)
            except zmq.ZMQError:  # its type cannot send, or nobody let it in
                break
    await world.good()


# ── valid frames, out of place ──────────────────────────────────────────────────────────────────────────────────────


async def test_replays_and_strays_of_data_are_refused_by_name(net: Net, plugged: Plugged) -> None:
    receiver, sender = net.receiver(epoch=5, window=4), net.sender(epoch=7)
    await sender.send(numbered(1), {"i": 1})
    stranger = plugged(zmq.PUSH)
    stranger.connect(net.address("learner"))
    lane = "data/actor@0000000000000007>learner@0000000000000005/duplicates"
    book = net.ledgers["learner@0000000000000005"].snapshot
    far = 2**64 - 1
    for frame, counter in [
        (valid("actor", 7, 1, 5), lane),
        (valid("actor", 7, 1, 4), "data/stray/other_life"),
        (valid("actor", 7, 1, 0), "data/stray/other_life"),
        (valid("actor", 7, 0, 5), "data/stray/beyond_window"),
        (valid("actor", 7, 6, 5), "data/stray/beyond_window"),
        (valid("actor", 7, far, 5), "data/stray/beyond_window"),
        (valid("actor", 6, 2, 5), "data/stray/fenced"),
        (valid("actor", 8, 2, 5), "data/stray/unknown_sender"),
        (valid("actor", far, 2, 5), "data/stray/unknown_sender"),
        (valid("actor-1", 7, 2, 5), "data/stray/unknown_sender"),
        (valid("actor>learner/../\n", 7, 2, 5), "data/stray/unknown_sender"),
        (bytes(wire.encode("_probe", "actor", 7, 0, {"sent": "2"}, lane=5)), "data/stray/probe"),
        (bytes(wire.encode("_probe", "actor", 7, 0, {"sent": -2}, lane=5)), "data/stray/probe"),
        (bytes(wire.encode("_probe", "actor", 7, 0, {}, lane=5)), "data/stray/probe"),
    ]:
        before = book().get(counter, 0)
        stranger.send(frame)
        await until(lambda counter=counter, before=before: book().get(counter, 0) == before + 1)
    for node, epoch, sent, to in [("actor", 7, far, 5), ("actor", 8, 2, 5), ("actor", 7, 2, 4), ("x", 7, 2, 5)]:
        stranger.send(bytes(wire.encode("_probe", node, epoch, 0, {"sent": sent}, lane=to)))
    assert number_of(await receiver.recv()) == 1
    for i in range(2, 20):  # nothing of it moved the lane
        await sender.send(numbered(i), {"i": i})
        assert number_of(await receiver.recv()) == i
    balance = await net.settled(sender)
    assert (balance.produced, balance.taken, balance.lost, balance.duplicates) == (19, 19, 0, 1)


async def test_an_earlier_life_cannot_say_hello_again(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender(epoch=7)
    await sender.send(numbered(1), {"i": 1})
    zombie = net.sender(epoch=6)
    await until(lambda: net.count("learner", "data", "stray", "fenced") == 1)
    assert not zombie.connected
    assert number_of(await receiver.recv()) == 1
    await net.settled(sender)


async def test_replayed_requests_run_once(world: World) -> None:
    stranger = world.stranger("requests", zmq.DEALER)
    ask = valid("client-9", 3, 1)
    stranger.send(ask)
    await until(lambda: world.ran.count(("client-9", 1)) == 1)
    for _ in range(20):
        stranger.send(ask)
    await until(lambda: world.net.count("server", "ask", "repeated") == 20)
    stranger.send(valid("client-9", 2, 2))  # of an earlier life
    await until(lambda: world.refusals("requests") == {"fenced": 1})
    assert world.ran.count(("client-9", 1)) == 1
    await world.good()


async def test_a_replay_of_anothers_request_is_not_run_again(world: World) -> None:
    await world.good(1)
    ran = len(world.ran)
    stranger = world.stranger("requests", zmq.DEALER)
    stranger.send(valid("client", 1, 1))
    await until(lambda: world.net.count("server", "ask", "stray", "old") == 1)
    assert len(world.ran) == ran


async def test_a_flood_of_hellos_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "MAX_LANES", 50)
    stranger = world.stranger("credits", zmq.XSUB)
    for i in range(200):
        await _send(stranger, [b"\x01Qghost-%d\x00%016x\x00" % (i, i)])
    await until(lambda: world.refusals("credits").get("lanes") == 151)
    await world.good()
    assert len(world.receiver.senders) == 50


async def test_a_flood_of_lives_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Books are of the newest alone; all leave counters behind, until the ledger must keep the rest for who is here."""
    monkeypatch.setattr(queue, "SPARE", world.receiver._ledger.room - 100)
    hello, push = world.stranger("credits", zmq.XSUB), world.stranger("data", zmq.PUSH)
    for epoch in range(1, 60):
        await _send(hello, [b"\x01Qghost\x00%016x\x00" % epoch])
        await until(lambda epoch=epoch: _epoch(world, "ghost") + _lanes(world) == epoch)
        if not _lanes(world):
            await _send(push, [valid("ghost", epoch)])
            async with asyncio.timeout(WAIT_S):
                assert (await world.receiver.recv()).node == "ghost"
            assert [sender for sender, _ in world.receiver._books].count("ghost") == 1
    assert 30 < _epoch(world, "ghost") == 59 - _lanes(world) < 50
    await world.good()
    world.forged = True


def _epoch(world: World, node: str) -> int:
    inbound = world.receiver.senders.get(node)
    return inbound.epoch if inbound is not None else 0


def _lanes(world: World) -> int:
    return world.refusals("credits").get("lanes", 0)


# ── impostors at an address that our ends connect to ────────────────────────────────────────────────────────────────


async def heard(bound: zmq.Socket[bytes]) -> bytes:
    """What the first one to come says first."""
    await until(lambda: bound.poll(0))
    return bound.recv_multipart()[0]


async def test_garbage_credits_are_refused(net: Net, plugged: Plugged) -> None:
    sender = net.sender()
    liar = plugged(zmq.XPUB)
    liar.bind(back_channel(net.address("learner")))
    topic = (await heard(liar))[1:]
    good = ["learner", 1, "actor", 1, 0, 0, 4]
    bad: list[list[bytes]] = [
        [topic],
        [topic, b""],
        [topic, b"\xc1"],
        [topic, msgpack.packb(good), b""],
        [topic, msgpack.packb(good[:-1])],
        [topic, msgpack.packb([*good[:-1], True])],
        [topic, msgpack.packb([*good[:-1], 1.5])],
        [topic, msgpack.packb([*good[:-1], -1])],
        [topic, msgpack.packb(["nobody", *good[1:]])],
        [topic, net.random.randbytes(100)],
    ]
    for parts in bad:
        liar.send_multipart(parts)
    await until(lambda: sum(net.counts("actor", "data/stray/").values()) == len(bad))
    for credit in (["learner", 1, "other", 1, 0, 0, 4], ["learner", 1, "actor", 2, 0, 0, 4], [*good[:4], 9, 9, 9]):
        liar.send_multipart([topic, msgpack.packb(credit)])
    liar.send_multipart([topic, b""])
    await until(lambda: sum(net.counts("actor", "data/stray/").values()) == len(bad) + 1)
    assert sender.credit == 0
    assert not sender.try_send(numbered(1), {"i": 1})


async def test_garbage_values_are_refused(net: Net, plugged: Plugged) -> None:
    subscriber = net.subscriber()
    liar = plugged(zmq.XPUB)
    liar.bind(net.address("publisher"))
    await heard(liar)
    value = valid("publisher", 1, 5)
    whole, size = digest(value), len(value)
    own = topic(b"S", "subscriber", 1)
    bad: list[list[bytes]] = [
        [own],
        [own, b"", b""],
        [own, net.random.randbytes(50), value],
        *([own, msgpack.packb([1, 1, 1, 0, 0, 0, 0]), b"x", b""],),
        *([own, msgpack.packb(head), b"x"] for head in ([], [1], [1, 1, 1, 0, 0], [1, "1", 1, 0, 0, 0, 0], {"a": 1})),
        *([own, msgpack.packb([1, 1, total, 0, 0, 0, 0]), bytes(CHUNK)] for total in (0, 1, 1 << 63, 4 << 30)),
        [own, msgpack.packb([1, 1, 2, 2, 0, 0, 0]), b"x"],
        [own, msgpack.packb([1, 1, 1, 0, 12345, 0, 0]), b"x"],  # not its digest
        [own, msgpack.packb([1, 2, size, 0, whole ^ 1, 0, 0]), value],
        [own, msgpack.packb([1, 6, size, 0, whole, 0, 0]), value],  # not its version
        *([b"A", msgpack.packb(head), value] for head in ([1, "1"], ["1", 1], [1, 7, 7], [1, 1 << 63, "x"], [1, 9])),
        *([own, msgpack.packb([1, 7, name]), b""] for name in ("/etc/passwd", "../x", "ddrl-/x", "x" * 1000)),
    ]
    if net.scheme == "tcp":  # what is announced is for the same host
        bad = [parts for parts in bad if parts[0] == own]
        bad.append([own, msgpack.packb([1, 7]), valid("publisher", 1, 7)])
    for parts in bad:
        liar.send_multipart(parts)
    await until(lambda: sum(net.counts("subscriber", "weights/stray/").values()) == len(bad))
    assert subscriber.latest() is None
    value = valid("publisher", 1, 8)
    liar.send_multipart([own, msgpack.packb([1, 8, len(value), 0, digest(value), 0, 0]), value])
    async with asyncio.timeout(WAIT_S):
        assert (await subscriber.next()).seq == 8


async def test_garbage_differences_are_refused(net: Net, plugged: Plugged) -> None:
    subscriber = net.subscriber()
    liar = plugged(zmq.XPUB)
    liar.bind(net.address("publisher"))
    await heard(liar)
    own, base = topic(b"S", "subscriber", 1), bytes(numbered(5, LARGE).encode("publisher", 1, 5, {"i": 5}))
    for start in range(0, len(base), CHUNK):
        liar.send_multipart([own, msgpack.packb([1, 5, len(base), start, digest(base), 0, 0]), base[start:][:CHUNK]])
    async with asyncio.timeout(WAIT_S):
        assert number_of(await subscriber.next()) == 5
    head = base[: wire.head_size(memoryview(base))]
    bad = [b"x", head[:20], head + b"x", head + net.random.randbytes(5000), base]
    for number, packed in enumerate(bad, start=6):
        liar.send_multipart([own, msgpack.packb([1, number, len(packed), 0, 0, 1, 5]), packed])
        await until(lambda seen=number - 5: sum(net.counts("subscriber", "weights/stray/").values()) == seen)
        subscriber._core._distrusts = False  # it would take no more differences
    reasons = net.counts("subscriber", "weights/stray/")
    assert reasons.keys() <= {"truncated", "codec", "torn"}
    assert subscriber.latest() is None


async def test_garbage_questions_are_refused(net: Net, plugged: Plugged) -> None:
    publisher, stranger = net.publisher(), plugged(zmq.SUB)
    publisher.publish(1, numbered(1, LARGE), {"i": 1})
    stranger.connect(net.address("publisher"))
    own = topic(b"S", "stranger", 1)
    asked = Ask(1, 1, 0, NOTHING, NOTHING, 0).text()
    bad = [b"x", b"S", b"S\x00", own[:-1], own + b"X" + asked, own + b"F", own + b"F" + asked[:-2], own + b"F-1"]
    bad += [own + b"F" + asked + b".0", own + b"F" + b"9" * 50, b"x" * 1000, own + b"F" + asked + b"\x00"]
    for said in bad:
        stranger.subscribe(said)
    await until(lambda: net.count("publisher", "weights", "stray", "hello") == len(bad))
    assert not stranger.poll(0)
    assert net.count("publisher", "weights", "questions") == 0
    stranger.subscribe(own + b"F" + asked)
    await until(lambda: stranger.poll(0))


async def test_garbage_answers_are_refused(net: Net, plugged: Plugged) -> None:
    client = net.client()
    liar = plugged(zmq.ROUTER)
    liar.bind(net.address("server"))
    asking = net.spawn(client.request("ask", timeout_s=0.5))
    peer = await heard(liar)
    bad = [[b""], [b"x", b"y"], [net.random.randbytes(200)], [valid("server", 1, 1)[:-1]]]
    for parts in bad:
        liar.send_multipart([peer, *parts])
    liar.send_multipart([peer, valid("server", 1, 99)])  # to a question never asked
    await until(lambda: sum(net.counts("client", "ask/stray/").values()) == len(bad))
    await until(lambda: net.count("client", "ask", "late") == 1)
    with pytest.raises(UnreachableError):
        await asking
