"""Small messages that leave together, over every scheme: nothing shows that they did but the number of frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from harness import LARGE, SMALL, WAIT_S, Net, fill, number_of, numbered, take, turns, until

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.links import Sender, runs
from ddrl_bus.transport.links.runs import RUN_BYTES
from ddrl_bus.transport.wire import Buffer, Layout

OTHER = Layout("unroll", {"v": ("int64", (5,))})
LARGEST = Layout("unroll", {"v": ("int64", ((runs.SMALL - 64) // 8,))})
"""That goes with others."""


@contextmanager
def frames_of(sender: Sender, receiver: str = "learner") -> Iterator[list[bytes]]:
    """What it hands over meanwhile."""
    frames: list[bytes] = []
    socket, send = sender._data[receiver], sender._data[receiver].send

    def noting(*parts: Buffer) -> bool:
        frames.extend(map(bytes, parts))
        return send(*parts)

    socket.send = noting  # type: ignore[method-assign]
    yield frames
    socket.send = send  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("layout", "lengths"),
    [(SMALL, [60]), (LARGEST, [RUN_BYTES // (runs.SMALL - 64)] * 10), (LARGE, [1] * 60)],
    ids=["small", "just small enough", "large"],
)
async def test_what_is_sent_in_one_turn_leaves_in_few_frames(net: Net, layout: Layout, lengths: list[int]) -> None:
    receiver, sender = net.receiver(window=60), net.sender()
    await until(lambda: sender.connected)
    with frames_of(sender) as frames:
        assert fill(sender, layout) == 60
        await turns(2)
        assert [len(wire.decode_run(frame)) for frame in frames] == lengths
    assert await take(receiver, 60) == [*range(60)]
    balance = await net.settled(sender)
    assert (balance.produced, balance.taken, balance.lost) == (60, 60, 0)


async def test_one_alone_leaves_at_once(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    await until(lambda: sender.connected)
    with frames_of(sender) as frames:
        await sender.send(numbered(0), {"i": 0})
        await turns(2)
        assert [wire.decode(frame).seq for frame in frames] == [1]
    assert await take(receiver, 1) == [0]
    await net.settled(sender)


async def test_order_holds_between_layouts_and_sizes(net: Net) -> None:
    receiver, sender = net.receiver(window=60), net.sender()
    await until(lambda: sender.connected)
    layouts = [SMALL, SMALL, OTHER, LARGE, SMALL, LARGE]
    for number in range(60):
        assert sender.try_send(numbered(number, layouts[number % 6]), {"i": number})
    assert await take(receiver, 60) == [*range(60)]
    assert (await net.settled(sender)).duplicates == 0


async def test_each_receiver_has_a_run_of_its_own(net: Net) -> None:
    receivers = [net.receiver(name, window=20) for name in ("learner-0", "learner-1")]
    sender = net.sender(to=("learner-0", "learner-1"))
    await until(lambda: sender.credit == 40)
    with frames_of(sender, "learner-0") as first, frames_of(sender, "learner-1") as second:
        assert fill(sender) == 40
        await turns(2)
        assert [[len(wire.decode_run(frame)) for frame in frames] for frames in (first, second)] == [[20], [20]]
    numbers = [await take(receiver, 20) for receiver in receivers]
    assert sorted(numbers[0] + numbers[1]) == [*range(40)]
    await net.settled(sender)


async def test_an_end_that_closes_sends_what_it_holds(net: Net) -> None:
    receiver, sender = net.receiver(window=10), net.sender()
    await until(lambda: sender.connected)
    assert fill(sender) == 10
    sender.close()
    assert await take(receiver, 10) == [*range(10)]


async def test_fields_that_do_not_travel_are_refused_where_they_are_sent(net: Net) -> None:
    receiver, sender = net.receiver(window=4), net.sender()
    await until(lambda: sender.connected)
    await sender.send(numbered(0), {"i": 0})
    with pytest.raises(TypeError, match="can not serialize"):
        sender.try_send(numbered(1), {"i": np.int64(1)})
    with pytest.raises(WireError, match="fields of"):
        sender.try_send(numbered(1), {"i": 1, "words": "x" * wire.MAX_HEADER})
    assert sender.try_send(numbered(1), {"i": 1, "words": "x" * (wire.MAX_FIELDS - 20)})
    await sender.send(numbered(2), {"i": 2})
    assert await take(receiver, 3) == [0, 1, 2]
    await net.settled(sender)


async def test_what_is_lost_with_a_life_is_sent_to_the_next(net: Net) -> None:
    net.receiver(window=10, on_loss="resend")
    sender = net.sender(on_loss="resend")
    await until(lambda: sender.connected)
    assert fill(sender) == 10  # nothing has left yet
    net.kill("learner")
    reborn = net.receiver(epoch=2, window=10, on_loss="resend")
    assert await take(reborn, 10) == [*range(10)]
    assert await sender.flush(WAIT_S)


async def test_a_message_of_a_run_that_is_refused_takes_no_other_with_it(net: Net) -> None:
    refused = {3, 4, 9}
    receiver = net.receiver(window=10, check=lambda message: "odd" if number_of(message) in refused else None)
    sender = net.sender()
    await until(lambda: sender.connected)
    assert fill(sender) == 10
    assert await take(receiver, 7) == [number for number in range(10) if number not in refused]
    balance = await net.settled(sender)
    assert (balance.produced, balance.taken, balance.refused) == (10, 7, 3)


async def test_the_way_is_timed_message_by_message(net: Net) -> None:
    receiver, sender = net.receiver(window=10), net.sender()
    await until(lambda: sender.connected)
    assert fill(sender) == 10
    await take(receiver, 10)
    ns = net.count("learner", "data", "wire_ns")
    assert 10 * 1_000 < ns < 10 * WAIT_S * 1e9
    await net.settled(sender)
