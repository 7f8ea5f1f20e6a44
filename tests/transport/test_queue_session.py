"""The queue cores, step by step. A receiver's table: what arrives, what it says, what it then credits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddrl_bus.transport.sessions.queue import (
    CREDIT_EVERY_S,
    GRACE_S,
    PROBE_S,
    SILENT_S,
    Credit,
    Inbound,
    OnLoss,
    Probe,
    QueueReceiver,
    QueueSender,
    Reopened,
    Resend,
)

ACTOR, LEARNER = ("actor-0", 7), ("learner-0", 3)


def credit(received: int = 0, freed: int = 0, window: int = 4, epoch: int = 3, to: tuple[str, int] = ACTOR) -> Credit:
    return Credit("learner-0", epoch, *to, received, freed, window)


def sender(on_loss: OnLoss = "count", window: int = 4) -> QueueSender[str]:
    core: QueueSender[str] = QueueSender(*ACTOR, on_loss)
    core.credit(credit(window=window), 0.0)
    return core


def receiver(on_loss: OnLoss = "count", window: int = 4) -> QueueReceiver:
    core = QueueReceiver(*LEARNER, window, on_loss)
    assert core.hello(*ACTOR) is not None
    list(core.poll(0.0))
    list(core.credits())
    return core


def send(core: QueueSender[str], *frames: str, now: float = 0.0) -> None:
    for frame in frames:
        lane = core.ready(now)
        assert lane is not None
        core.sent(lane, frame, now)


def arrive(core: QueueReceiver, *numbers: int, now: float = 0.0) -> list[str]:
    return [core.arrived(*ACTOR, number, LEARNER[1], now) for number in numbers]


def given_up(core: QueueReceiver, now: float) -> list[int]:
    return [missing for _, missing in core.poll(now)]


def state(core: QueueReceiver) -> tuple[int, int, int]:
    inbound = core.senders[ACTOR[0]]
    return inbound.received, inbound.freed, inbound.lost


# -- sender ----------------------------------------------------------------------------------------------------------


def test_without_credit_nothing_goes_out() -> None:
    core: QueueSender[str] = QueueSender(*ACTOR)
    assert core.ready(0.0) is None
    assert core.settled


def test_the_window_is_how_many_may_be_unfreed() -> None:
    core = sender(window=2)
    send(core, "a", "b")
    assert core.ready(0.0) is None
    core.credit(credit(received=2, freed=0, window=2), 0.1)
    assert core.ready(0.1) is None  # settled, but nobody took them
    core.credit(credit(received=2, freed=1, window=2), 0.2)
    send(core, "c", now=0.2)
    assert core.ready(0.2) is None


def test_most_credit_first_and_the_silent_not_at_all() -> None:
    core = sender(window=2)
    core.credit(Credit("learner-1", 1, *ACTOR, 0, 0, 3), 1.0)
    lane = core.ready(1.0)
    assert lane is not None
    assert (lane.receiver, lane.credit) == ("learner-1", 3)
    core.credit(credit(window=9), 1.0)
    assert core.ready(1.0) is core.lanes["learner-0"]
    assert core.ready(1.0 + SILENT_S) is None


@pytest.mark.parametrize(
    "stale",
    [
        credit(received=2, freed=2, to=("actor-1", 7)),
        credit(received=2, freed=2, to=("actor-0", 6)),
        credit(received=2, freed=2, epoch=2),
        credit(received=3, freed=3),
    ],
    ids=["other sender", "other life of ours", "older life of the receiver", "never sent"],
)
def test_credits_that_mean_somebody_else_change_nothing(stale: Credit) -> None:
    core = sender()
    send(core, "a", "b")
    assert core.credit(stale, 9.0) is None
    lane = core.lanes["learner-0"]
    assert (lane.received, lane.freed, lane.heard, lane.epoch) == (0, 0, 0.0, 3)


def test_reordered_credits_never_take_back() -> None:
    core = sender()
    send(core, "a", "b", "c")
    core.credit(credit(received=3, freed=2), 0.1)
    core.credit(credit(received=1, freed=0), 0.2)
    lane = core.lanes["learner-0"]
    assert (lane.received, lane.freed, lane.credit) == (3, 2, 3)


def test_freed_beyond_sent_gives_no_more_than_the_window() -> None:
    core = sender(window=4)
    send(core, "a")
    core.credit(credit(received=1, freed=10**18), 0.1)
    assert core.lanes["learner-0"].credit == 4


def test_probe_when_nothing_moves() -> None:
    core = sender()
    assert list(core.poll(9.0)) == []  # nothing out, nothing to ask
    core.credit(credit(), 10.0)
    send(core, "a", "b", now=10.0)
    lane = core.lanes["learner-0"]
    assert list(core.poll(10.0 + PROBE_S - 0.01)) == []
    assert list(core.poll(10.0 + PROBE_S)) == [Probe(lane, 2)]
    assert list(core.poll(10.1 + PROBE_S)) == []
    assert list(core.poll(10.0 + 2 * PROBE_S)) == [Probe(lane, 2)]  # a probe may be lost too
    core.credit(credit(received=2), 11.5)
    assert list(core.poll(20.0)) == []
    assert core.settled


def test_resend_what_is_not_received() -> None:
    core = sender("resend")
    send(core, "a", "b", "c")
    core.credit(credit(received=1), 0.1)
    lane = core.lanes["learner-0"]
    assert list(core.poll(0.1 + PROBE_S)) == [Resend(lane, 2, "b"), Resend(lane, 3, "c")]
    core.credit(credit(received=3), 1.0)
    assert list(core.poll(9.0)) == []
    assert not lane.kept


def resent(core: QueueSender[str], *moments: float) -> list[float]:
    """When anything is sent again, the receiver being heard all the time."""
    found = []
    for now in moments:
        core.lanes["learner-0"].heard = now
        if any(isinstance(action, Resend) for action in core.poll(now)):
            found.append(now)
    return found


def test_what_takes_long_is_sent_again_ever_more_seldom() -> None:
    """On a narrow line it is under way, and what is sent again would only hold it up."""
    core = sender("resend")
    send(core, "a", "b")
    halves = [n / 2 for n in range(1, 32)]
    assert resent(core, *halves) == [0.5, 1.5, 3.5, 7.5, 15.5]
    core.credit(credit(received=1), 15.6)
    assert resent(core, 20.0, 25.5, 25.6) == [25.6]  # the last one took longer than that


def test_what_was_settled_soon_is_sent_again_soon() -> None:
    core = sender("resend")
    send(core, "a", "b", now=1.0)
    core.credit(credit(received=1), 1.1)
    assert resent(core, 1.5, 1.6) == [1.6]


@pytest.mark.parametrize("on_loss", ["count", "resend"])
def test_a_receiver_that_is_not_heard_is_sent_nothing(on_loss: OnLoss) -> None:
    core = sender(on_loss)
    send(core, "a")
    assert list(core.poll(PROBE_S))
    assert [*core.poll(SILENT_S), *core.poll(99.0)] == []
    core.credit(credit(), 100.0)
    assert len(list(core.poll(100.0))) == 1


@pytest.mark.parametrize(("on_loss", "redo"), [("count", ()), ("resend", ("b", "c"))])
def test_new_life_of_the_receiver_opens_a_new_lane(on_loss: OnLoss, redo: tuple[str, ...]) -> None:
    core = sender(on_loss)
    send(core, "a", "b", "c")
    core.credit(credit(received=1, freed=1), 0.1)
    old = core.lanes["learner-0"]
    reopened = core.credit(credit(epoch=4), 0.2)
    lane = core.lanes["learner-0"]
    assert reopened == Reopened(lane, old, redo)
    assert (lane.epoch, lane.sent, lane.received, lane.credit) == (4, 0, 0, 4)


# -- receiver --------------------------------------------------------------------------------------------------------

A, DUP, FAR = "accept", "duplicate", "beyond_window"


@pytest.mark.parametrize(
    ("numbers", "verdicts", "received"),
    [
        ([1, 2, 3, 4], [A, A, A, A], 4),
        ([1, 1, 2, 2, 1], [A, DUP, A, DUP, DUP], 2),
        ([3, 1, 2], [A, A, A], 3),
        ([2, 2, 1, 2], [A, DUP, A, DUP], 2),
        ([4, 3, 2], [A, A, A], 0),
        ([4, 3, 2, 1], [A, A, A, A], 4),
        ([1, 2, 3, 4, 5], [A, A, A, A, FAR], 4),
        ([2**64 - 1, 1], [FAR, A], 1),
        ([0, 1], [FAR, A], 1),
        ([-1, 1], [FAR, A], 1),
    ],
)
def test_numbers_are_accepted_once_in_any_order(numbers: list[int], verdicts: list[str], received: int) -> None:
    core = receiver()
    assert arrive(core, *numbers) == verdicts
    assert state(core) == (received, 0, 0)


@pytest.mark.parametrize(
    ("sender", "epoch", "lane", "verdict"),
    [
        ("actor-0", 7, 3, "accept"),
        ("actor-1", 7, 3, "unknown_sender"),
        ("actor-0", 8, 3, "unknown_sender"),
        ("actor-0", 6, 3, "fenced"),
        ("actor-0", 7, 2, "other_life"),
        ("actor-0", 7, 0, "other_life"),
    ],
)
def test_only_the_lane_of_both_present_lives_is_open(sender: str, epoch: int, lane: int, verdict: str) -> None:
    assert receiver().arrived(sender, epoch, 1, lane, 0.0) == verdict


def test_a_newer_life_replaces_the_older_one_for_good() -> None:
    core = receiver()
    arrive(core, 1, 2)
    assert core.hello("actor-0", 8) == Inbound("actor-0", 8)
    assert core.hello("actor-0", 7) is None
    core.freed("actor-0", 7)  # the consumer takes what the older life had sent
    assert state(core) == (0, 0, 0)
    assert core.arrived("actor-0", 7, 3, 3, 0.0) == "fenced"
    assert core.arrived("actor-0", 8, 1, 3, 0.0) == "accept"


def test_hello_again_keeps_the_count() -> None:
    core = receiver()
    arrive(core, 1, 2)
    assert core.hello(*ACTOR) is core.senders["actor-0"]
    assert state(core) == (2, 0, 0)


def test_the_window_moves_with_what_is_freed() -> None:
    core = receiver(window=2)
    assert arrive(core, 1, 2, 3) == [A, A, FAR]
    core.freed(*ACTOR)
    assert arrive(core, 3, 4) == [A, FAR]


def test_a_gap_is_given_up_after_the_grace_time() -> None:
    core = receiver()
    arrive(core, 1, 4, now=10.0)
    assert given_up(core, 10.0 + GRACE_S - 0.01) == []
    assert given_up(core, 10.0 + GRACE_S) == [2]
    assert state(core) == (4, 2, 2)  # the lost ones leave the window
    assert arrive(core, 2, 3) == [DUP, DUP]  # too late


def test_a_gap_filled_in_time_is_no_loss() -> None:
    core = receiver()
    arrive(core, 1, 3, now=10.0)
    arrive(core, 2, now=10.9)
    assert given_up(core, 99.0) == []
    assert state(core) == (3, 0, 0)


def test_each_gap_has_its_own_grace_time() -> None:
    core = receiver(window=6)
    arrive(core, 2, now=10.0)
    arrive(core, 4, now=10.9)
    assert given_up(core, 11.0) == [1]
    assert given_up(core, 11.9) == []
    assert given_up(core, 12.0) == [1]


def test_an_older_gap_that_was_filled_does_not_shorten_the_next_ones_grace() -> None:
    core = receiver(window=8)
    arrive(core, 1)
    core.probed(*ACTOR, 3, LEARNER[1], 10.0)
    arrive(core, 2, 3, now=10.9)  # in order: the announced gap closes
    arrive(core, 5, now=10.95)  # a new one opens
    assert given_up(core, 11.0) == []
    assert given_up(core, 10.95 + GRACE_S) == [1]


def test_a_lost_tail_shows_by_the_probe() -> None:
    core = receiver()
    arrive(core, 1)
    assert given_up(core, 50.0) == []
    core.probed(*ACTOR, 3, LEARNER[1], 50.0)
    assert given_up(core, 50.0 + GRACE_S) == [2]
    assert state(core) == (3, 2, 2)


@pytest.mark.parametrize(
    ("sender", "epoch", "sent", "lane"),
    [("actor-1", 7, 2, 3), ("actor-0", 6, 2, 3), ("actor-0", 8, 2, 3), ("actor-0", 7, 2, 2), ("actor-0", 7, 5, 3)],
    ids=["stranger", "older life", "newer life", "other lane", "beyond the window"],
)
def test_probes_that_cannot_be_are_ignored(sender: str, epoch: int, sent: int, lane: int) -> None:
    core = receiver()
    core.probed(sender, epoch, sent, lane, 0.0)
    assert given_up(core, 99.0) == []


def test_resend_never_gives_up() -> None:
    core = receiver("resend")
    arrive(core, 1, 4)
    core.probed(*ACTOR, 4, LEARNER[1], 0.0)
    assert given_up(core, 10**6) == []
    assert arrive(core, 2, 3) == [A, A]
    assert state(core) == (4, 0, 0)


def test_credits_tell_what_changed_and_repeat() -> None:
    core = receiver(window=2)
    told = credit(received=2, freed=1, window=2)
    arrive(core, 1, 2)
    core.freed(*ACTOR)
    assert list(core.credits()) == [told]
    assert list(core.credits()) == []
    list(core.poll(CREDIT_EVERY_S - 0.02))
    assert list(core.credits()) == []
    arrive(core, 2)  # a duplicate: our credit was lost
    list(core.poll(CREDIT_EVERY_S - 0.01))
    assert list(core.credits()) == [told]
    list(core.poll(CREDIT_EVERY_S))
    assert list(core.credits()) == [told]


def test_a_wide_window_is_given_back_by_halves_or_by_the_timer() -> None:
    core = receiver(window=4)
    arrive(core, 1, 2, 3)
    core.freed(*ACTOR)
    assert list(core.credits()) == []
    core.freed(*ACTOR)
    assert list(core.credits()) == [credit(received=3, freed=2, window=4)]
    core.freed(*ACTOR)
    list(core.poll(0.1))
    assert list(core.credits()) == [credit(received=3, freed=3, window=4)]


def test_hello_of_a_new_life_is_answered_even_if_the_old_one_had_news() -> None:
    core = receiver()
    arrive(core, 1)
    core.hello("actor-0", 8)
    list(core.poll(0.1))
    assert list(core.credits()) == [credit(to=("actor-0", 8))]


def test_both_sides_agree() -> None:
    out, into = sender(window=2), receiver(window=2)
    for turn in range(1, 20):
        send(out, "x")
        assert arrive(into, turn) == [A]
        into.freed(*ACTOR)
        for told in into.credits():
            assert out.credit(told, 0.0) is None
    assert out.settled
    assert out.lanes["learner-0"].credit == 2


@given(
    before=st.lists(st.integers(1, 9), max_size=4),
    first=st.integers(0, 9),
    count=st.integers(1, 9),
    epoch=st.integers(6, 8),
    lane=st.integers(2, 4),
    freed=st.integers(0, 3),
)
def test_the_next_ones_together_or_one_by_one(
    before: list[int], first: int, count: int, epoch: int, lane: int, freed: int
) -> None:
    """Accepted together where each alone would be, and only then; the same state follows."""

    def core() -> QueueReceiver:
        core = receiver(window=6)
        accepted = arrive(core, *before).count(A)
        for _ in range(min(freed, accepted)):
            core.freed(*ACTOR)
        return core

    together, alone = core(), core()
    verdicts = [alone.arrived(ACTOR[0], epoch, number, lane, 0.0) for number in range(first, first + count)]
    fresh = state(core())
    if together.next_ones(ACTOR[0], epoch, first, lane, count):
        assert verdicts == [A] * count
        assert state(together) == state(alone)
        assert [*together.poll(0.1)] == [*alone.poll(0.1)]
        assert [*together.credits()] == [*alone.credits()]
    else:
        assert state(together) == fresh
        in_order = first == fresh[0] + 1 and not core().senders[ACTOR[0]].ahead
        assert verdicts != [A] * count or not in_order
