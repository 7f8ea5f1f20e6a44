"""The latest cores, chunk by chunk."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.transport.sessions import latest
from ddrl_bus.transport.sessions.latest import ASK_AFTER_S, CHUNK, Chunk, LatestPublisher, LatestSubscriber, digest

V1, V2 = (1, 1), (1, 2)


def value(size: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(size)


def chunks(version: tuple[int, int], content: bytes) -> tuple[Chunk, ...]:
    return LatestPublisher().publish(version, memoryview(content))


def take(core: LatestSubscriber, *some: Chunk, now: float = 0.0) -> Any:
    """What the last of `some` completes."""
    complete = None
    for chunk in some:
        complete = core.chunk(chunk.head, chunk.body, now)
    return complete


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 5])
def test_value_arrives_whole_and_read_only(size: int) -> None:
    content = value(size)
    cut = chunks(V1, content)
    assert [len(c.body) for c in cut[:-1]] == [CHUNK] * (len(cut) - 1)
    core = LatestSubscriber(0.0)
    version, received = take(core, *cut)
    assert (version, bytes(received), received.readonly) == (V1, content, True)
    assert core.held == V1


def test_a_value_in_one_chunk_is_not_copied() -> None:
    content = value(100)
    (chunk,) = chunks(V1, content)
    _, received = take(LatestSubscriber(0.0), chunk)
    assert received.obj is content


def test_chunks_in_any_order_and_twice() -> None:
    content = value(4 * CHUNK + 9)
    cut = list(chunks(V1, content)) * 2
    Random(1).shuffle(cut)
    core = LatestSubscriber(0.0)
    whole = [done for chunk in cut if (done := core.chunk(chunk.head, chunk.body, 0.0))]
    assert [bytes(received) for _, received in whole] == [content]


@pytest.mark.parametrize("held", [(1, 5), (2, 1)])
def test_never_back(held: tuple[int, int]) -> None:
    core = LatestSubscriber(0.0)
    take(core, *chunks(held, value(10)))
    for older in [(1, 1), (1, 4), (1, 5), held]:
        assert take(core, *chunks(older, value(2 * CHUNK))) is None
    assert core.held == held


def test_a_new_life_of_the_publisher_is_newer_whatever_its_numbers() -> None:
    core = LatestSubscriber(0.0)
    take(core, *chunks((1, 900), value(10)))
    assert take(core, *chunks((2, 1), value(10))) is not None


def test_a_newer_version_replaces_a_half_of_the_older() -> None:
    core = LatestSubscriber(0.0)
    first, second = chunks(V1, value(2 * CHUNK)), chunks(V2, value(2 * CHUNK, 1))
    assert take(core, first[0], second[0], first[1]) is None
    version, received = take(core, second[1])
    assert (version, bytes(received)) == (V2, value(2 * CHUNK, 1))


def test_damage_is_torn_and_a_snapshot_heals_it() -> None:
    core = LatestSubscriber(0.0)
    first, last = chunks(V1, value(2 * CHUNK))
    flipped = Chunk(last.version, last.total, last.offset, last.digest, memoryview(bytes(CHUNK)))
    with pytest.raises(WireError, match="torn"):
        take(core, first, flipped)
    assert core.held is None
    assert core.poll(ASK_AFTER_S)
    assert take(core, first, last) is not None


def test_chunks_that_disagree_on_the_whole_do_not_block_the_version() -> None:
    core = LatestSubscriber(0.0)
    first, last = chunks(V1, value(2 * CHUNK))
    core.chunk([1, 1, 3 * CHUNK, 0, first.digest], first.body, 0.0)  # its total was damaged
    with pytest.raises(WireError, match="disagree"):
        take(core, first)
    assert take(core, first, last) is not None


@pytest.mark.parametrize(
    "head",
    [
        None,
        [],
        [1, 1, 8, 0],
        [1, 1, 8, 0, 0, 0],
        [1, 1, 8, 0, "0"],
        [1, 1, 8, 0, True],
        [1, 1, 8, 0, 1.0],
        [-1, 1, 8, 0, 0],
        [1, 1, 8, -8, 0],
        [1, 1, 7, 0, 0],
        [1, 1, 9, 0, 0],
        [1, 1, 8 + CHUNK, 0, 0],
        [1, 1, 16, 8, 0],
        [1, 1, latest.MAX_VALUE + 8, latest.MAX_VALUE, 0],
        [1, 1, 2**63, 2**63 - 8, 0],
    ],
)
def test_malformed_heads_are_refused(head: object) -> None:
    core = LatestSubscriber(0.0)
    with pytest.raises(WireError) as caught:
        core.chunk(head, memoryview(bytes(8)), 0.0)
    assert caught.value.reason == "chunk"
    assert core._partial is None


def test_an_empty_body_is_no_chunk() -> None:
    with pytest.raises(WireError):
        LatestSubscriber(0.0).chunk([1, 1, 0, 0, 0], memoryview(b""), 0.0)


def test_asks_until_it_holds_anything() -> None:
    core = LatestSubscriber(10.0)
    assert [core.poll(10.0 + t) for t in (0.0, ASK_AFTER_S, ASK_AFTER_S + 0.1, 2 * ASK_AFTER_S)] == [
        False,
        True,
        False,
        True,
    ]
    take(core, *chunks(V1, value(9)), now=12.0)
    assert not core.poll(99.0)


def test_a_beacon_of_what_it_lacks_makes_it_ask() -> None:
    core = LatestSubscriber(0.0)
    take(core, *chunks(V1, value(9)))
    core.beacon(V1, 5.0)
    assert not core.poll(50.0)
    core.beacon(V2, 60.0)
    core.beacon(V2, 60.4)  # repetitions do not put it off
    assert core.poll(60.0 + ASK_AFTER_S)
    take(core, *chunks(V2, value(9)), now=61.0)
    assert not core.poll(99.0)


def test_completing_an_older_version_leaves_it_behind() -> None:
    core = LatestSubscriber(0.0)
    core.beacon(V2, 1.0)
    take(core, *chunks(V1, value(9)), now=1.1)
    assert core.poll(2.0)


def test_does_not_ask_while_a_slow_link_brings_chunks() -> None:
    core = LatestSubscriber(0.0)
    for i, chunk in enumerate(chunks(V1, value(20 * CHUNK))):
        now = i * 0.4
        core.chunk(chunk.head, chunk.body, now)
        assert not core.poll(now + 0.3)
    assert core.held == V1


def test_asks_again_when_the_chunks_stop() -> None:
    core = LatestSubscriber(0.0)
    first, second, _ = chunks(V1, value(3 * CHUNK))
    take(core, first, second, now=1.0)
    take(core, first, now=1.4)  # had that: no progress
    assert core.poll(1.0 + ASK_AFTER_S)


def test_publisher_only_goes_forward_and_serves_joiners_the_last() -> None:
    publisher = LatestPublisher()
    assert publisher.snapshot() == ()
    publisher.publish(V2, memoryview(value(9)))
    for version in (V1, V2):
        with pytest.raises(ValueError, match="not newer"):
            publisher.publish(version, memoryview(value(9)))
    cut = publisher.publish((2, 1), memoryview(value(2 * CHUNK)))
    assert publisher.snapshot() == cut
    assert cut[0].head == [2, 1, 2 * CHUNK, 0, digest(value(2 * CHUNK))]
