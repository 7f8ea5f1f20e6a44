"""What every backend must do, through the six link ends; the whole suite runs over memory, ipc and tcp."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import permutations
from time import monotonic

import numpy as np
import pytest
from harness import LARGE, SMALL, WAIT_S, Net, fill, number_of, numbered, send, take, turns, until

from ddrl_bus.errors import AddressInUseError, FencedError, LinkClosedError, RemoteError, UnreachableError, UsageError
from ddrl_bus.transport import shared, wire
from ddrl_bus.transport.links import Client, Receiver, Request, Server, Subscriber
from ddrl_bus.transport.sessions import latest, queue, request
from ddrl_bus.transport.sessions.rate import BURST_S
from ddrl_bus.transport.shared import kept
from ddrl_bus.transport.wire import Arena, Codec, Layout, Message

SIZES = pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])


# ── queue: order, window, load ──────────────────────────────────────────────────────────────────────────────────────


@SIZES
async def test_arrives_in_order_and_once(net: Net, layout: Layout) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    sending = net.spawn(send(sender, range(100), layout))
    assert await take(receiver, 100) == [*range(100)]
    await sending
    balance = await net.settled(sender)
    assert (balance.produced, balance.taken, balance.duplicates, balance.lost) == (100, 100, 0, 0)
    assert receiver.try_recv() is None


@SIZES
@pytest.mark.parametrize("window", [1, 2, 7])
async def test_window_bounds_the_unread_messages_exactly(net: Net, layout: Layout, window: int) -> None:
    receiver, sender = net.receiver(window=window), net.sender()
    await until(lambda: sender.connected)
    assert fill(sender, layout) == window
    assert await sender.flush(WAIT_S)  # acknowledged is not yet read
    blocked = net.spawn(send(sender, range(window, window + 1), layout))
    await turns(5)
    assert (receiver.queued, sender.credit, blocked.done()) == (window, 0, False)
    assert await take(receiver, window) == [*range(window)]
    await blocked
    await until(lambda: sender.credit == window - 1)
    assert fill(sender, layout, window + 1) == window - 1
    await sender.flush(WAIT_S)
    assert receiver.queued == window
    await take(receiver, window)
    assert (await net.settled(sender)).taken == 2 * window


IMAGES = Layout("unroll", {"v": ("uint8", (5 * 84 * 84,))})


@pytest.mark.parametrize(
    ("codec", "layout", "shrinks"),
    [
        ("auto", IMAGES, True),
        ("auto", LARGE, False),
        ("none", IMAGES, False),
        ("lz4", LARGE, True),
        ("lz4", SMALL, True),
    ],
)
async def test_codecs_keep_every_byte_and_the_ledger_shows_what_they_save(
    net: Net, codec: Codec, layout: Layout, shrinks: bool
) -> None:
    receiver, sender = net.receiver(window=4), net.sender(codec=codec, on_loss="resend")
    sending = net.spawn(send(sender, range(20), layout))
    assert await take(receiver, 20) == [*range(20)]
    await sending
    await net.settled(sender)
    sent, raw = net.count("actor", "data", "bytes_out"), net.count("actor", "data", "bytes_raw_out")
    assert net.count("learner", "data", "bytes_in") == sent
    assert raw >= 20 * layout.size
    if shrinks and (net.scheme != "memory" or codec == "lz4"):  # within a process auto leaves the arrays where they lie
        assert sent < raw
    else:
        assert sent == raw


@SIZES
async def test_a_rate_bounds_what_leaves_and_loses_nothing(net: Net, layout: Layout) -> None:
    rate, messages = 60 * layout.size, 24
    receiver, sender = net.receiver(window=8), net.sender(rate=rate)
    net.spawn(_read_all(receiver, taken := []))
    await until(lambda: sender.connected)
    began = monotonic()
    await send(sender, range(messages), layout)
    sent = net.count("actor", "data", "bytes_out")
    assert monotonic() - began >= (1 - 1 / messages) * sent / rate - BURST_S
    await until(lambda: len(taken) == messages)
    assert taken == [*range(messages)]
    await net.settled(sender)


async def test_above_its_rate_a_sender_waits_as_without_credit(net: Net) -> None:
    receiver, sender = net.receiver(window=8), net.sender(rate=1)
    await until(lambda: sender.connected)
    assert fill(sender) == 1  # it owes for minutes
    assert sender.credit == 7
    blocked = net.spawn(send(sender, range(1, 2)))
    await turns(5)
    assert not blocked.done()
    assert await take(receiver, 1) == [0]
    await net.settled(sender)
    net.kill("actor")
    with pytest.raises(LinkClosedError):
        await blocked


async def test_each_sender_has_a_window_of_its_own(net: Net) -> None:
    receiver = net.receiver(window=3)
    senders = [net.sender(f"actor-{i}") for i in range(3)]
    for sender in senders:
        await until(lambda sender=sender: sender.connected)
        assert fill(sender) == 3
        await sender.flush(WAIT_S)
    assert receiver.queued == 9
    await take(receiver, 9)
    await net.settled(*senders)


async def test_load_goes_to_the_receiver_with_most_credit(net: Net) -> None:
    idle, busy = net.receiver("idle", window=6), net.receiver("busy", window=6)
    sender = net.sender(to=("idle", "busy"))
    await until(lambda: sender.credit == 12)
    await send(sender, range(6))
    await sender.flush(WAIT_S)
    assert (idle.queued, busy.queued) == (3, 3)
    net.spawn(_read_all(busy, taken := []))
    await send(sender, range(6, 100))
    await sender.flush(WAIT_S)
    assert idle.queued <= 6  # what it had room for; all the rest went where somebody reads
    taken += await take(idle, idle.queued)
    await until(lambda: len(taken) == 100)
    assert sorted(taken) == [*range(100)]
    await net.settled(sender)


async def test_many_senders_keep_their_own_order(net: Net) -> None:
    receiver = net.receiver(window=4)
    senders = [net.sender(f"actor-{i}") for i in range(8)]
    sending = [net.spawn(send(sender, range(50))) for sender in senders]
    numbers: dict[str, list[int]] = {}
    async with asyncio.timeout(WAIT_S):
        for _ in range(8 * 50):
            message = await receiver.recv()
            numbers.setdefault(message.node, []).append(number_of(message))
    await asyncio.gather(*sending)
    assert numbers == {f"actor-{i}": [*range(50)] for i in range(8)}
    await net.settled(*senders)


@pytest.mark.parametrize("order", [*permutations(["learner", "actor-0", "actor-1"])], ids=" ".join)
async def test_any_start_order_loses_nothing(net: Net, order: tuple[str, ...]) -> None:
    senders, receiver = [], None
    for node in order:
        if node == "learner":
            receiver = net.receiver(window=2)
        else:
            senders.append(net.sender(node))
            net.spawn(send(senders[-1], range(5)))
        await turns(20)
    assert receiver is not None
    assert sorted(await take(receiver, 10)) == sorted([*range(5)] * 2)
    await net.settled(*senders)


async def test_slow_reader_holds_its_sender_back(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    sending = net.spawn(send(sender, range(40)))
    taken = []
    for _ in range(40):
        taken += await take(receiver, 1)
        await turns(10)
        assert receiver.queued <= 4
    await sending
    assert taken == [*range(40)]
    await net.settled(sender)


# ── queue: cancellation, closing, restarts, refusals ────────────────────────────────────────────────────────────────


async def test_cancelled_sends_send_nothing_and_others_exactly_once(net: Net) -> None:
    receiver, sender = net.receiver(window=2), net.sender()
    reading = net.spawn(_read_all(receiver, taken := []))
    tasks = []
    for number in range(300):
        tasks.append(net.spawn(sender.send(numbered(number), {"i": number})))
        await turns(net.random.randrange(3))
        if net.random.random() < 0.5:
            net.random.choice(tasks[-5:]).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    sent = [number for number, result in enumerate(results) if result is None]
    assert 0 < len(sent) < 300
    await sender.flush(WAIT_S)
    await until(lambda: len(taken) >= len(sent))
    assert sorted(taken) == sent
    await net.settled(sender)
    reading.cancel()


async def _read_all(receiver: Receiver, taken: list[int]) -> None:
    while True:
        taken.append(number_of(await receiver.recv()))


async def test_cancelled_receives_lose_nothing(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    net.spawn(send(sender, range(200)))
    taken: list[int] = []
    async with asyncio.timeout(WAIT_S):
        while len(taken) < 200:
            readers = [asyncio.ensure_future(receiver.recv()) for _ in range(3)]
            for reader in net.random.sample(readers, 3):
                await turns(net.random.randrange(3))
                reader.cancel()
            results = await asyncio.gather(*readers, return_exceptions=True)
            taken += [number_of(message) for message in results if isinstance(message, Message)]
    assert sorted(taken) == [*range(200)]
    await net.settled(sender)


async def test_timeouts_around_recv_lose_nothing(net: Net) -> None:
    receiver, sender = net.receiver(window=8), net.sender()
    net.spawn(send(sender, range(500)))
    taken: list[int] = []
    deadline = monotonic() + WAIT_S
    while len(taken) < 500 and monotonic() < deadline:
        try:
            async with asyncio.timeout(0):
                taken.append(number_of(await receiver.recv()))
        except TimeoutError:
            await asyncio.sleep(0)
    assert taken == [*range(500)]
    await net.settled(sender)


async def test_a_sender_that_leaves_takes_nobody_along(net: Net) -> None:
    receiver = net.receiver(window=4)
    leaver, stayer = net.sender("leaver"), net.sender("stayer")
    await send(leaver, range(3))
    await leaver.flush(WAIT_S)
    net.kill("leaver")
    await send(stayer, range(3, 6))
    assert sorted(await take(receiver, 6)) == [*range(6)]
    assert (await net.settled(stayer)).taken == 6


@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("n", [3, 40])
async def test_after_a_flush_the_sender_may_close_at_once(net: Net, n: int, layout: Layout) -> None:
    receiver, sender = net.receiver(window=3), net.sender()
    taken: list[int] = []
    if n > 3:  # else the receiver stands at its window, with nothing read, when the sender goes
        net.spawn(_read_all(receiver, taken))
    await send(sender, range(n), layout)
    assert await sender.flush(WAIT_S)
    net.kill("actor")
    if n == 3:
        assert receiver.queued == 3
        taken += await take(receiver, 3)
    await until(lambda: len(taken) == n)
    assert taken == [*range(n)]
    balance = net.balance()
    assert (balance.closed, balance.produced, balance.taken, balance.lost) == (True, n, n, 0)


async def test_flush_without_a_living_receiver_says_so(net: Net) -> None:
    net.receiver(window=4)
    sender = net.sender()
    await until(lambda: sender.connected)
    net.kill("learner")
    if sender.try_send(numbered(0), {"i": 0}):  # a network takes it; memory knows that nobody is there
        assert not await sender.flush(0.05)
    balance = net.balance()
    assert balance.closed
    assert balance.lost == balance.produced


async def test_flush_of_a_closed_end_raises(net: Net) -> None:
    net.receiver(window=4)
    sender = net.sender()
    await until(lambda: sender.connected)
    sender.try_send(numbered(0), {"i": 0})
    sender.close()
    with pytest.raises(LinkClosedError):
        await sender.flush(WAIT_S)


@pytest.mark.parametrize("on_loss", ["count", "resend"])
@pytest.mark.parametrize("noticed", [False, True], ids=["at-once", "noticed"])
@SIZES
async def test_receiver_restart(net: Net, on_loss: queue.OnLoss, noticed: bool, layout: Layout) -> None:
    first, sender = net.receiver(window=4, on_loss=on_loss), net.sender(on_loss=on_loss)
    await send(sender, range(2), layout)
    await sender.flush(WAIT_S)
    assert await take(first, 1) == [0]  # number 1 was acknowledged and dies unread with its receiver
    net.kill("learner")
    if noticed:  # then libzmq keeps what is sent now for the next connection
        await asyncio.sleep(0.03)
    gone = fill(sender, layout, 2)  # into the void; memory knows better and takes none
    rest = net.spawn(send(sender, range(2 + gone, 20), layout))
    second = net.receiver(epoch=2, window=4, on_loss=on_loss)
    net.spawn(_read_all(second, taken := []))
    await rest
    balance = await net.settled(sender)
    await until(lambda: len(taken) == net.accepted("learner", "data", epoch=2))
    lost = balance.lost if on_loss == "count" else 0
    assert taken == [*range(2 + lost, 20)]
    assert balance.lost <= 3
    assert (balance.queued, balance.duplicates, net.balance().taken) == (1, 0, 1 + len(taken))


async def test_sender_restart_fences_the_old_life(net: Net) -> None:
    receiver, zombie = net.receiver(window=4), net.sender(epoch=1)
    await send(zombie, range(2))
    await zombie.flush(WAIT_S)
    sender = net.sender(epoch=2)
    await until(lambda: sender.connected)
    assert fill(sender, start=2) == 4  # a window of its own, whatever the old life still has unread
    assert fill(zombie, start=100) == 2
    await sender.flush(WAIT_S)
    await until(lambda: net.count("learner", "data", "stray", "fenced") == 2)
    assert await take(receiver, 6) == [*range(6)]
    await send(sender, range(6, 7))
    assert await take(receiver, 1) == [6]
    net.kill("actor", 1)
    balance = await net.settled(sender)
    assert (balance.produced, balance.taken, balance.lost) == (9, 7, 2)


async def test_refused_messages_free_the_window_and_are_counted(net: Net) -> None:
    receiver = net.receiver(window=2, check=lambda message: "odd" if message.fields["i"] % 2 else None)
    sender = net.sender()
    sending = net.spawn(send(sender, range(20)))
    assert await take(receiver, 10) == [*range(0, 20, 2)]
    await sending
    balance = await net.settled(sender)
    assert (balance.accepted, balance.refused, balance.taken) == (10, 10, 10)
    assert net.count("learner", "data", "refused", "odd") == 10
    await until(lambda: sender.credit == 2)


async def test_a_receiver_that_refuses_all_never_stops_its_sender(net: Net) -> None:
    net.receiver(window=2, check=lambda _: "no")
    sender = net.sender()
    async with asyncio.timeout(WAIT_S):
        await send(sender, range(50))
    assert (await net.settled(sender)).refused == 50


# ── every end: closing ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["send", "recv", "flush", "next", "request", "serve"])
async def test_close_wakes_every_waiter(net: Net, what: str) -> None:
    end: object
    match what:
        case "send":
            end = sender = net.sender()
            waits = [sender.send(numbered(i), {"i": i}) for i in range(3)]
        case "flush":
            net.receiver(window=4)
            end = sender = net.sender()
            await until(lambda: sender.connected)
            assert fill(sender) == 4
            waits = [sender.flush(WAIT_S) for _ in range(3)]
        case "recv":
            end = receiver = net.receiver(window=4)
            waits = [receiver.recv() for _ in range(3)]
        case "next":
            end = subscriber = net.subscriber()
            waits = [subscriber.next() for _ in range(3)]
        case "request":
            end = client = net.client()
            waits = [client.request("ask", timeout_s=WAIT_S) for _ in range(3)]
        case _:
            end = server = net.server()
            waits = [server.recv() for _ in range(3)]
    tasks = [net.spawn(wait) for wait in waits]
    await asyncio.sleep(0)
    end.close()  # type: ignore[attr-defined]
    end.close()  # type: ignore[attr-defined]
    async with asyncio.timeout(1):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [LinkClosedError] * 3


async def test_a_closed_end_says_so(net: Net) -> None:
    sender, receiver = net.sender(), net.receiver(window=1)
    publisher, subscriber = net.publisher(), net.subscriber()
    server, client = net.server(), net.client()
    for end in (sender, receiver, publisher, subscriber, server, client):
        end.close()
    with pytest.raises(LinkClosedError, match="data"):
        sender.try_send(numbered(0), {"i": 0})
    with pytest.raises(LinkClosedError):
        publisher.publish(1, numbered(1), {"i": 1})
    for wait in (sender.send(numbered(0), {}), receiver.recv(), subscriber.next(), server.recv()):
        with pytest.raises(LinkClosedError):
            await wait
    with pytest.raises(LinkClosedError):
        await client.request("ask", timeout_s=1)


async def test_a_refused_bind_leaves_nothing_behind(net: Net) -> None:
    holder = net.receiver("holder", window=1)
    with pytest.raises(AddressInUseError, match=net.address("holder")):
        net.bus("learner").receiver("data", [net.address("learner"), net.address("holder")], 1)
    holder.close()
    sender = net.sender(to=("learner",))
    await until(lambda: _binds(net))  # neither address stayed with the end that got but one of them
    await until(lambda: sender.connected)


def _binds(net: Net) -> bool:
    with contextlib.suppress(AddressInUseError):  # tcp gives ports back a moment after the close
        return net.bus("learner").receiver("data", [net.address("learner"), net.address("holder")], 1) is not None
    return False


async def test_an_end_cannot_mix_memory_with_a_network(net: Net) -> None:
    with pytest.raises(UsageError, match="memory"):
        net.bus("x").receiver("data", ["memory://x", "tcp://127.0.0.1:1"], 1)
    with pytest.raises(UsageError, match="udp"):
        net.bus("x").subscriber("weights", "udp://127.0.0.1:1")


# ── latest ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _next(subscriber: Subscriber) -> tuple[int, int]:
    async with asyncio.timeout(WAIT_S):
        message = kept(await subscriber.next())
    assert number_of(message) == message.seq
    return message.epoch, message.seq


@SIZES
async def test_the_way_of_a_value_is_timed_but_not_how_old_the_first_was(net: Net, layout: Layout) -> None:
    publisher = net.publisher()
    publisher.publish(1, numbered(1, layout), {"i": 1})
    await asyncio.sleep(0.05)
    subscriber = net.subscriber()
    assert await _next(subscriber) == (1, 1)
    assert net.count("subscriber", "weights", "wire_ns") == 0
    publisher.publish(2, numbered(2, layout), {"i": 2})
    assert await _next(subscriber) == (1, 2)
    assert 1_000 < net.count("subscriber", "weights", "wire_ns") < WAIT_S * 1e9


async def test_a_late_joiner_gets_the_newest_at_once(net: Net) -> None:
    publisher = net.publisher()
    for number in range(1, 6):
        publisher.publish(number, numbered(number), {"i": number})
    for i in range(3):
        assert await _next(net.subscriber(f"late-{i}")) == (1, 5)


@pytest.mark.parametrize("publisher_first", [True, False])
async def test_every_subscriber_gets_the_newest(net: Net, publisher_first: bool) -> None:
    publisher = net.publisher() if publisher_first else None
    subscribers = [net.subscriber(f"s-{i}") for i in range(4)]
    await turns(20)
    publisher = publisher or net.publisher()
    for number in range(1, 4):
        publisher.publish(number, numbered(number), {"i": number})
    for subscriber in subscribers:
        while await _next(subscriber) != (1, 3):
            pass


@SIZES
async def test_versions_never_go_back_and_a_burst_ends_with_the_last(net: Net, layout: Layout) -> None:
    publisher, subscriber = net.publisher(), net.subscriber()
    seen: list[tuple[int, int]] = []

    async def follow() -> None:
        while not seen or seen[-1] != (1, 200):
            seen.append(await _next(subscriber))

    following = net.spawn(follow())
    for number in range(1, 201):
        publisher.publish(number, numbered(number, layout), {"i": number})
        if number % 20 == 0:
            await asyncio.sleep(0)
    async with asyncio.timeout(WAIT_S):
        await following
    assert seen == sorted(set(seen))


async def test_a_slow_subscriber_skips_to_the_newest(net: Net) -> None:
    publisher, subscriber = net.publisher(), net.subscriber()
    publisher.publish(1, numbered(1), {"i": 1})
    assert await _next(subscriber) == (1, 1)
    for number in range(2, 52):
        publisher.publish(number, numbered(number), {"i": number})
    await until(lambda: net.count("subscriber", "weights", "messages_in") == 51)
    assert await _next(subscriber) == (1, 51)
    assert subscriber.latest() is None
    assert net.count("subscriber", "weights", "superseded") == 49


async def test_a_publisher_restart_wins_by_its_epoch_and_an_older_one_is_ignored(net: Net) -> None:
    publisher, subscriber = net.publisher(epoch=2), net.subscriber()
    publisher.publish(10, numbered(10), {"i": 10})
    assert await _next(subscriber) == (2, 10)
    net.kill("publisher", 2)
    zombie = net.publisher(epoch=1)
    zombie.publish(99, numbered(99), {"i": 99})
    await until(lambda: net.count("publisher", "weights", "questions", epoch=1))  # it hears what we hold
    zombie.publish(100, numbered(100), {"i": 100})
    net.kill("publisher", 1)
    publisher = net.publisher(epoch=3)
    publisher.publish(1, numbered(1), {"i": 1})
    assert await _next(subscriber) == (3, 1)


async def test_a_publisher_refuses_to_go_back(net: Net) -> None:
    publisher = net.publisher()
    publisher.publish(2, numbered(2), {"i": 2})
    for number in (2, 1):
        with pytest.raises(ValueError, match="newer"):
            publisher.publish(number, numbered(number), {"i": number})


async def test_a_large_value_arrives_whole(net: Net) -> None:
    weights = np.random.default_rng(1).standard_normal(1 << 20)
    publisher, subscriber = net.publisher(), net.subscriber()
    publisher.publish(1, Arena.of("weights", {"w": weights}), {"step": 7})
    async with asyncio.timeout(WAIT_S):
        message = await subscriber.next()
    assert message.fields == {"step": 7}
    assert not message.arrays["w"].flags.writeable
    assert np.array_equal(message.arrays["w"], weights)


def _weights(number: int) -> Arena:
    """1 MB of which a hundredth changes from one number to the next."""
    weights = np.random.default_rng(0).standard_normal(1 << 18, np.float32)
    weights[number::100] += 1
    return Arena.of("weights", {"w": weights})


async def _expect(subscriber: Subscriber, number: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while (message := kept(await subscriber.next())).seq != number:
            pass
    assert message.fields == {"i": number}
    assert np.array_equal(message.arrays["w"], _weights(number).arrays["w"])


@pytest.mark.parametrize("codec", ["auto", "delta"])
async def test_every_number_of_a_large_value_arrives_and_bytes_are_counted(net: Net, codec: Codec) -> None:
    publisher, subscriber = net.publisher(codec=codec), net.subscriber()
    for number in range(1, 6):
        publisher.publish(number, _weights(number), {"i": number})
        await _expect(subscriber, number)
    sent, worth = (net.count("publisher", "weights", what) for what in ("bytes_out", "value_bytes_out"))
    received = net.count("subscriber", "weights", "bytes_in")
    assert net.count("subscriber", "weights", "value_bytes_in") == worth > 5 << 20
    match net.scheme, codec:
        case "ipc", _:
            assert sent == received == 0  # it is read where it lies
        case "tcp", "delta":
            assert worth / 5 < sent == received < worth / 2  # the first one is sent whole
        case _:
            assert sent == received == worth


async def test_equal_arrays_are_not_sent_again_to_who_asks(net: Net) -> None:
    publisher, subscriber = net.publisher(), net.subscriber()
    publisher.publish(1, _weights(1), {"i": 1})
    await _expect(subscriber, 1)
    for number in range(2, 6):
        publisher.publish(number, _weights(1), {"confirm": number})
        async with asyncio.timeout(WAIT_S):
            message = kept(await subscriber.next())
        assert message.fields == {"confirm": number}
        assert np.array_equal(message.arrays["w"], _weights(1).arrays["w"])
    if net.scheme == "tcp":
        assert net.count("publisher", "weights", "bytes_out") < 1.1 * (1 << 20)


@SIZES
async def test_a_relay_publishes_under_the_version_of_the_origin(net: Net, layout: Layout) -> None:
    origin = net.publisher(epoch=7)
    relay = net.bus("relay", 3)
    come, go = relay.subscriber("weights", net.address("publisher")), relay.publisher("weights", [net.address("relay")])
    end = net.bus("subscriber").subscriber("weights", net.address("relay"))
    for number in range(1, 4):
        origin.publish(number, numbered(number, layout), {"i": number})
        async with asyncio.timeout(WAIT_S):
            version, value = await come.next_value()
            assert version == (7, number)
            go.relay(version, value)
            message = kept(await end.next())
        assert (message.node, message.epoch, message.seq, number_of(message)) == ("publisher", 7, number, number)
    with pytest.raises(ValueError, match="not newer"):
        go.relay((7, 3), value)


async def test_who_cannot_read_what_is_shared_asks_for_it_and_reads_the_next(net: Net) -> None:
    """As between containers with a folder of sockets in common, but not their memory."""
    publisher = net.publisher()
    if net.scheme != "ipc":
        pytest.skip("nothing is shared")
    publisher.publish(1, _weights(1), {"i": 1})
    await _expect(net.subscriber("near"), 1)
    for path in shared.MEMORY.glob(f"{shared._stem(net.address('publisher'))}*"):
        path.unlink()
    subscriber = net.subscriber("far")
    for number in range(1, 4):
        if number > 1:
            publisher.publish(number, _weights(number), {"i": number})
        await _expect(subscriber, number)
    assert net.count("far", "weights", "unshared") == 1
    assert net.count("far", "weights", "bytes_in") > 3 << 20
    for number in range(4, 8):  # these need a new file
        bigger = np.full(1 << 19, number, np.float32)
        publisher.publish(number, Arena.of("weights", {"w": bigger}), {"i": number})
        async with asyncio.timeout(WAIT_S):
            assert np.array_equal(kept(await subscriber.next()).arrays["w"], bigger)
        if number == 4:
            await until(lambda: not publisher._core.fetching)
            sent = net.count("publisher", "weights", "bytes_out")
    assert net.count("publisher", "weights", "bytes_out") == sent


async def test_no_more_than_a_window_goes_to_who_does_not_read(net: Net) -> None:
    if net.scheme != "tcp":
        pytest.skip("nothing is sent")
    publisher, deaf = net.publisher(), net.subscriber("deaf")
    publisher.publish(1, _weights(1), {"i": 1})
    await _expect(deaf, 1)
    before = net.count("publisher", "weights", "bytes_out")
    deaf._ask = lambda now: None  # type: ignore[method-assign]
    other = net.subscriber("other")
    for number in range(2, 20):
        publisher.publish(number, _weights(number), {"i": number})
        await _expect(other, number)
    sent = net.count("publisher", "weights", "bytes_out") - before - net.count("other", "weights", "bytes_in")
    window = max(who.window for who in publisher._core._fetching.values())
    assert 0 < sent < window * (1 + latest.CHUNK / latest.WINDOW)


async def test_cancelled_nexts_lose_nothing_and_repeat_nothing(net: Net) -> None:
    publisher, subscriber = net.publisher(), net.subscriber()
    seen: list[int] = []
    number = 0
    async with asyncio.timeout(WAIT_S):
        while not seen or seen[-1] < 100:
            if number < 100:
                number += 1
                publisher.publish(number, numbered(number), {"i": number})
            task = asyncio.ensure_future(subscriber.next())
            await turns(net.random.randrange(6))
            task.cancel()
            [result] = await asyncio.gather(task, return_exceptions=True)
            if isinstance(result, Message):
                seen.append(number_of(result))
    assert seen == sorted(set(seen))


# ── request ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _echo(server: Server) -> None:
    while True:
        request = await server.recv()
        request.answer("echo", request.message.fields, request.message.arrays)


async def _ask(client: Client, i: int, timeout_s: float = WAIT_S) -> int:
    answer = await client.request("ask", {"i": i}, {"v": np.full(4, i)}, timeout_s=timeout_s)
    assert answer.kind == "echo"
    assert not answer.arrays["v"].flags.writeable
    return number_of(answer)


async def test_each_request_gets_its_own_answer(net: Net) -> None:
    server, clients = net.server(), [net.client(f"client-{i}") for i in range(4)]
    asked = [net.spawn(_ask(client, 100 * n + i)) for n, client in enumerate(clients) for i in range(25)]
    held = []
    async with asyncio.timeout(WAIT_S):
        for _ in range(100):
            held.append(await server.recv())
    net.random.shuffle(held)  # out of order
    for request_ in held:
        request_.answer("echo", request_.message.fields, request_.message.arrays)
    assert await asyncio.gather(*asked) == [100 * n + i for n in range(4) for i in range(25)]


async def test_requests_are_handed_over_as_they_come(net: Net) -> None:
    """Those that came before somebody served, too; what goes wrong is told to whoever serves."""
    server, client = net.server(), net.client()
    early = net.spawn(_ask(client, 1))
    await until(lambda: net.count("server", "ask", "messages_in") == 1)

    def answer(request_: Request) -> None:
        if request_.message.fields["i"] == 4:
            raise ValueError("four")
        request_.answer("echo", request_.message.fields, request_.message.arrays)

    serving = net.spawn(server.serve(answer))
    assert [await _ask(client, i) for i in (2, 3)] == [2, 3]
    assert await early == 1
    fails = net.spawn(_ask(client, 4, timeout_s=0.5))
    with pytest.raises(ValueError, match="four"):
        await serving
    net.spawn(_echo(server))
    assert await _ask(client, 5) == 5
    with pytest.raises(UnreachableError):
        await fails


async def test_both_ends_count_what_came_and_what_it_took(net: Net) -> None:
    net.spawn(_echo(net.server()))
    client = net.client()
    assert [await _ask(client, i) for i in range(5)] == [*range(5)]
    asked = len(wire.encode("ask", "client", 1, 1, {"i": 0}, {"v": np.full(4, 0)}))
    answered = len(wire.encode("echo", "server", 1, 1, {"i": 0}, {"v": np.full(4, 0)}))
    assert net.count("server", "ask", "bytes_in") == 5 * asked
    assert net.count("client", "ask", "bytes_in") == 5 * answered
    for node in ("server", "client"):
        for what in ("encode_ns", "decode_ns", "wire_ns"):
            await until(lambda ends=(node, "ask", what): net.count(*ends) > 5_000)


async def test_an_answer_need_not_be_awaited_at_once(net: Net) -> None:
    net.spawn(_echo(net.server()))
    client = net.client()
    asked = [client.ask("ask", {"i": i}, {"v": np.full(4, i)}, timeout_s=WAIT_S) for i in range(5)]
    dropped = client.ask("ask", {"i": 9}, {}, timeout_s=WAIT_S)
    dropped.cancel()
    async with asyncio.timeout(WAIT_S):
        assert [number_of(await answer) for answer in asked] == list(range(5))
    await until(lambda: net.count("client", "ask", "late") == 1)


async def test_a_refusal_carries_the_servers_words(net: Net) -> None:
    server, client = net.server(), net.client()
    asking = net.spawn(client.request("ask", timeout_s=WAIT_S))
    (await server.recv()).refuse("no such bandit: arm 7")
    with pytest.raises(RemoteError, match=r"ask: server: no such bandit: arm 7"):
        await asking


async def test_an_earlier_life_of_a_client_is_told_that_it_is_fenced(net: Net) -> None:
    net.spawn(_echo(net.server()))
    zombie, client = net.client(epoch=1), net.client(epoch=2)
    assert await _ask(client, 1) == 1
    with pytest.raises(FencedError, match="client"):
        await _ask(zombie, 2)
    assert await _ask(client, 3) == 3


async def test_a_request_times_out_and_its_late_answer_is_counted(net: Net) -> None:
    server, client = net.server(), net.client()
    asking = net.spawn(_ask(client, 1, timeout_s=0.1))
    late = await server.recv()
    with pytest.raises(UnreachableError, match=net.address("server")):
        await asking
    late.answer("echo", {"i": 1})
    await until(lambda: net.count("client", "ask", "late") == 1)
    net.spawn(_echo(server))
    assert await _ask(client, 2) == 2


async def test_without_a_server_a_request_times_out(net: Net) -> None:
    with pytest.raises(UnreachableError):
        await net.client().request("ask", timeout_s=0.05)


async def test_a_late_server_answers(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "REPEAT_S", 0.2)
    client = net.client()
    asking = net.spawn(_ask(client, 5))
    await turns(20)
    net.spawn(_echo(net.server()))
    assert await asking == 5


async def test_a_restarted_server_answers_what_its_earlier_life_took_along(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "REPEAT_S", 0.2)
    first, client = net.server(epoch=1), net.client()
    asking = net.spawn(_ask(client, 3))
    await first.recv()
    net.kill("server", 1)
    net.spawn(_echo(net.server(epoch=2)))
    assert await asking == 3
    assert net.count("client", "ask", "repeated") >= 1


async def test_a_repeated_request_runs_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "REPEAT_S", 0.05)
    server, client = net.server(), net.client()
    asking = net.spawn(_ask(client, 3))
    once = await server.recv()
    again = net.spawn(server.recv())
    await until(lambda: net.count("server", "ask", "stray", "running") >= 2)
    assert not again.done()
    once.answer("echo", once.message.fields, once.message.arrays)
    assert await asking == 3
    asking = net.spawn(_ask(client, 4))
    assert (await again).message.fields == {"i": 4}


async def test_cancelled_requests_leave_the_others_alone(net: Net) -> None:
    server, client = net.server(), net.client()
    ran: list[int] = []

    async def serve() -> None:
        while True:
            request_ = await server.recv()
            ran.append(request_.message.fields["i"])
            request_.answer("echo", request_.message.fields, request_.message.arrays)

    net.spawn(serve())
    tasks = []
    for i in range(200):
        tasks.append(net.spawn(_ask(client, i)))
        await turns(net.random.randrange(4))
        if net.random.random() < 0.5:
            net.random.choice(tasks[-4:]).cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    answered = [i for i, result in enumerate(results) if not isinstance(result, asyncio.CancelledError)]
    assert 0 < len(answered) < 200
    assert [results[i] for i in answered] == answered
    assert len(ran) == len(set(ran))
    assert await _ask(client, 1000) == 1000
    assert len(answered) + net.count("client", "ask", "late") <= len(ran)


async def test_a_client_that_leaves_takes_nobody_along(net: Net) -> None:
    server, leaver, stayer = net.server(), net.client("leaver"), net.client("stayer")
    asking = net.spawn(_ask(leaver, 1))
    orphan = await server.recv()
    net.kill("leaver")
    with pytest.raises(LinkClosedError):
        await asking
    orphan.answer("echo", {"i": 1})
    net.spawn(_echo(server))
    assert await _ask(stayer, 2) == 2


async def test_closed_server_end_drops_answers_quietly(net: Net) -> None:
    server, client = net.server(), net.client()
    asking = net.spawn(client.request("ask", timeout_s=0.2))
    held = await server.recv()
    server.close()
    held.answer("echo")
    with pytest.raises(UnreachableError):
        await asking
