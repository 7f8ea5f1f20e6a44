"""What only real sockets can show: their options, copies, the pump, addresses held by other processes, leaks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq
from harness import SMALL, WAIT_S, Net, numbered, send, take, turns, until
from ports import free_ports

from ddrl_bus.errors import AddressInUseError, UnreachableError, UsageError
from ddrl_bus.transport import wire, zeromq
from ddrl_bus.transport.base import OnMessage, SocketKind
from ddrl_bus.transport.shared import MEMORY, _owner
from ddrl_bus.transport.wire import SMALL_FRAME, Buffer, Layout
from ddrl_bus.transport.zeromq import (
    COPY_BELOW,
    DRAIN_BYTES,
    DRAIN_MESSAGES,
    KIND_OPTIONS,
    OPTIONS,
    ZmqBackend,
    ZmqSocket,
)

WRITE_ONLY = {zmq.XPUB_VERBOSE, zmq.ROUTER_MANDATORY}
"""libzmq does not tell them; the two tests after this table show what they do."""


@pytest.fixture(params=["ipc", "tcp"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def backend() -> AsyncIterator[ZmqBackend]:
    unhandled: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    backend = ZmqBackend()
    yield backend
    backend.close()
    await turns(3)
    assert unhandled == []


class Pair:
    """One socket bound at an ipc address, one connected to it, and what each received."""

    def __init__(self, backend: ZmqBackend, folder: Path, bound: SocketKind, connected: SocketKind) -> None:
        address = f"ipc://{folder}/x"
        self.at_bound: list[list[Buffer]] = []
        self.at_connected: list[list[Buffer]] = []
        self.bound = backend.socket(bound, self.at_bound.append, bind=[address])
        on_message = None if connected is SocketKind.PUSH else self.at_connected.append
        self.connected = backend.socket(connected, on_message, connect=[address])


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", SocketKind)
async def test_every_option_is_set_on_every_kind(backend: ZmqBackend, kind: SocketKind) -> None:
    socket = backend.socket(kind, None)
    table = OPTIONS | KIND_OPTIONS.get(kind, {})
    wanted = {option: value for option, value in table.items() if option not in WRITE_ONLY}
    assert {option: socket.raw.getsockopt(option) for option in wanted} == wanted


def test_the_options_that_keep_a_link_bounded_are_in_the_table() -> None:
    assert {
        *(zmq.LINGER, zmq.SNDHWM, zmq.RCVHWM, zmq.MAXMSGSIZE, zmq.HANDSHAKE_IVL, zmq.HEARTBEAT_IVL),
        *(zmq.HEARTBEAT_TIMEOUT, zmq.HEARTBEAT_TTL, zmq.RECONNECT_IVL, zmq.RECONNECT_IVL_MAX, zmq.TCP_KEEPALIVE),
    } <= OPTIONS.keys()
    assert zmq.CONFLATE not in OPTIONS  # it keeps the last frame, not the last message
    assert all(0 <= table.get(zmq.LINGER, 0) <= 2_000 for table in (OPTIONS, *KIND_OPTIONS.values()))


async def test_xpub_sees_a_known_topic_again(backend: ZmqBackend, tmp_path: Path) -> None:
    pair = Pair(backend, tmp_path, SocketKind.XPUB, SocketKind.SUB)
    pair.connected.subscribe(b"t")
    await until(lambda: len(pair.at_bound) == 1)
    other = backend.socket(SocketKind.SUB, print, connect=[f"ipc://{tmp_path}/x"])
    other.subscribe(b"t")
    await until(lambda: pair.at_bound == [[b"\x01t"], [b"\x01t"]])


async def test_router_says_that_a_peer_is_unknown(backend: ZmqBackend) -> None:
    router = backend.socket(SocketKind.ROUTER, None, bind=[f"tcp://127.0.0.1:{free_ports()}"])
    assert not router.send(b"\x00nobody", b"hello")


# ── frames ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, 33, SMALL_FRAME, SMALL_FRAME + 1, COPY_BELOW, 1 << 20])
async def test_small_frames_come_as_bytes_and_large_ones_as_views(
    backend: ZmqBackend, tmp_path: Path, size: int
) -> None:
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    body = np.random.default_rng(size).bytes(size)
    assert pair.connected.send(body)
    await until(lambda: pair.at_bound)
    [[frame]] = pair.at_bound
    assert type(frame) is (bytes if size <= SMALL_FRAME else memoryview)
    assert bytes(frame) == body


@pytest.mark.parametrize("items", [16, 100_000], ids=["small", "large"])
async def test_arrays_are_read_only_views_of_the_frame(backend: ZmqBackend, tmp_path: Path, items: int) -> None:
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    rows = np.arange(items, dtype=np.float32)
    pair.connected.send(wire.encode("x", "n", 1, 1, {}, {"rows": rows}))
    await until(lambda: pair.at_bound)
    frame = pair.at_bound[0][0]
    received = wire.decode(frame).arrays["rows"]
    assert np.array_equal(received, rows)
    assert np.shares_memory(received, np.frombuffer(frame, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        received[0] = 1


@pytest.mark.parametrize(("items", "copied"), [(COPY_BELOW // 2, True), (COPY_BELOW * 2, False)])
async def test_large_sends_leave_from_the_arena_without_a_copy(
    backend: ZmqBackend, tmp_path: Path, items: int, copied: bool
) -> None:
    push = backend.socket(SocketKind.PUSH, None, connect=[f"ipc://{tmp_path}/x"])  # nobody there: it stays queued
    arena = Layout("x", {"rows": ("uint8", (items,))}).arena()
    arena.arrays["rows"][:] = 7
    buffer = weakref.ref(arena._buffer.obj)
    assert push.send(arena.encode("n", 1, 1, {}))
    del arena
    gc.collect()
    assert (buffer() is None) == copied
    got: list[list[Buffer]] = []
    backend.socket(SocketKind.PULL, got.append, bind=[f"ipc://{tmp_path}/x"])
    await until(lambda: got)
    assert np.all(wire.decode(got[0][0]).arrays["rows"] == 7)
    got.clear()
    await until(lambda: buffer() is None)  # given back once it is out


@pytest.mark.parametrize("sizes", [[320] * 100, [0, 1, 4_095, 3, 4_096, 2, 200_000, 5], [4_000]], ids=str)
async def test_small_frames_leave_by_the_train_and_arrive_one_by_one(
    backend: ZmqBackend, tmp_path: Path, sizes: list[int]
) -> None:
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    frames = [np.random.default_rng(i).bytes(size) for i, size in enumerate(sizes)]
    assert all(pair.connected.send(frame) for frame in frames)
    await until(lambda: len(pair.at_bound) == len(frames))
    assert [[bytes(part) for part in parts] for parts in pair.at_bound] == [[frame] for frame in frames]


# ── the pump ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "size"), [(20 * DRAIN_MESSAGES, 1_000), (60, 200_000)], ids=["small", "large"])
async def test_one_turn_of_the_pump_is_bounded(
    backend: ZmqBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, size: int
) -> None:
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    drains: list[int] = []
    drain = ZmqSocket._drain

    def counted(socket: ZmqSocket, on_message: OnMessage, told: int) -> None:
        before = len(pair.at_bound)
        drain(socket, on_message, told)
        if socket is pair.bound:
            drains.append(len(pair.at_bound) - before)

    monkeypatch.setattr(ZmqSocket, "_drain", counted)
    for _ in range(n):
        assert pair.connected.send(bytes(size))
    time.sleep(0.05)  # noqa: ASYNC251  - the loop must not run while they pile up
    await until(lambda: len(pair.at_bound) == n)
    assert max(drains) < min(DRAIN_MESSAGES + SMALL_FRAME // size, DRAIN_BYTES // size + 2)
    assert max(drains) > 1


async def test_who_awaits_an_answer_goes_on_before_the_next_is_received(backend: ZmqBackend, tmp_path: Path) -> None:
    pair = Pair(backend, tmp_path, SocketKind.ROUTER, SocketKind.DEALER)
    pair.connected.send(b"question")
    await until(lambda: pair.at_bound)
    order: list[str] = []

    def on_answer(_parts: list[Buffer]) -> None:
        order.append("answer")
        asyncio.get_running_loop().call_soon(order.append, "awaited")

    pair.connected._on_message = on_answer
    for _ in range(3):
        pair.bound.send(pair.at_bound[0][0], b"answer")
    time.sleep(0.05)  # noqa: ASYNC251  - all are there before the loop runs
    await until(lambda: order.count("awaited") == 3)
    assert order == ["answer", "awaited"] * 3


async def test_sends_do_not_swallow_what_wakes_the_pump(backend: ZmqBackend, tmp_path: Path) -> None:
    """Any send may take the edge that was to wake the pump, and leave the socket readable and its descriptor silent."""
    pair = Pair(backend, tmp_path, SocketKind.ROUTER, SocketKind.DEALER)
    pair.connected.send(b"hello")
    await until(lambda: pair.at_bound)
    peer, balls, swallowed = pair.at_bound[0][0], 2_000, 0
    for i in range(balls):
        pair.bound.send(peer, b"ball")
        time.sleep(0.00005)  # noqa: ASYNC251  - it arrives while the loop is busy with something else
        pair.connected.send(b"ball")
        swallowed += not select.select([pair.connected._fd], [], [], 0)[0]
        if i % 5 == 0:
            await asyncio.sleep(0)
    assert swallowed
    await until(lambda: len(pair.at_connected) == balls and len(pair.at_bound) == balls + 1)


async def test_a_storm_of_ping_pong_never_stalls(backend: ZmqBackend, tmp_path: Path) -> None:
    """One lost wake-up ends a rally: nothing else would wake its two sockets again."""
    address, rallies, rounds, loop = f"ipc://{tmp_path}/x", 8, 600, asyncio.get_running_loop()
    sockets: list[ZmqSocket] = []
    router = backend.socket(
        SocketKind.ROUTER, lambda parts: loop.call_soon(router.send, *parts) and None, bind=[address]
    )
    counts = [0] * rallies

    def player(i: int) -> Callable[[list[Buffer]], None]:
        def on_message(parts: list[Buffer]) -> None:
            counts[i] += 1
            if counts[i] < rounds:
                loop.call_soon(sockets[i].send, parts[0])  # not within the pump, which would look again anyway

        return on_message

    for i in range(rallies):
        sockets.append(backend.socket(SocketKind.DEALER, player(i), connect=[address]))
        sockets[i].send(b"ball")
    await until(lambda: counts == [rounds] * rallies)


async def test_when_writable_calls_back_once_there_is_room(backend: ZmqBackend, tmp_path: Path) -> None:
    push = backend.socket(SocketKind.PUSH, None, connect=[f"ipc://{tmp_path}/x"])
    n = 0
    while push.send(bytes(4_000)):
        n += 1
    assert n == OPTIONS[zmq.SNDHWM]
    woken: list[bool] = []
    push.when_writable(lambda: woken.append(push.send(b"y")))
    await turns(5)
    assert woken == []
    got: list[list[Buffer]] = []
    backend.socket(SocketKind.PULL, got.append, bind=[f"ipc://{tmp_path}/x"])
    await until(lambda: len(got) == n + 1)
    assert woken == [True]


async def test_an_idle_link_costs_nothing(net: Net) -> None:
    """A descriptor left readable would spin the loop."""
    receiver, sender = net.receiver(window=64), net.sender()
    net.spawn(send(sender, range(1_000)))
    await take(receiver, 1_000)
    net.kill("learner")
    receiver = net.receiver(epoch=2, window=64)
    await until(lambda: sender.credit == 64)
    began = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - began < 0.1


async def test_who_has_nothing_to_send_yet_sleeps(
    backend: ZmqBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an actor that waits for its first weights: nobody sends, and nobody asks whether there is room."""
    pumped: list[ZmqSocket] = []
    pump = ZmqSocket._pump
    monkeypatch.setattr(ZmqSocket, "_pump", lambda self, told=0: (pumped.append(self), pump(self, told)))
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    await asyncio.sleep(0.3)
    assert 0 < pumped.count(pair.connected) < 20
    assert pair.connected.send(b"x")
    await until(lambda: pair.at_bound == [[b"x"]])


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────

HOLDER = """
import asyncio, sys
from ddrl_bus.transport.bus import Bus
from ddrl_bus.transport.ledger import Ledger

async def hold():
    Bus("holder", 1, Ledger()).receiver("data", [sys.argv[1]], 4)
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


@contextlib.contextmanager
def held(address: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds `address`."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, address], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert select.select([holder.stdout], [], [], WAIT_S)[0]
        assert holder.stdout.readline() == b"held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


async def test_an_address_of_a_living_process_is_refused_and_of_a_killed_one_is_free(net: Net) -> None:
    address = net.address("learner")
    with held(address) as holder:
        with pytest.raises(AddressInUseError, match=address):
            net.receiver(window=4)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    receiver, sender = net.receiver(epoch=2, window=4), net.sender()
    net.spawn(send(sender, range(5)))
    assert await take(receiver, 5) == [*range(5)]


async def test_a_living_holder_is_not_disturbed_by_who_was_refused(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    await send(sender, range(2))
    with pytest.raises(AddressInUseError, match=net.address("learner")):
        net.receiver(epoch=2, window=4)
    late = net.sender("late")
    await send(late, range(2, 4))
    assert sorted(await take(receiver, 4)) == [*range(4)]


@pytest.mark.parametrize("scheme", ["tcp"])
async def test_a_queue_whose_second_port_is_taken_leaves_the_first_one_free(net: Net) -> None:
    host, _, port = net.address("learner").rpartition(":")
    other = net.bus("other").publisher("weights", [f"{host}:{int(port) + 1}"])
    with pytest.raises(AddressInUseError, match=str(int(port) + 1)):
        net.receiver(window=4)
    other.close()
    await until(lambda: _bound(net))


def _bound(net: Net) -> bool:
    with contextlib.suppress(AddressInUseError):
        net.receiver(window=4)
        return True
    return False


async def test_a_name_is_bound_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """libzmq itself binds numbers only; where a name leads is the system's business."""
    asked = []

    def resolves(name: str, port: int, **_: object) -> list[object]:
        asked.append(name)
        if name == "nobody.lan":
            raise OSError("not known")
        found = {"gpu0.lan": "192.0.2.77", "here.lan": "127.0.1.1", "six.lan": "fd00::7"}[name]
        return [(0, 0, 0, "", (found, port))]

    monkeypatch.setattr(zeromq, "getaddrinfo", resolves)
    assert zeromq._numeric("tcp://gpu0.lan:7077") == "tcp://192.0.2.77:7077"
    assert zeromq._numeric("tcp://six.lan:7077") == "tcp://[fd00::7]:7077"
    with pytest.raises(UsageError, match=r"here\.lan is 127\.0\.1\.1 on this machine, where no other host reaches it"):
        zeromq._numeric("tcp://here.lan:7077")
    with pytest.raises(UnreachableError, match=r"nobody\.lan has no address here: not known"):
        zeromq._numeric("tcp://nobody.lan:7077")
    asked.clear()
    for address in ("tcp://127.0.0.1:7077", "tcp://[fd00::7]:7077", "tcp://*:7077", "ipc:///tmp/a:b"):
        assert zeromq._numeric(address) == address
    assert asked == []


@pytest.mark.parametrize("address", ["tcp://nonsense", "tcp://192.0.2.1:4444", "ipc:///proc/none/x"])
async def test_an_impossible_address_is_named(backend: ZmqBackend, address: str) -> None:
    with pytest.raises((UsageError, OSError), match=r"nonsense|192\.0\.2\.1|/proc"):
        backend.socket(SocketKind.PULL, None, bind=[address])


async def test_a_receiver_comes_back_at_once_at_its_address(net: Net) -> None:
    sender = net.sender()
    for epoch in range(1, 11):
        receiver = net.receiver(epoch=epoch, window=4)
        await until(lambda epoch=epoch: sender._core.lanes and sender._core.lanes["learner"].epoch == epoch)
        await send(sender, range(epoch, epoch + 1))
        assert await take(receiver, 1) == [epoch]
        net.kill("learner", epoch)


# ── leaks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_hundred_lives_leave_nothing_behind(net: Net) -> None:
    async def one_life(epoch: int) -> None:
        receiver, sender = net.receiver(epoch=epoch, window=2), net.sender(epoch=epoch)
        publisher, subscriber = net.publisher(epoch=epoch), net.subscriber(epoch=epoch)
        server, client = net.server(epoch=epoch), net.client(epoch=epoch)
        if epoch % 20 == 1:
            await send(sender, range(1))
            await take(receiver, 1)
            publisher.publish(1, numbered(1), {"i": 1})
            await subscriber.next()
            asking = net.spawn(client.request("ask", timeout_s=WAIT_S))
            (await server.recv()).answer("echo")
            await asking
        for node in ("actor", "subscriber", "client", "learner", "publisher", "server"):
            net.kill(node, epoch)

    def left() -> dict[str, object]:
        gc.collect()
        return {
            "fds": len(os.listdir("/proc/self/fd")),
            "threads": len(os.listdir("/proc/self/task")),
            "python threads": threading.active_count(),
            "shm": [name for name in os.listdir(MEMORY) if name.startswith(_owner(net.folder))],
            "folder": sorted(os.listdir(net.folder)),
            "tasks": len(asyncio.all_tasks()),
        }

    await one_life(1)
    base = left()
    for epoch in range(2, 102):
        await one_life(epoch)
    assert left() == base


async def test_closing_towards_a_peer_that_is_gone_does_not_wait(net: Net) -> None:
    net.receiver(window=4)
    sender, subscriber, client = net.sender(), net.subscriber(), net.client()
    await until(lambda: sender.connected)
    net.kill("learner")
    asking = net.spawn(client.request("ask", timeout_s=WAIT_S))
    await asyncio.sleep(0.02)
    began = time.monotonic()
    for node in ("actor", "subscriber", "client"):
        net.kill(node)
    assert time.monotonic() - began < zeromq.OPTIONS[zmq.LINGER] / 1e3
    assert subscriber.latest() is None
    await asyncio.gather(asking, return_exceptions=True)


async def test_both_addresses_of_a_binder_work(net: Net) -> None:
    addresses = [f"ipc://{net.folder}/both", f"tcp://127.0.0.1:{free_ports()}"]
    receiver = net.bus("learner").receiver("data", addresses, 4)
    for i, address in enumerate(addresses):
        sender = net.bus(f"actor-{i}").sender("data", {"learner": address})
        await sender.send(numbered(i, SMALL), {"i": i})
        assert await take(receiver, 1) == [i]


async def test_what_libzmq_tells_a_sender_that_is_done_is_read(backend: ZmqBackend, tmp_path: Path) -> None:
    """It tells it how many have left, time and again: its descriptor is readable then, though nothing is to be sent."""
    pair = Pair(backend, tmp_path, SocketKind.PULL, SocketKind.PUSH)
    for _ in range(OPTIONS[zmq.SNDHWM]):
        assert pair.connected.send(bytes(4_000))
    await until(lambda: len(pair.at_bound) == OPTIONS[zmq.SNDHWM])
    await asyncio.sleep(0.05)
    assert not select.select([pair.connected._fd], [], [], 0)[0]


async def test_whoever_waits_for_room_does_not_spin(backend: ZmqBackend, tmp_path: Path) -> None:
    """Nobody takes anything: the pump must sleep on the descriptor, and send when somebody does."""
    push = backend.socket(SocketKind.PUSH, None, connect=[f"ipc://{tmp_path}/x"])
    n = 1
    while push.send(bytes(4_000)):
        n += 1
    push.when_writable(lambda: None if push.send(b"late") else pytest.fail("told too soon"))
    began = time.process_time()
    await asyncio.sleep(0.3)
    assert time.process_time() - began < 0.1
    got: list[list[Buffer]] = []
    backend.socket(SocketKind.PULL, got.append, bind=[f"ipc://{tmp_path}/x"])
    await until(lambda: len(got) == n)
