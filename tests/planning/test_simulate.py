"""The simulation against what queueing theory and plain arithmetic say."""

from __future__ import annotations

import random
from functools import partial

import pytest

from ddrl_bus.planning.simulate import (
    Activity,
    Barrier,
    Cpu,
    Latest,
    Mailbox,
    QueueIn,
    QueueOut,
    Simulation,
    Thread,
    Wire,
)


def work(thread: Thread, seconds: float, ends: list[float], sim: Simulation) -> Activity:
    yield thread.work(seconds)
    ends.append(sim.now)


FINE = 1e-3
"""Of a time slice, against works of seconds."""


def ends_of(cores: int, *works: float, others: float = 0.0, taken: float = 0.0, slice_s: float = FINE) -> list[float]:
    """When threads of their own are done with these, begun at once."""
    sim, ends = Simulation(), []
    cpu = Cpu(sim, cores, others, taken, slice_s)
    for seconds in works:
        sim.start(work(Thread(sim, cpu), seconds, ends, sim))
    sim.run(1e9)
    return ends


def test_threads_share_a_core_equally() -> None:
    # 3 at a third each until 1 is done at 3; two at a half until 2 is done at 5; the last one alone
    assert ends_of(1, 1.0, 2.0, 3.0) == pytest.approx([3.0, 5.0, 6.0], abs=3 * FINE)


def test_as_many_threads_as_cores_do_not_disturb_one_another() -> None:
    assert ends_of(2, 1.0, 2.0) == pytest.approx([1.0, 2.0])


def test_whoever_comes_waits_for_a_slice_of_each_before_it() -> None:
    # four slices of 1 in turn, of which the last thread has the fourth; then those that are left of the first three
    assert ends_of(1, 2.0, 2.0, 2.0, 0.5, slice_s=1.0) == pytest.approx([3.5, 4.5, 5.5, 6.5])


def test_others_take_their_share() -> None:
    assert ends_of(1, 1.0, others=1.0) == pytest.approx([2.0])
    assert ends_of(2, 1.0, others=0.5) == pytest.approx([1.0])
    # three share two cores until 1 is done at 1.5; then nobody disturbs anybody
    assert ends_of(2, 1.0, 2.0, others=1.0) == pytest.approx([1.5, 2.5], abs=3 * FINE)


def test_of_cores_that_are_taken_the_rest_is_shared() -> None:
    assert ends_of(2, 1.0, taken=0.5) == pytest.approx([1.0])
    # two at three quarters until 1 is done at 4/3; then there is a core for the other one
    assert ends_of(2, 1.0, 2.0, taken=0.5) == pytest.approx([4 / 3, 7 / 3], abs=3 * FINE)


def test_a_stalled_thread_is_busy_and_takes_no_core() -> None:
    sim, ends = Simulation(), []
    cpu = Cpu(sim, 1)
    stalled = Thread(sim, cpu)

    def activity() -> Activity:
        yield stalled.stall(2.0)

    sim.start(activity())
    sim.start(work(Thread(sim, cpu), 1.0, ends, sim))
    sim.run(4.0)

    assert ends == pytest.approx([1.0])
    assert (stalled.busy, stalled.done) == (2.0, 0.0)


def test_a_thread_does_one_thing_after_the_other() -> None:
    sim, ends = Simulation(), []
    thread = Thread(sim, Cpu(sim, 2))
    for _ in range(3):
        sim.start(work(thread, 1.0, ends, sim))
    sim.run(10.0)

    assert ends == pytest.approx([1.0, 2.0, 3.0])
    assert (thread.busy, thread.done, sim.now) == (pytest.approx(3.0), pytest.approx(3.0), 10.0)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_waiting_in_m_d_1_is_as_pollaczek_and_khinchine_say(load: float) -> None:
    sim, rng, waited = Simulation(), random.Random(1), []
    thread = Thread(sim, Cpu(sim, 1, slice_s=1.0))

    def customer() -> Activity:
        came = sim.now
        yield thread.work(1.0)
        waited.append(sim.now - came - 1.0)

    def arrivals() -> Activity:
        while True:
            yield sim.sleep(rng.expovariate(load))
            sim.start(customer())

    sim.start(arrivals())
    sim.run(30_000)

    assert sum(waited) / len(waited) == pytest.approx(load / (2 * (1 - load)), rel=0.07)


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_sojourn_under_processor_sharing_is_work_over_what_is_left(load: float) -> None:
    """E[T] = E[S] / (1 - ρ) whatever the distribution of work; here half of it is a tenth, half 1.9."""
    sim, rng, took = Simulation(), random.Random(2), []
    cpu = Cpu(sim, 1, slice_s=0.05)

    def customer() -> Activity:
        came = sim.now
        yield partial(cpu.work, rng.choice((0.1, 1.9)))
        took.append(sim.now - came)

    def arrivals() -> Activity:
        while True:
            yield sim.sleep(rng.expovariate(load))
            sim.start(customer())

    sim.start(arrivals())
    sim.run(30_000)

    assert sum(took) / len(took) == pytest.approx(1 / (1 - load), rel=0.07)
    assert cpu.done / sim.now == pytest.approx(load, rel=0.05)


def pipeline(makes: float, takes: float, window: int, until: float = 1000.0) -> tuple[int, int, int]:
    """Messages sent and taken by two stages on cores of their own, and the most that ever lay between them."""
    sim = Simulation()
    cpu, inbox = Cpu(sim, 2, slice_s=1.0), QueueIn(sim)
    outbox = QueueOut(sim, [(inbox, lambda _, arrived, value: sim.at(sim.now, arrived, value), 0.0)], window)
    first, second, counts = Thread(sim, cpu), Thread(sim, cpu), [0, 0, 0]

    def producer() -> Activity:
        while True:
            yield first.work(makes)
            yield from outbox.send(None, 1.0)
            counts[0] += 1
            counts[2] = max(counts[2], len(inbox))

    def consumer() -> Activity:
        while True:
            yield from inbox.take()
            yield second.work(takes)
            counts[1] += 1

    sim.start(producer())
    sim.start(consumer())
    sim.run(until)
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize(("makes", "takes"), [(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)])
def test_a_pipeline_is_as_fast_as_its_slowest_stage(makes: float, takes: float) -> None:
    _, taken, _ = pipeline(makes, takes, window=1)

    assert taken == pytest.approx(1000 / max(makes, takes), abs=2)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_sender_is_ahead_by_its_window_and_no_more(window: int) -> None:
    sent, taken, most = pipeline(1.0, 10.0, window)

    assert most <= window
    assert window <= sent - taken <= window + 1  # one is being read


def taken(sim: Simulation, outbox: QueueOut, inbox: QueueIn, size: float) -> int:
    """Messages that arrive in a thousand seconds, where both ends do nothing else."""
    messages = 0

    def producer() -> Activity:
        while True:
            yield from outbox.send(None, size)

    def consumer() -> Activity:
        nonlocal messages
        while True:
            yield from inbox.take()
            messages += 1

    sim.start(producer())
    sim.start(consumer())
    sim.run(1000.0)
    return messages


def test_credit_on_the_way_bounds_the_rate() -> None:
    """A window of 2 and a round trip of 10 s: 2 messages in 10 s, however fast both ends are."""
    sim = Simulation()
    inbox, wire = QueueIn(sim), Wire(sim, latency=5.0)
    outbox = QueueOut(sim, [(inbox, wire.send, 5.0)], 2)

    assert taken(sim, outbox, inbox, size=0.0) == pytest.approx(200, abs=2)


def test_a_sender_keeps_its_rate() -> None:
    sim = Simulation()
    inbox = QueueIn(sim)
    outbox = QueueOut(sim, [(inbox, lambda _, arrived, value: sim.at(sim.now, arrived, value), 0.0)], 2, rate=10.0)

    assert taken(sim, outbox, inbox, size=25.0) == pytest.approx(400, abs=2)


def test_the_receiver_with_most_credit_is_sent_to() -> None:
    sim = Simulation()
    inboxes = [QueueIn(sim), QueueIn(sim)]
    ways = [(inbox, lambda _, arrived, value: sim.at(sim.now, arrived, value), 0.0) for inbox in inboxes]
    outbox = QueueOut(sim, ways, 2)

    def producer() -> Activity:
        for _ in range(9):
            yield from outbox.send(None, 0.0)

    sim.start(producer())
    sim.run(1.0)

    assert [len(inbox) for inbox in inboxes] == [2, 2]
    assert outbox.credit == 0


def test_a_wire_sends_one_message_after_the_other_and_each_arrives_later() -> None:
    sim, arrived = Simulation(), []
    wire = Wire(sim, latency=0.5, bandwidth=10.0)
    for number in range(3):
        wire.send(20.0, lambda value: arrived.append((value, sim.now)), number)
    sim.run(100.0)

    assert arrived == [(0, 2.5), (1, 4.5), (2, 6.5)]
    assert wire.busy == pytest.approx(6.0)


def test_the_newest_value_wins_and_never_goes_back() -> None:
    sim, seen = Simulation(), []
    latest = Latest(sim)

    def reader() -> Activity:
        value = -1
        while True:
            value = yield latest.newer(value)
            seen.append((sim.now, value))

    sim.start(reader())
    for when, value in ((1.0, 3), (2.0, 1), (3.0, 3), (4.0, 4)):
        sim.at(when, latest.heard, value)
    sim.run(10.0)

    assert seen == [(1.0, 3), (4.0, 4)]


def test_nobody_passes_a_barrier_before_the_last() -> None:
    sim, passed = Simulation(), []
    barrier = Barrier(sim, 3)

    def party(late: float) -> Activity:
        for _ in range(2):
            yield sim.sleep(late)
            yield barrier.meet
            passed.append(sim.now)

    for late in (1.0, 2.0, 7.0):
        sim.start(party(late))
    sim.run(100.0)

    assert passed == [7.0] * 3 + [14.0] * 3


def test_takers_are_served_in_turn() -> None:
    sim, taken = Simulation(), []
    box = Mailbox(sim)

    def taker(name: str) -> Activity:
        taken.append((name, (yield box.take())))

    for name in "ab":
        sim.start(taker(name))
    for value in (1, 2, 3):
        sim.at(1.0, box.put, value)
    sim.run(2.0)

    assert taken == [("a", 1), ("b", 2)]
    assert len(box) == 1


def test_a_run_ends_after_so_many_events_and_may_go_on() -> None:
    sim, ticks = Simulation(), []

    def clock() -> Activity:
        while True:
            yield sim.sleep(1.0)
            ticks.append(sim.now)

    sim.start(clock())
    sim.run(1e9, events=4)
    assert (ticks, sim.now) == ([1.0, 2.0, 3.0], 3.0)
    sim.run(5.0)
    assert ticks == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_no_work_is_lost_or_done_twice() -> None:
    sim, ends = Simulation(), []
    cpu, rng = Cpu(sim, 2, slice_s=0.5), random.Random(3)
    works = [rng.choice((1e-7, 1e-3, 10.0)) for _ in range(300)]

    for seconds in works:
        cpu.work(seconds, lambda _: ends.append(sim.now))
    sim.run(1e9)

    assert len(ends) == 300
    assert cpu.done == pytest.approx(sum(works))
    assert max(ends) == pytest.approx(sum(works) / 2, rel=0.01)
