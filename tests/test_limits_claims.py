"""Tokens a minute, requests at once, tokens a day: reserved together, settled with what was used, told truly."""

from __future__ import annotations

import pytest

from gateway.admission.budgets import DAY_SECONDS, MemoryBudgets
from gateway.admission.limits import Claim, Limits, Reservation
from gateway.admission.windows import EXACT, WINDOW_SECONDS, Window
from gateway.errors import (
    ConcurrencyExceeded,
    InsufficientQuota,
    RateLimitExceeded,
    TokensExceeded,
    TooManyRequests,
)


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class House:
    def __init__(self, wall: float = 1000 * DAY_SECONDS) -> None:
        self.clock = Clock()
        self.wall = Clock(wall)
        self.store = MemoryBudgets()
        self.limits = Limits(self.clock, self.wall, self.store)

    def refused(self, claim: Claim) -> TooManyRequests:
        with pytest.raises(TooManyRequests) as raised:
            self.limits.reserve(claim)
        return raised.value


def claim(tokens: int = 0, *, rpm: int = 0, tpm: int = 0, concurrency: int = 0, budget: int = 0) -> Claim:
    return Claim("a", rpm, tpm, concurrency, budget, tokens)


def test_tokens_are_reserved_and_settled_with_what_was_used() -> None:
    house = House()
    first = house.limits.reserve(claim(600, tpm=1000))
    assert first.headers() == (
        ("x-ratelimit-limit-tokens", "1000"),
        ("x-ratelimit-remaining-tokens", "400"),
        ("x-ratelimit-reset-tokens", "60s"),
    )
    house.clock.now = 20
    error = house.refused(claim(500, tpm=1000))
    assert isinstance(error, TokensExceeded) and error.headers()["Retry-After"] == "40"
    assert error.headers()["x-ratelimit-remaining-tokens"] == "400"
    first.settle(100)
    second = house.limits.reserve(claim(900, tpm=1000))
    house.clock.now = 59.5
    assert isinstance(house.refused(claim(1, tpm=1000)), TokensExceeded)
    house.clock.now = 60
    house.limits.reserve(claim(100, tpm=1000)).refund()
    second.settle(950)  # more than was reserved counts from now on
    assert house.refused(claim(51, tpm=1000)).retry_after == 20
    house.clock.now = 80
    assert isinstance(house.refused(claim(951, tpm=1000)), TokensExceeded)
    assert house.limits.reserve(claim(950, tpm=1000))


def test_a_request_that_can_never_pass_is_told_so() -> None:
    error = House().refused(claim(1001, tpm=1000))
    assert isinstance(error, TokensExceeded)
    assert error.headers()["x-should-retry"] == "false" and error.headers()["Retry-After"] == "60"


def test_requests_at_once() -> None:
    house = House()
    first, second = (house.limits.reserve(claim(concurrency=2)) for _ in range(2))
    error = house.refused(claim(concurrency=2))
    assert isinstance(error, ConcurrencyExceeded) and 1 <= (error.retry_after or 0) <= 60
    first.settle(0)
    first.refund()  # once is enough: the second call frees no second place
    third = house.limits.reserve(claim(concurrency=2))
    assert isinstance(house.refused(claim(concurrency=2)), ConcurrencyExceeded)
    for reservation in (second, third):
        reservation.refund()


def test_a_lease_ends_with_its_reservation_at_the_latest() -> None:
    house = House()
    lost: Reservation | None = house.limits.reserve(claim(70, tpm=100, concurrency=1, budget=100))
    assert isinstance(house.refused(claim(concurrency=1)), ConcurrencyExceeded)
    del lost
    house.limits.reserve(claim(concurrency=1)).settle(0)
    assert isinstance(house.refused(claim(31, tpm=100)), TokensExceeded)  # what it may have used stays used
    assert house.store.load("a", 1000) == 70


def test_a_days_budget_and_the_true_time_until_the_next() -> None:
    house = House(wall=1000 * DAY_SECONDS + 3600)
    first = house.limits.reserve(claim(600, budget=1000))
    first.settle(200)
    error = house.refused(claim(801, budget=1000))
    assert isinstance(error, InsufficientQuota)
    assert error.headers() == {"Retry-After": str(23 * 3600), "x-should-retry": "false"}
    second = house.limits.reserve(claim(800, budget=1000))
    house.wall.now += 23 * 3600  # midnight
    fresh = house.limits.reserve(claim(1000, budget=1000))
    second.settle(700)
    assert house.store.load("a", 1000) == 900 and house.refused(claim(1, budget=1000))
    fresh.refund()
    house.limits.reserve(claim(1000, budget=1000)).refund()


def test_what_only_running_requests_hold_of_a_day_is_worth_a_short_wait() -> None:
    house = House()
    first = house.limits.reserve(claim(1800, budget=2000))
    error = house.refused(claim(300, budget=2000))
    assert isinstance(error, ConcurrencyExceeded)
    assert error.headers() == {"retry-after-ms": "1000", "Retry-After": "1"}
    house.clock.now = 20
    first.settle(1700)
    second = house.limits.reserve(claim(300, budget=2000))
    assert house.refused(claim(0, budget=2000)).retry_after == pytest.approx(4.8)  # as such leases last
    assert isinstance(house.refused(claim(301, budget=2000)), InsufficientQuota)
    second.settle(300)
    assert isinstance(house.refused(claim(0, budget=2000)), InsufficientQuota)


def test_a_full_minute_is_told_before_what_running_requests_hold() -> None:
    house = House()
    running = house.limits.reserve(claim(60, rpm=1, budget=100))
    assert isinstance(house.refused(claim(60, rpm=1, budget=100)), RateLimitExceeded)
    running.refund()


def test_who_is_out_of_budget_is_told_how_the_other_limits_stand() -> None:
    house = House()
    house.limits.reserve(claim(60, rpm=5, tpm=100, budget=100)).settle(60)
    error = house.refused(claim(50, rpm=5, tpm=100, budget=100))
    assert isinstance(error, InsufficientQuota)
    told = error.headers()
    assert (told["x-ratelimit-remaining-requests"], told["x-ratelimit-remaining-tokens"]) == ("4", "40")
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-limit-tokens"]) == ("5", "100")
    assert told["x-should-retry"] == "false"
    house.clock.now += 60
    told = house.refused(claim(50, rpm=5, tpm=100, budget=100)).headers()
    assert (told["x-ratelimit-remaining-requests"], told["x-ratelimit-reset-requests"]) == ("5", "0s")


def test_a_budget_outlives_the_gateway() -> None:
    house = House()
    house.limits.reserve(claim(10, budget=100)).settle(90)
    after = Limits(house.clock, house.wall, house.store)
    with pytest.raises(InsufficientQuota):
        after.reserve(claim(11, budget=100))
    after.reserve(claim(10, budget=100)).refund()


FULL = [
    ({"rpm": 1}, RateLimitExceeded),
    ({"tpm": 100}, TokensExceeded),
    ({"concurrency": 1}, ConcurrencyExceeded),
    ({"budget": 100}, ConcurrencyExceeded),
    ({"budget": 50}, InsufficientQuota),
]


@pytest.mark.parametrize(("full", "error"), FULL)
def test_what_one_limit_refuses_costs_nothing_on_the_others(full: dict[str, int], error: type[Exception]) -> None:
    house = House()
    wide = {"rpm": 9, "tpm": 900, "concurrency": 9, "budget": 900}
    held = house.limits.reserve(claim(60, **wide))
    for _ in range(20):
        assert isinstance(house.refused(claim(60, **(wide | full))), error)
    held.refund()
    left = house.limits.reserve(claim(60, **wide))
    told = dict(left.headers())
    assert told["x-ratelimit-remaining-requests"] == "8" and told["x-ratelimit-remaining-tokens"] == "840"
    assert house.store.load("a", 1000) == 0


def test_what_takes_no_tokens_passes_where_none_are_left() -> None:
    house = House()
    assert dict(house.limits.reserve(claim(0, tpm=100)).headers())["x-ratelimit-reset-tokens"] == "0s"
    house.limits.reserve(claim(100, tpm=100)).settle(150)
    assert isinstance(house.refused(claim(1, tpm=100)), TokensExceeded)
    hit = house.limits.reserve(claim(0, tpm=100))
    assert dict(hit.headers())["x-ratelimit-remaining-tokens"] == "0"
    hit.settle(0)


def test_a_refund_long_after_tells_how_it_stands_by_then() -> None:
    house = House()
    house.limits.reserve(claim(60, rpm=5, tpm=100)).settle(60)
    house.clock.now = 1
    late = house.limits.reserve(claim(40, rpm=5, tpm=100))
    house.clock.now = 60.5
    late.refund()
    told = dict(late.headers())
    assert (told["x-ratelimit-remaining-requests"], told["x-ratelimit-remaining-tokens"]) == ("5", "100")
    assert told["x-ratelimit-reset-tokens"] == "0s"


def test_of_two_full_windows_the_longer_wait_is_told() -> None:
    house = House()
    house.limits.reserve(claim(50, rpm=2, tpm=100))
    house.clock.now = 30
    house.limits.reserve(claim(50, rpm=2, tpm=100))
    error = house.refused(claim(100, rpm=2, tpm=100))
    assert isinstance(error, TokensExceeded) and error.retry_after == 60
    error = house.refused(claim(10, rpm=2, tpm=100))
    assert isinstance(error, RateLimitExceeded) and error.retry_after == 30


def test_those_who_do_not_come_back_are_forgotten_a_few_at_a_time() -> None:
    house = House()
    kept = house.limits.reserve(Claim("runs", concurrency=1))
    for number in range(10_000):
        house.clock.now = number / 10
        house.limits.reserve(Claim(f"address {number}", rpm=10))
    assert len(house.limits) < 1000
    with pytest.raises(ConcurrencyExceeded):
        house.limits.reserve(Claim("runs", concurrency=1))
    kept.refund()


def test_a_window_stays_small_and_never_lets_more_through() -> None:
    window, limit, passed = Window(), 100_000, []
    for number in range(60_000 * 3):
        now = number / 1500
        window.pass_to(now)
        if window.wait(now, 2, limit) == 0:
            window.add(now, 2)
            passed.append(now)
        assert len(window.marks) <= 2 * EXACT
    at = 0
    for number, now in enumerate(passed):
        while passed[at] <= now - WINDOW_SECONDS:
            at += 1
        assert 2 * (number - at + 1) <= limit
    assert len(passed) * 2 >= limit * 1.9


def test_refusals_behind_the_limits_leave_no_marks() -> None:
    house = House()
    for _ in range(50_000):
        house.limits.reserve(claim(5, rpm=100, tpm=1000)).refund()
    caller = house.limits._callers["a"]
    assert caller.tokens is not None
    assert (len(caller.requests.marks), caller.requests.total, caller.tokens.total) == (0, 0, 0)
