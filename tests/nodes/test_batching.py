"""When a batch is due, and who is in it."""

from __future__ import annotations

import pytest

from ddrl_bus.nodes.batching import PRESENT_S, Batcher
from ddrl_bus.nodes.tuning import HillClimb


def batcher(batch: int = 8, wait: float = 0.0, **asked: int) -> Batcher[str]:
    """Requests of these rows, one a second from second 0 on."""
    made: Batcher[str] = Batcher(batch, wait)
    for second, (asker, rows) in enumerate(asked.items()):
        made.add(asker, rows, float(second))
    return made


def test_without_a_wait_it_takes_what_is_there() -> None:
    waiting = batcher(a=2, b=2)
    assert waiting.take(1.0) == ["a", "b"]
    assert (len(waiting), waiting.rows, waiting.due_at) == (0, 0, None)
    assert waiting.take(1.0) == []


def test_whole_requests_in_order_until_it_is_full() -> None:
    waiting = batcher(batch=8, a=4, b=3, c=4, d=4)
    assert waiting.take(4.0) == ["a", "b", "c"]
    assert (waiting.rows, waiting.waited) == (4, 4.0)
    assert waiting.take(4.0) == ["d"]


def test_the_oldest_waits_no_longer_than_it_may() -> None:
    waiting = batcher(batch=100, wait=0.5, late=1)
    assert waiting.take(0.0) == ["late"]
    waiting.add("a", 1, 0.125)
    waiting.add("b", 1, 0.25)
    assert waiting.due_at == 0.625
    assert waiting.take(0.624) == []
    assert waiting.take(0.625) == ["a", "b"]
    assert waiting.waited == 0.5


def test_a_full_batch_does_not_wait() -> None:
    waiting = batcher(batch=4, wait=9.0, here=0)
    waiting.take(9.0)
    waiting.add("a", 3, 10.0)
    waiting.add("b", 1, 10.0)
    assert waiting.take(10.0) == ["a", "b"]


def test_nobody_waits_for_those_who_wait_themselves() -> None:
    """Two are known: with both here there is nobody to wait for, with one of them there is."""
    waiting = batcher(batch=100, wait=9.0)
    waiting.add("a", 1, 0.0)
    assert waiting.take(0.0) == ["a"]  # nobody else was ever heard
    waiting.add("b", 1, 0.1)
    assert waiting.take(0.1) == []
    assert waiting.due_at == pytest.approx(9.1)
    waiting.add("a", 1, 0.2)
    assert waiting.take(0.2) == ["b", "a"]


def test_nobody_waits_for_the_silent() -> None:
    waiting = batcher(batch=100, wait=9.0)
    for asker in "ab":
        waiting.add(asker, 1, 0.0)
    waiting.take(0.0)
    waiting.add("a", 1, 0.5)
    assert waiting.take(0.5) == []
    assert waiting.take(1.01 * PRESENT_S) == ["a"]


def test_nobody_is_in_a_batch_twice() -> None:
    waiting = batcher(a=1)
    with pytest.raises(ValueError, match="a asks again"):
        waiting.add("a", 1, 0.0)
    waiting.drop("a")
    waiting.drop("a")
    waiting.add("a", 5, 0.0)
    assert (waiting.take(0.0), waiting.rows) == (["a"], 0)


@pytest.mark.parametrize(("most", "best"), [(1, 1), (2, 1), (8, 1), (8, 3), (8, 8)])
def test_the_climb_finds_the_best_number_and_stays_near(most: int, best: int) -> None:
    climb = HillClimb(most)
    numbers = []
    for _ in range(60):
        numbers.append(climb.number)
        climb.measured(1000.0 - 100 * abs(climb.number - best))
    assert {*numbers} <= set(range(1, most + 1))
    assert all(abs(number - best) <= 1 for number in numbers[20:])
    assert numbers[30:].count(best) >= 26  # trials that do not help become rare


def test_a_climb_follows_a_change() -> None:
    climb = HillClimb(4)
    for best in (4, 1):
        for _ in range(40):
            climb.measured(1000.0 - 100 * abs(climb.number - best))
        assert abs(climb.number - best) <= 1


def test_noise_moves_nothing() -> None:
    climb = HillClimb(4)
    for n in range(40):
        climb.measured(1000.0 + 40 * (n % 2))
    assert climb.number <= 2
