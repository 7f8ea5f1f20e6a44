"""The rate limiter between an inserter and a sampler that go on whenever they may."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddrl_bus.errors import UsageError
from ddrl_bus.rate_limiter import RateLimiter, least_slack


@pytest.mark.parametrize("fast", [0.02, 0.5, 0.98], ids=["fast sampler", "even", "fast inserter"])
@pytest.mark.parametrize("ratio", [0.25, 8.0])
def test_the_ratio_holds_within_the_slack(fast: float, ratio: float) -> None:
    rng = random.Random(3)
    limiter = RateLimiter(1_000, ratio, None, insert=128, batch=64)
    waited = {"insert": 0, "sample": 0}
    for _ in range(20_000):
        if rng.random() < fast:
            items = rng.randint(1, 128)
            if limiter.may_insert(items):
                limiter.inserted(items)
            waited["insert"] += bool(limiter.insert_waits(items))
        else:
            items = rng.randint(1, 64)
            if limiter.may_sample(items):
                limiter.sampled(items)
            waited["sample"] += bool(limiter.sample_waits(items))
        if limiter.samples:
            assert abs(ratio * (limiter.inserts - 1_000) - limiter.samples) <= limiter.slack

    assert limiter.samples > 5_000
    assert limiter.ratio == pytest.approx(ratio, rel=0.1)
    assert waited["insert" if fast > 0.5 else "sample"]


@given(
    ratio=st.floats(0.01, 100), insert=st.integers(1, 500), batch=st.integers(1, 500), min_size=st.integers(1, 2_000)
)
def test_one_side_may_always_go_on_with_the_least_slack(ratio: float, insert: int, batch: int, min_size: int) -> None:
    """Even where every insert and every batch are the largest that there are."""
    limiter = RateLimiter(min_size, ratio, least_slack(ratio, insert, batch) * (1 + 1e-9), insert=insert, batch=batch)
    rng = random.Random(min_size)
    for _ in range(300):
        sides = [limiter.may_insert(insert), limiter.may_sample(batch)]
        assert any(sides)
        if sides[0] and (not sides[1] or rng.random() < 0.5):
            limiter.inserted(insert)
        else:
            limiter.sampled(batch)


def test_a_slack_that_would_stop_both_is_refused() -> None:
    with pytest.raises(UsageError, match=r"slack 543 is too small.*expected at least 544"):
        RateLimiter(100, 8.0, 543, insert=128, batch=64)

    RateLimiter(100, 8.0, 544, insert=128, batch=64)
    RateLimiter(100, None, 1, insert=128, batch=64)  # nobody waits


def test_without_a_ratio_only_the_least_size_counts() -> None:
    limiter = RateLimiter(1_000, None, None, insert=16, batch=64)
    limiter.inserted(999)
    assert not limiter.may_sample(1)

    limiter.inserted(1)
    limiter.sampled(10_000_000)

    assert limiter.may_sample(64)
    assert limiter.may_insert(10**9)


def test_who_waits_for_whom() -> None:
    limiter = RateLimiter(1_000, 8.0, 1_100, insert=128, batch=64)
    limiter.inserted(312)
    assert limiter.insert_waits(128) == ""
    assert limiter.sample_waits(64) == "samples wait for inserts: 312 of 1,000 items needed before sampling"

    limiter.inserted(788)
    assert limiter.sample_waits(64) == ""
    assert limiter.insert_waits(128) == (
        "inserts wait for samples: 128 items more would be 1,824 samples ahead at 8 per insert, of at most 1,100"
    )

    limiter.sampled(1_856)
    assert limiter.insert_waits(128) == ""
    assert limiter.sample_waits(64) == (
        "samples wait for inserts: 64 more would be 1,120 ahead of 8 per insert, of at most 1,100"
    )


def test_its_state_is_its_counts() -> None:
    limiter, again = (RateLimiter(10, 2.0, 40, insert=8, batch=4) for _ in range(2))
    limiter.inserted(24)
    limiter.sampled(8)

    again.load(limiter.state())

    assert (again.inserts, again.samples, again.ratio) == (24, 8, 8 / 14)
    assert again.insert_waits(30) == limiter.insert_waits(30) != ""
