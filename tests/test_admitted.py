"""What a gateway decides alone, at its share, from its own admissions: a table, and an oracle for its sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission.limits import Claim
from gateway.errors import TokensExceeded
from gateway.stores.shared.admitted import DAY_SECONDS, Admission, Admitted, Limit, Own, alone

WALL = 100 * DAY_SECONDS + 3600.0  # one o'clock in the morning


def mirror(claim: Claim, times: list[float], now: float, *, used: int = 0) -> Own:
    admitted = Admitted()
    own = admitted.own("key", times[0] if times else now, WALL)
    for number, at in enumerate(times):
        own.add(Admission.of(claim, f"r{number}", at))
    own.pass_to(now, int(WALL // DAY_SECONDS))
    own.hear(int(WALL // DAY_SECONDS), used)
    return own


@pytest.mark.parametrize(
    ("limits", "times", "gateways", "limit", "wait"),
    [
        # requests: the share is limit / gateways, and at least one
        ({"rpm": 4}, [0, 1, 2], 1, Limit.NONE, 0),
        ({"rpm": 4}, [0, 1, 2, 3], 1, Limit.REQUESTS, 50),
        ({"rpm": 4}, [0, 1], 2, Limit.REQUESTS, 50),
        ({"rpm": 4}, [0, 1, 2], 2, Limit.REQUESTS, 51),  # with Redis it had let in more than its share
        ({"rpm": 4}, [1], 3, Limit.REQUESTS, 51),
        ({"rpm": 4}, [], 9, Limit.NONE, 0),
        ({"rpm": 4}, [1], 9, Limit.REQUESTS, 51),
        ({"rpm": 1}, [-51], 1, Limit.NONE, 0),
        ({"rpm": 1}, [-50], 1, Limit.NONE, 0),
        ({"rpm": 1}, [-49], 1, Limit.REQUESTS, 1),
        # tokens: what is larger than the share passes when nothing else counts
        ({"tpm": 100, "tokens": 50}, [0], 1, Limit.NONE, 0),
        ({"tpm": 100, "tokens": 50}, [0], 2, Limit.TOKENS, 50),
        ({"tpm": 100, "tokens": 50}, [], 4, Limit.NONE, 0),
        ({"tpm": 100, "tokens": 50}, [0, 7], 4, Limit.TOKENS, 57),
        ({"tpm": 100, "tokens": 101}, [], 1, Limit.TOKENS, None),
        ({"tpm": 100, "tokens": 0}, [0, 7], 1, Limit.NONE, 0),
        # of both, the longer wait is told
        ({"rpm": 2, "tpm": 100, "tokens": 50}, [0, 7], 1, Limit.REQUESTS, 50),
        ({"rpm": 2, "tpm": 100, "tokens": 50}, [0, 7], 4, Limit.REQUESTS, 57),
        ({"rpm": 3, "tpm": 100, "tokens": 50}, [0, 7], 1, Limit.TOKENS, 50),
        # places
        ({"concurrency": 2}, [0], 1, Limit.NONE, 0),
        ({"concurrency": 2}, [0, 0], 1, Limit.CONCURRENCY, 1),
        ({"concurrency": 2}, [0], 2, Limit.CONCURRENCY, 1),
        ({"concurrency": 2}, [], 5, Limit.NONE, 0),
        # the day's budget
        ({"budget": 100, "tokens": 50}, [0], 1, Limit.NONE, 0),
        ({"budget": 100, "tokens": 50}, [0, 0], 1, Limit.HELD, 1),
        ({"budget": 100, "tokens": 50}, [0], 2, Limit.HELD, 1),
        ({"budget": 100, "tokens": 100}, [], 2, Limit.NONE, 0),
        ({"budget": 100, "tokens": 101}, [], 1, Limit.BUDGET, DAY_SECONDS - 3600),
        # of what passes in a minute and what passes when one ends, the minute is told
        ({"rpm": 2, "budget": 100, "tokens": 50}, [0, 7], 1, Limit.REQUESTS, 50),
    ],
)
def test_decisions(limits: dict[str, int], times: list[float], gateways: int, limit: Limit, wait: float | None) -> None:
    claim = Claim("key", **limits)
    standing = alone(claim, mirror(claim, times, 10.0), gateways, 10.0, WALL)
    assert (standing.limit, standing.wait) == (limit, wait)


@pytest.mark.parametrize(
    ("used", "tokens", "passes"), [(60, 40, True), (60, 41, False), (100, 0, False), (99, 0, True)]
)
def test_a_budget_counts_what_redis_has_said(used: int, tokens: int, passes: bool) -> None:
    claim = Claim("key", budget=100, tokens=tokens)
    standing = alone(claim, mirror(claim, [], 10.0, used=used), 2, 10.0, WALL)
    assert standing.limit is (Limit.NONE if passes else Limit.BUDGET)


@pytest.mark.parametrize(("alone_used", "limit"), [(0, Limit.HELD), (50, Limit.HELD), (51, Limit.BUDGET)])
def test_what_runs_may_give_back_and_what_was_used_may_not(alone_used: int, limit: Limit) -> None:
    claim = Claim("key", budget=200, tokens=50)
    own = mirror(claim, [0.0, 0.0], 10.0)
    own.alone = alone_used
    error = alone(claim, own, 2, 10.0, WALL).refusal(claim)
    assert alone(claim, own, 2, 10.0, WALL).limit is limit
    assert (error.code, error.headers().get("x-should-retry")) == (
        ("concurrency_exceeded", None) if limit is Limit.HELD else ("insufficient_quota", "false")
    )


@pytest.mark.parametrize(
    ("limits", "times", "gateways", "remaining"),
    [
        ({"rpm": 30}, [], 2, "14"),
        ({"rpm": 30}, [0] * 14, 2, "0"),
        ({"rpm": 30}, [0] * 15, 2, "0"),  # it is refused
        ({"rpm": 30}, [0] * 29, 2, "0"),  # with Redis it had let in more than its share
        ({"rpm": 30}, [0] * 14, 1, "15"),
    ],
)
def test_what_remains_is_what_still_passes_here(
    limits: dict[str, int], times: list[float], gateways: int, remaining: str
) -> None:
    claim = Claim("key", **limits)
    told = dict(alone(claim, mirror(claim, times, 10.0), gateways, 10.0, WALL).headers(claim))
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("30", remaining)


def test_a_new_day_begins_with_nothing_used() -> None:
    own = mirror(Claim("key", budget=100), [], 0.0, used=100)
    own.alone = own.pending = 5
    own.pass_to(0.0, 101)
    assert own.spent == 0
    own.hear(100, 70)  # of yesterday
    assert own.spent == 0


def test_one_that_can_never_pass_is_not_worth_a_retry() -> None:
    claim = Claim("key", tpm=100, tokens=101)
    error = alone(claim, mirror(claim, [], 0.0), 1, 0.0, WALL).refusal(claim)
    assert isinstance(error, TokensExceeded)
    assert error.headers()["x-should-retry"] == "false" and error.headers()["Retry-After"] == "60"


def test_those_who_do_not_come_back_cost_no_memory() -> None:
    admitted = Admitted()
    running = Admission.of(Claim("runs", rpm=5, concurrency=1), "a", 0.0)
    admitted.own("runs", 0.0, WALL).add(running)
    for number in range(100):
        caller = f"address {number}"
        admitted.own(caller, 0.0, WALL).add(Admission.of(Claim(caller, rpm=5), f"r{number}", 0.0))
    admitted.sweep(59.0, WALL)
    assert len(admitted.callers) == 101
    admitted.sweep(60.0, WALL)
    assert list(admitted.callers) == ["runs"]
    admitted.own("runs", 60.0, WALL).settle(running, 0)
    admitted.sweep(60.0, WALL)
    assert not admitted.callers


doings = st.tuples(
    st.sampled_from(["add", "settle", "drop", "learn", "doubt"]), st.integers(0, 40), st.integers(0, 200)
)


@given(st.lists(doings, max_size=80))
def test_sums_are_those_of_their_parts(steps: list[tuple[str, int, int]]) -> None:
    admitted, claim = Admitted(), Claim("key", rpm=1, tpm=1, concurrency=1, budget=1, tokens=7)
    running: list[Admission] = []
    now = 0.0
    for number, (what, which, amount) in enumerate(steps):
        now += which / 4
        own = admitted.own("key", now, WALL)
        if what == "add":
            running.append(Admission.of(claim, f"r{number}", now))
            own.add(running[-1])
        elif what == "doubt":
            admitted.doubt()
        elif running:
            one = running[which % len(running)]
            if what == "learn":
                own.learn(one, bool(amount % 2))
                continue
            running.remove(one)
            if what == "settle":
                own.settle(one, amount)
            else:
                own.drop(one)
        window = own.window.values()
        assert all(one.at > now - 60 for one in window)
        assert own.tokens == sum(one.weight for one in window)
        assert own.unknown == sum(not one.known for one in window)
        assert set(own.leases.values()) == set(running)
        assert own.held == 7 * len(running)
