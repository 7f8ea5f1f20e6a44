"""The latest cores, question by question and chunk by chunk."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

import numpy as np
import psutil
import pytest

from ddrl_bus.errors import WireError
from ddrl_bus.transport import wire
from ddrl_bus.transport.sessions import latest
from ddrl_bus.transport.sessions.latest import (
    ASK_AFTER_S,
    CHUNK,
    KEPT,
    MAX_WINDOW,
    NOTHING,
    SILENT_S,
    WINDOW,
    WITHIN_S,
    Ask,
    Chunk,
    LatestPublisher,
    LatestSubscriber,
    digest,
)
from ddrl_bus.transport.sessions.rate import BURST_S

V1, V2, V3 = (1, 1), (1, 2), (1, 3)
LIFE = ("actor-0", 1)
Version = tuple[int, int]


def frame(size: int, version: Version = V1, seed: int = 0) -> memoryview:
    """A frame of about so many bytes."""
    arrays = {"v": np.frombuffer(Random(seed).randbytes(size), np.uint8)}
    return wire.encode("weights", "learner-0", *version, {}, arrays, sent_at=0)


def published(*versions: Version, size: int = 100, differences: bool = False) -> LatestPublisher:
    publisher = LatestPublisher(differences)
    for version in versions:
        publisher.publish(version, frame(size, version, seed=version[1]))
    return publisher


def ask(number: int = 1, received: int = 0, held: Version = NOTHING, **more: Any) -> Ask:
    return Ask(
        **{"number": number, "since": 1, "received": received, "held": held, "partial": NOTHING, "offset": 0} | more
    )


def first(publisher: LatestPublisher, question: Ask | None = None, now: float = 0.0) -> list[Chunk]:
    assert publisher.asked(LIFE, question or ask(), now)
    return publisher.more(LIFE, now)


def chunks(version: Version, content: memoryview) -> list[Chunk]:
    payload = latest.Payload(version, NOTHING, digest(content), content, len(content))
    return [Chunk(payload, at, content[at : at + CHUNK]) for at in range(0, len(content), CHUNK)]


def take(core: LatestSubscriber, *some: Chunk, now: float = 0.0) -> Any:
    """What the last of `some` completes."""
    complete = None
    for chunk in some:
        complete = core.chunk(chunk.head, chunk.body, now)
    return complete


def converse(publisher: LatestPublisher, core: LatestSubscriber, now: float = 0.0) -> list[Version]:
    """Questions and answers, until there are no more; what was completed."""
    done, told = [], True
    while told:
        question = core.question(now)
        told = question is not None
        if question:
            assert publisher.asked(LIFE, question, now)
        for chunk in publisher.more(LIFE, now):
            told = True
            if complete := core.chunk(chunk.head, chunk.body, now):
                assert complete[1] == publisher.value
                done.append(complete[0])
    return done


# ── taking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, 3 * CHUNK + 5])
def test_value_arrives_whole_and_read_only(size: int) -> None:
    content = memoryview(Random(0).randbytes(size))
    core = LatestSubscriber(0.0)
    version, received = take(core, *chunks(V1, content))
    assert (version, received, received.readonly, core.held) == (V1, content, True, V1)


def test_a_value_in_one_chunk_is_not_copied() -> None:
    content = frame(100)
    _, received = take(LatestSubscriber(0.0), *chunks(V1, content))
    assert received.obj is content.obj


@pytest.mark.parametrize("held", [(1, 5), (2, 1)])
def test_never_back(held: Version) -> None:
    core = LatestSubscriber(0.0)
    take(core, *chunks(held, frame(10)))
    for older in [(1, 1), (1, 4), (1, 5), held]:
        assert take(core, *chunks(older, frame(2 * CHUNK))) is None
        assert not core.wants(older, 0.0)
    assert core.held == held


def test_a_new_life_of_the_publisher_is_newer_whatever_its_numbers() -> None:
    core = LatestSubscriber(0.0)
    take(core, *chunks((1, 900), frame(10)))
    assert take(core, *chunks((2, 1), frame(10))) is not None


def test_a_newer_version_replaces_a_half_of_the_older() -> None:
    core = LatestSubscriber(0.0)
    one, two = chunks(V1, frame(CHUNK)), chunks(V2, frame(CHUNK, seed=1))
    assert take(core, one[0], two[0], one[1]) is None
    version, received = take(core, two[1])
    assert (version, received) == (V2, frame(CHUNK, seed=1))


def test_chunks_that_come_twice_change_nothing() -> None:
    core = LatestSubscriber(0.0)
    one, two = chunks(V1, frame(CHUNK))
    assert take(core, one, one) is None
    assert take(core, two) is not None


def test_damage_is_torn_and_the_whole_is_asked_for() -> None:
    core = LatestSubscriber(0.0)
    core.question(0.0)
    one, two = chunks(V1, frame(CHUNK))
    with pytest.raises(WireError, match="torn"):
        take(core, one, Chunk(two.payload, two.offset, memoryview(bytes(len(two.body)))))
    question = core.question(0.0)
    assert question is not None
    assert (question.number, question.since, question.held, question.offset) == (2, 2, NOTHING, 0)
    assert take(core, one, two) is not None


def test_chunks_that_disagree_on_the_whole_do_not_block_the_version() -> None:
    core = LatestSubscriber(0.0)
    one, two = chunks(V1, frame(CHUNK))
    core.chunk([1, 1, 3 * CHUNK, 0, one.payload.digest, 0, 0], one.body, 0.0)  # its total was damaged
    with pytest.raises(WireError, match="disagree"):
        take(core, two)
    assert take(core, one, two) is not None


@pytest.mark.parametrize(
    "head",
    [
        None,
        [],
        [1, 1, 8, 0, 0, 0],
        [1, 1, 8, 0, 0, 0, 0, 0],
        [1, 1, 8, 0, "0", 0, 0],
        [1, 1, 8, 0, True, 0, 0],
        [1, 1, 8, 0, 1.0, 0, 0],
        [-1, 1, 8, 0, 0, 0, 0],
        [1, 1, 8, -8, 0, 0, 0],
        [1, 1, 7, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 15, 8, 0, 0, 0],
        [1, 1, latest.MAX_VALUE + 8, latest.MAX_VALUE, 0, 0, 0],
        [1, 1, 2**63, 2**63 - 8, 0, 0, 0],
    ],
)
def test_malformed_heads_are_refused(head: object) -> None:
    core = LatestSubscriber(0.0)
    with pytest.raises(WireError) as caught:
        core.chunk(head, memoryview(bytes(8)), 0.0)
    assert caught.value.reason == "chunk"
    assert core._partial is None


def test_a_claim_of_much_takes_no_memory() -> None:
    core, before = LatestSubscriber(0.0), psutil.Process().memory_info().rss
    core.chunk([1, 1, latest.MAX_VALUE, 0, 0, 0, 0], memoryview(bytes(8)), 0.0)
    assert core._partial is not None
    assert core._partial.size == 8
    assert psutil.Process().memory_info().rss - before < latest.MAX_VALUE // 8


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_question_reads_back() -> None:
    question = Ask(7, 3, 1 << 40, (1 << 62, 5), V2, 12)
    assert Ask.parsed(question.text()) == question


@pytest.mark.parametrize(
    "text", [b"", b"1.2.3", b"1.1.0.0.0.0.0.-1", b"1.1.0.0.0.0.0.0.0", b"1" * 21 + b".1.0.0.0.0.0.0"]
)
def test_a_malformed_question_is_none(text: bytes) -> None:
    assert Ask.parsed(text) is None


def test_asks_at_once_and_until_it_holds_anything() -> None:
    core = LatestSubscriber(10.0)
    asked = [bool(core.question(10.0 + t)) for t in (0.0, 0.1, ASK_AFTER_S, ASK_AFTER_S + 0.1, 2 * ASK_AFTER_S)]
    assert asked == [True, False, True, False, True]


@pytest.mark.parametrize("fetches", [True, False])
def test_asks_when_it_hears_nothing_and_not_while_all_is_well(fetches: bool) -> None:
    core = LatestSubscriber(0.0, fetches)
    core.question(0.0)
    assert core.wants(V1, 0.1)
    core.took(V1, frame(10), 0.1)
    for second in range(1, 20):
        assert not core.wants(V1, float(second))  # a beacon
        assert core.question(float(second)) is None
    assert core.question(19.0 + SILENT_S)


def test_asks_when_it_knows_of_a_newer_version_and_gets_none_of_it() -> None:
    core = LatestSubscriber(0.0, fetches=False)
    core.question(0.0)
    core.took(V1, frame(10), 0.0)
    core.wants(V2, 1.0)
    core.wants(V2, 1.4)  # repetitions do not put it off
    assert core.question(1.4) is None
    assert core.question(1.0 + ASK_AFTER_S)


def test_says_how_much_has_come_after_half_a_window_and_when_it_is_whole() -> None:
    core = LatestSubscriber(0.0)
    core.question(0.0)
    said = []
    for chunk in chunks(V1, frame(6 * CHUNK)):
        take(core, chunk)
        question = core.question(0.0)
        said.append(question and (question.received // CHUNK, question.offset // CHUNK, question.held))
    assert said == [None, (2, 2, NOTHING), None, (4, 4, NOTHING), None, (6, 6, NOTHING), (6, 0, V1)]


def test_a_gap_is_asked_for_from_where_it_begins() -> None:
    core = LatestSubscriber(0.0)
    core.question(0.0)
    cut = chunks(V1, frame(4 * CHUNK))
    take(core, cut[0], cut[2], now=0.1)
    said = core.question(0.2)  # of half a window
    assert said is not None
    assert said.since == 1  # it may only be late
    question = core.question(0.2 + ASK_AFTER_S)
    assert question is not None
    assert (question.since, question.partial, question.offset) == (question.number, V1, CHUNK)
    assert take(core, *cut[1:]) is not None


def test_an_empty_chunk_tells_of_a_lost_tail() -> None:
    core = LatestSubscriber(0.0)
    core.question(0.0)
    one, two = chunks(V1, frame(CHUNK))
    take(core, one)
    take(core, Chunk(two.payload, len(two.payload.data), memoryview(b"")), now=1.0)
    question = core.question(1.0 + ASK_AFTER_S)
    assert question is not None
    assert question.since == question.number


# ── answering ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_publisher_only_goes_forward() -> None:
    publisher = published(V2)
    for version in (V1, V2):
        with pytest.raises(ValueError, match="not newer"):
            publisher.publish(version, frame(9))
    publisher.publish((2, 1), frame(9))


def test_a_question_waits_for_a_value_that_is_newer() -> None:
    publisher = LatestPublisher()
    assert first(publisher) == []
    assert publisher.beacon(LIFE) == []
    publisher.publish(V1, frame(10))
    (chunk,) = publisher.more(LIFE, now=0.0)
    assert (chunk.head[:4], chunk.body) == ([1, 1, len(publisher.value), 0], publisher.value)
    assert publisher.more(LIFE, now=0.0) == []
    assert first(publisher, ask(2, len(chunk.body), V1)) == []
    publisher.publish(V2, frame(10, V2))
    assert [c.payload.version for c in publisher.more(LIFE, now=0.0)] == [V2]


def test_no_more_than_a_window_is_on_its_way() -> None:
    publisher = published(V1, size=10 * CHUNK)
    sent = first(publisher)
    assert sum(len(c.body) for c in sent) == WINDOW
    assert publisher.more(LIFE, now=0.0) == []
    assert first(publisher, ask(2)) == []  # it asks again, with nothing received
    (more,) = first(publisher, ask(3, received=CHUNK))
    assert more.offset == WINDOW
    for version in (V2, V3):
        publisher.publish(version, frame(10 * CHUNK, version))
        assert publisher.more(LIFE, now=0.0) == []


def test_who_says_to_have_received_what_was_never_sent_gets_a_window() -> None:
    publisher = published(V1, size=10 * CHUNK)
    first(publisher)
    assert len(first(publisher, ask(2, received=1 << 60))) == WINDOW // CHUNK


def test_a_new_connection_goes_on_from_where_the_question_says() -> None:
    publisher = published(V1, size=10 * CHUNK)
    first(publisher)
    question = ask(2, received=2 * CHUNK, partial=V1, offset=2 * CHUNK)
    assert [c.offset // CHUNK for c in first(publisher, question)] == [4, 5]
    assert [c.offset // CHUNK for c in first(publisher, question)] == [2, 3, 4, 5]  # heard twice: what was sent is lost
    publisher.gone(LIFE, question)
    assert publisher.fetching == ()
    assert [c.offset // CHUNK for c in first(publisher, question)] == [2, 3, 4, 5]


def test_an_overtaken_question_changes_nothing() -> None:
    publisher = published(V1, size=10 * CHUNK)
    first(publisher, ask(5))
    assert first(publisher, ask(4, partial=V1, offset=0)) == []
    publisher.gone(LIFE, ask(4))
    assert publisher.fetching == (LIFE,)


def carry(publisher: LatestPublisher, core: LatestSubscriber, rate: float, now: float) -> tuple[float, list[int]]:
    """A value, over a link of so many bytes a second: when it is whole, and the bytes of its chunks."""
    under_way, sizes, whole = deque[Chunk](), list[int](), False
    while not whole:
        if question := core.question(now):
            assert publisher.asked(LIFE, question, now)
        under_way += publisher.more(LIFE, now)
        assert under_way, "they wait for each other"
        assert sum(len(chunk.body) for chunk in under_way) < latest.MAX_WINDOW * (1 + CHUNK / WINDOW)
        chunk = under_way.popleft()
        sizes.append(len(chunk.body))
        now += sizes[-1] / rate
        whole = core.chunk(chunk.head, chunk.body, now) is not None
    assert publisher.asked(LIFE, core.question(now) or ask(), now)
    return now, sizes


def test_a_window_is_what_comes_in_a_moment() -> None:
    """However fast the links that a value goes over, one after the other, nobody waits for a clock."""
    publisher, core, now, last = LatestPublisher(), LatestSubscriber(0.0), 0.0, list[int]()
    slow, middling, fast = 1e6, 3 * WINDOW / WITHIN_S, 1e10
    for number, rate in enumerate((slow, fast, slow, middling, fast, middling), start=1):
        publisher.publish((1, number), frame(80 * CHUNK, (1, number), seed=number))
        now, sizes = carry(publisher, core, rate, now)
        last.append(sizes[-2])
        if number == 3:  # the link has become slow: it is full once, and once half full
            assert sum(size for size in sizes if size > CHUNK) <= 3 * MAX_WINDOW // 2
    most = CHUNK * MAX_WINDOW // WINDOW
    assert last == pytest.approx([CHUNK, most, CHUNK, 3 * CHUNK, most, 3 * CHUNK], rel=0.3)


def test_nobody_waits_for_a_clock_however_fast_a_link_becomes_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a subscriber has not told of yet must not fill a window that has become smaller."""
    for name, nbytes in {"CHUNK": 64, "WINDOW": 256, "MAX_WINDOW": 2048}.items():
        monkeypatch.setattr(latest, name, nbytes)
    publisher, core, now, rng = LatestPublisher(), LatestSubscriber(0.0), 0.0, Random(0)
    for number in range(1, 300):
        publisher.publish((1, number), frame(rng.randrange(10_000), (1, number), seed=number))
        now, _ = carry(publisher, core, 10 ** rng.uniform(3, 7), now)


def test_what_is_lost_does_not_fill_a_window_for_ever() -> None:
    """All of a value, which who gets the next one does not miss; and meanwhile the window has become smaller."""
    publisher, core = published(V1, size=2 * MAX_WINDOW), LatestSubscriber(0.0)
    now, _ = carry(publisher, core, 1e10, 0.0)
    publisher.publish(V2, frame(MAX_WINDOW // 2, V2))
    assert publisher.more(LIFE, now)[-1].last
    publisher.publish(V3, frame(MAX_WINDOW, V3))
    now += 1.0
    take(core, *publisher.more(LIFE, now), now=now)
    question = core.question(now)
    assert question is not None
    assert question.since == 1
    assert publisher.asked(LIFE, question, now)
    assert publisher.more(LIFE, now)


def test_a_window_lasts_as_long_as_its_connection() -> None:
    publisher, core = published(V1, size=100 * CHUNK), LatestSubscriber(0.0)
    now, _ = carry(publisher, core, 1e10, 0.0)
    publisher.publish(V2, frame(100, V2))
    now, _ = carry(publisher, core, 1e4, now)  # so little shows nothing of the link
    publisher.publish(V3, frame(100 * CHUNK, V3))
    assert sum(len(chunk.body) for chunk in publisher.more(LIFE, now)) == MAX_WINDOW
    assert sum(len(chunk.body) for chunk in first(publisher, ask(99, since=99), 3.0)) == WINDOW


def test_a_newer_value_takes_the_place_of_a_half_sent_one_but_once() -> None:
    """A publisher that is faster than the link: what replaced another one is sent to its end."""
    publisher = published(V1, size=10 * CHUNK)
    sent = sum(len(chunk.body) for chunk in first(publisher))
    begun, whole = [1], []
    for number in range(2, 30):
        publisher.publish((1, number), frame(10 * CHUNK, (1, number), seed=number))
        for chunk in first(publisher, ask(number, received=sent), now=float(number)):
            sent += len(chunk.body)
            begun += [chunk.payload.version[1]] if chunk.offset == 0 else []
            whole += [chunk.payload.version[1]] if chunk.last else []
    assert begun[:5] == [1, 2, 4, 5, 7]
    assert whole == begun[1::2][: len(whole)]
    assert len(whole) > 8


def test_too_many_who_ask_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "MAX_FETCHING", 2)
    publisher = published(V1)
    assert [publisher.asked((f"actor-{n}", 1), ask(), now=0.0) for n in range(3)] == [True, True, False]


# ── what a value differs in ──────────────────────────────────────────────────────────────────────────────────────────


def test_equal_arrays_cost_a_head() -> None:
    publisher, core = published(V1, size=10 * CHUNK), LatestSubscriber(0.0)
    assert converse(publisher, core) == [V1]
    before = core._received
    publisher.publish(V2, frame(10 * CHUNK, V2, seed=1))  # the same arrays
    publisher.publish(V3, frame(10 * CHUNK, V3, seed=1))
    assert converse(publisher, core, 1.0) == [V3]
    assert core._received - before == wire.head_size(publisher.value) < 1000
    publisher.publish((1, 4), frame(10 * CHUNK, (1, 4), seed=2))
    assert converse(publisher, core, 2.0) == [(1, 4)]
    assert core._received - before > 10 * CHUNK


def changed(version: Version, arrays: int = 4096) -> memoryview:
    """Of `arrays` numbers one is different in each version."""
    values = np.random.default_rng(0).standard_normal(arrays, np.float32)
    values[version[1] % arrays] += 1
    return wire.encode("weights", "learner-0", *version, {}, {"v": values}, sent_at=0)


def test_a_difference_is_smaller_and_another_base_gets_the_whole() -> None:
    publisher, core, late = LatestPublisher(differences=True), LatestSubscriber(0.0), LatestSubscriber(0.0)
    publisher.publish(V1, changed(V1))
    converse(publisher, core)
    publisher.publish(V2, changed(V2))
    before = core._received
    assert converse(publisher, core, 1.0) == [V2]
    assert core._received - before < len(publisher.value) / 10
    publisher.gone(LIFE, publisher._fetching[LIFE].ask)
    assert converse(publisher, late, 1.0) == [V2]
    assert late._received == len(publisher.value)


def test_only_so_many_values_are_kept() -> None:
    publisher = LatestPublisher(differences=True)
    for number in range(1, 20):
        publisher.publish((1, number), changed((1, number)))
        publisher.asked((f"actor-{number}", 1), ask(), now=0.0)
        publisher.more((f"actor-{number}", 1), now=0.0)
    assert list(publisher._kept) == [(1, number) for number in range(20 - KEPT, 20)]


def test_values_of_another_size_travel_whole() -> None:
    publisher, core = LatestPublisher(differences=True), LatestSubscriber(0.0)
    publisher.publish(V1, changed(V1))
    converse(publisher, core)
    publisher.publish(V2, changed(V2, arrays=5000))
    before = core._received
    assert converse(publisher, core, 1.0) == [V2]
    assert core._received - before == len(publisher.value)


def test_a_difference_that_does_not_fit_is_torn_and_the_whole_comes() -> None:
    publisher, core = LatestPublisher(differences=True), LatestSubscriber(0.0)
    publisher.publish(V1, changed(V1))
    converse(publisher, core)
    core._value = changed((1, 9))  # what it holds is not what the publisher believes
    publisher.publish(V2, changed(V2))
    with pytest.raises(WireError, match="torn"):
        converse(publisher, core, 1.0)
    assert converse(publisher, core, 1.0) == [V2]


# ── rate ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_span_of_time_carries_more_than_the_rate_and_everybody_gets_a_turn() -> None:
    """Three who fetch 16 chunks each, with all the room there is on the way, at two chunks a second."""
    publisher, now = LatestPublisher(rate=2 * CHUNK, now=5.0), 5.0
    publisher.publish(V1, frame(16 * CHUNK))
    lives = [(f"actor-{n}", 1) for n in range(3)]
    sent: list[tuple[float, tuple[str, int]]] = []

    def send(life: tuple[str, int]) -> None:
        sent.extend((now, life) for _ in publisher.more(life, now))

    for life in lives:
        assert publisher.asked(life, ask(), now)
        send(life)
    while (wait_s := publisher.throttled_s(now)) is not None:
        now += wait_s
        while publisher.throttled_s(now) == 0:
            send(publisher.turn())
    rounds = WINDOW // CHUNK - 1
    assert [life for _, life in sent] == [lives[0], *lives * rounds, *lives[1:]]
    for count, (when, _) in enumerate(sent):
        assert count * CHUNK <= 2 * CHUNK * (when - 5.0 + BURST_S) + 1e-6
    assert now == pytest.approx(5.0 + (len(sent) - 1) / 2, abs=BURST_S + 1e-6)


@pytest.mark.parametrize(("rate", "chunk"), [(8e6, CHUNK), (2 * WINDOW / WITHIN_S, 2 * CHUNK)])
def test_chunks_grow_no_further_than_the_rate(rate: float, chunk: int) -> None:
    publisher, core, now = LatestPublisher(rate=rate), LatestSubscriber(0.0), 0.0
    for number in range(1, 9):
        publisher.publish((1, number), frame(CHUNK // 2, (1, number), seed=number))
        now, _ = carry(publisher, core, 1e10, now + 1.0)
    publisher.publish((1, 9), frame(MAX_WINDOW, (1, 9)))
    assert len(publisher.more(LIFE, now + 1.0)[0].body) == chunk


def test_what_waits_for_the_rate_is_the_newest_when_its_turn_comes() -> None:
    publisher = LatestPublisher(rate=100, now=0.0)
    publisher.publish(V1, frame(1000, V1))
    other = ("actor-1", 1)
    for life in (LIFE, other):
        assert publisher.asked(life, ask(), now=0.0)
    assert [chunk.payload.version for chunk in publisher.more(LIFE, 0.0)] == [V1]
    assert publisher.more(other, 0.0) == []
    publisher.publish(V2, frame(1000, V2))
    assert publisher.more(LIFE, 1.0) == []  # behind the one who waits already
    now = 1.0 + (publisher.throttled_s(1.0) or 0.0)
    assert publisher.turn() == other
    assert [chunk.payload.version for chunk in publisher.more(other, now)] == [V2]


def test_nobody_waits_who_is_gone_or_is_sent_all_there_is() -> None:
    publisher = LatestPublisher(rate=100, now=0.0)
    publisher.publish(V1, frame(1000))
    assert len(first(publisher)) == 1
    assert publisher.throttled_s(0.0) is None
    late = ("actor-1", 1)
    assert publisher.asked(late, ask(), now=0.0)
    assert publisher.more(late, 0.0) == []
    assert publisher.throttled_s(0.0) == pytest.approx(len(frame(1000)) / 100 - BURST_S)
    publisher.gone(late, ask())
    assert publisher.throttled_s(0.0) is None
