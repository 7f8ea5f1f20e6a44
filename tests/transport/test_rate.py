"""The token bucket, by the test's own clock."""

from __future__ import annotations

import random

import pytest

from ddrl_bus.transport.sessions.rate import BURST_S, TokenBucket


def test_a_message_leaves_whole_and_is_paid_for_afterwards() -> None:
    bucket = TokenBucket(100, now=0.0)
    assert bucket.wait_s(0.0) == 0
    bucket.spend(500, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(5 - BURST_S)
    assert bucket.wait_s(2.0) == pytest.approx(3 - BURST_S)
    assert bucket.wait_s(5.0) == 0
    bucket.spend(100, 5.0)
    assert bucket.wait_s(5.0) == pytest.approx(1 - BURST_S)


def test_without_a_rate_nothing_waits() -> None:
    bucket = TokenBucket(None, now=0.0)
    bucket.spend(1 << 60, 0.0)
    assert bucket.wait_s(0.0) == 0


@pytest.mark.parametrize("seed", range(20))
def test_no_span_of_time_carries_more_than_the_rate(seed: int) -> None:
    """Whoever asks, however late: over any span at most rate times span, a burst, and one message."""
    draw, rate, now = random.Random(seed), 1000.0, 7.0
    bucket, sent = TokenBucket(rate, now), []
    while len(sent) < 300:
        now += draw.choice([0.0, 0.001, 0.05, 2.0]) if draw.random() < 0.5 else bucket.wait_s(now)
        if bucket.wait_s(now) == 0:
            sent.append((now, draw.randrange(1, 200)))
            bucket.spend(sent[-1][1], now)
    for first, (begin, _) in enumerate(sent):
        total = 0
        for end, nbytes in sent[first:]:
            assert total <= rate * (end - begin + BURST_S) + 1e-6
            total += nbytes


def test_who_wakes_late_keeps_the_rate_all_the_same() -> None:
    bucket, now, sent = TokenBucket(1000, 0.0), 0.0, 0
    while now < 100:
        bucket.spend(50, now)
        sent += 50
        now += bucket.wait_s(now) and bucket.wait_s(now) + 0.04  # late, but less than a burst
    assert sent == pytest.approx(100 * 1000, rel=0.01)
