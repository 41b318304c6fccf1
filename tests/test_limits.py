"""Requests a minute: an exact sliding window, against a naive oracle and a clock that the test moves."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.limits import Claim, Limits, Reservation
from gateway.errors import RateLimitExceeded


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RequestLimits:
    def __init__(self, clock: Clock) -> None:
        self._limits = Limits(clock)

    def reserve(self, who: str, per_minute: int) -> Reservation:
        return self._limits.reserve(Claim(who, rpm=per_minute))


def passes(limits: RequestLimits, who: str = "a", per_minute: int = 2) -> Reservation | None:
    try:
        return limits.reserve(who, per_minute)
    except RateLimitExceeded:
        return None


def test_a_window_slides_and_does_not_jump() -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    passed = []
    for clock.now in (0, 30, 59, 60, 61, 89, 90, 119.5, 120, 149, 150):
        passed.append(clock.now if passes(limits) else None)
    assert passed == [0, 30, None, 60, None, None, 90, None, 120, None, 150]


def test_nobody_counts_on_anothers_window_and_zero_is_no_limit() -> None:
    limits = RequestLimits(Clock())
    assert passes(limits, "a", 1) and passes(limits, "b", 1) and not passes(limits, "a", 1)
    for _ in range(1000):
        unlimited = limits.reserve("a", 0)
        assert unlimited.headers() == ()
        unlimited.refund()


def test_what_a_client_is_told() -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    told = []
    for clock.now in (0, 10, 20.5):
        told.append([value for _, value in limits.reserve("a", 3).headers()])
    assert told == [["3", "2", "60s"], ["3", "1", "50s"], ["3", "0", "40s"]]
    assert [name for name, _ in limits.reserve("b", 3).headers()] == [
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ]
    clock.now = 21.25
    with pytest.raises(RateLimitExceeded) as raised:
        limits.reserve("a", 3)
    error = raised.value
    assert (error.status, error.code, error.retry_after) == (429, "rate_limit_exceeded", 38.75)
    assert error.headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "39s",
        "retry-after-ms": "38750",
        "Retry-After": "39",
    }


def test_a_refused_request_does_not_count() -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    assert passes(limits, per_minute=1)
    for clock.now in range(1, 60):
        assert not passes(limits, per_minute=1)
    clock.now = 60
    assert passes(limits, per_minute=1)


def remaining(reservation: Reservation) -> int:
    return int(dict(reservation.headers())["x-ratelimit-remaining-requests"])


def test_a_refund_gives_exactly_one_back() -> None:
    limits = RequestLimits(Clock())
    first, second = limits.reserve("a", 2), limits.reserve("a", 2)
    assert remaining(second) == 0
    second.refund()
    second.refund()
    assert remaining(second) == 1
    assert passes(limits) and not passes(limits)
    first.refund()
    assert passes(limits) and not passes(limits)


def test_a_refund_after_the_window_gives_nothing_back() -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    old = limits.reserve("a", 1)
    clock.now = 60
    assert passes(limits, per_minute=1)
    old.refund()
    assert remaining(old) == 0
    assert not passes(limits, per_minute=1)


@pytest.mark.parametrize(("lowered", "wait"), [(5, 20.0), (4, 30.0), (2, 50.0), (1, 60.0)])
def test_a_lowered_limit_holds_at_once_and_tells_the_true_wait(lowered: int, wait: float) -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    for clock.now in (0, 10, 20, 30, 40):
        assert passes(limits, per_minute=5)
    clock.now = 40
    with pytest.raises(RateLimitExceeded) as raised:
        limits.reserve("a", lowered)
    assert raised.value.retry_after == wait
    clock.now = 40 + wait - 0.5
    assert not passes(limits, per_minute=lowered)
    clock.now = 40 + wait
    assert passes(limits, per_minute=lowered)


# A quarter of a second is exact in binary, so that the oracle and the window may not differ by a rounding.
steps = st.integers(0, 80).map(lambda quarters: quarters / 4)
doings = st.tuples(steps, st.sampled_from("ab"), st.integers(1, 4), st.integers(-1, 8))


@settings(max_examples=300)
@given(st.lists(doings, max_size=60))
def test_it_agrees_with_a_naive_oracle(sequence: list[tuple[float, str, int, int]]) -> None:
    clock = Clock()
    limits = RequestLimits(clock)
    counted: list[tuple[Fraction, str, Reservation]] = []
    for step, who, per_minute, refund in sequence:
        clock.now += step
        now = Fraction(clock.now)
        mine = sorted(at for at, owner, _ in counted if owner == who and at > now - 60)
        if len(mine) < per_minute:
            reservation = limits.reserve(who, per_minute)
            assert remaining(reservation) == per_minute - len(mine) - 1
            reset = 60 - (now - min(mine, default=now))
            assert dict(reservation.headers())["x-ratelimit-reset-requests"] == f"{math.ceil(reset)}s"
            counted.append((now, who, reservation))
        else:
            with pytest.raises(RateLimitExceeded) as raised:
                limits.reserve(who, per_minute)
            wait = Fraction(raised.value.retry_after or 0)
            assert sum(at > now + wait - 60 for at in mine) < per_minute, "it was told too early a time"
            assert sum(at > now + wait - Fraction(1, 100) - 60 for at in mine) >= per_minute, "too late a time"
        if 0 <= refund < len(counted):
            counted.pop(refund)[2].refund()
