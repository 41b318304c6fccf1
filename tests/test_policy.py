"""When a model is started again, and when it is unloaded: tables."""

from __future__ import annotations

import pytest

from gateway.models.policy import (
    CRASH_WINDOW_SECONDS,
    MAX_CRASHES,
    MAX_DELAY_SECONDS,
    Crash,
    idle_seconds_left,
    restart_delay,
)

SERVED, LOADING = True, False
OLD = CRASH_WINDOW_SECONDS + 1


@pytest.mark.parametrize(
    ("crashes", "delay"),
    [
        ([SERVED], 0.0),
        ([SERVED] * 2, 1.0),
        ([SERVED] * 3, 2.0),
        ([SERVED] * 4, 4.0),
        ([SERVED] * 5, 8.0),
        ([SERVED] * 6, None),
        ([LOADING], 0.5),
        ([LOADING] * 2, 1.0),
        ([LOADING] * 3, None),
        ([SERVED, LOADING], 1.0),
        ([SERVED, LOADING, LOADING], 2.0),
        ([SERVED, LOADING, LOADING, LOADING], None),
        ([LOADING, LOADING, SERVED], 2.0),
        ([LOADING, LOADING, SERVED, LOADING, LOADING], 8.0),
        ([LOADING, SERVED, LOADING, SERVED, LOADING, SERVED], None),
    ],
)
def test_restarts_wait_longer_and_longer_and_then_end(crashes: list[bool], delay: float | None) -> None:
    now = 5000.0
    recent = [Crash(now - len(crashes) + number, was_ready) for number, was_ready in enumerate(crashes)]
    assert restart_delay(recent, now) == delay
    old = [Crash(now - OLD - number, was_ready) for number in range(9) for was_ready in (LOADING, SERVED)]
    assert restart_delay(old + recent, now) == delay, "what was long ago counts no more"


def test_a_load_that_always_fails_is_given_up_however_long_each_one_takes() -> None:
    slow = [Crash(float(2 * OLD * number), LOADING) for number in range(3)]
    assert restart_delay(slow[:2], slow[1].at) is not None
    assert restart_delay(slow, slow[2].at) is None


def test_a_crash_counts_up_to_the_end_of_the_window() -> None:
    crashes = [Crash(0.0, SERVED)] * MAX_CRASHES + [Crash(CRASH_WINDOW_SECONDS, SERVED)]
    assert restart_delay(crashes, CRASH_WINDOW_SECONDS) is None
    assert restart_delay(crashes, CRASH_WINDOW_SECONDS + 0.5) == 0.0


def test_no_wait_is_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.models.policy.MAX_CRASHES", 50)
    delays = [restart_delay([Crash(0.0, SERVED)] * count, 1.0) for count in range(1, 20)]
    assert delays == sorted(delays, key=lambda delay: delay or 0.0)
    assert delays[-1] == MAX_DELAY_SECONDS


@pytest.mark.parametrize(
    ("last_used", "leases", "timeout", "now", "left"),
    [
        (100, 0, 0, 10_000, None),  # 0 = never
        (100, 1, 60, 10_000, None),  # in use
        (100, 3, 60, 100, None),
        (100, 0, 60, 100, 60),
        (100, 0, 60, 130, 30),
        (100, 0, 60, 159.5, 0.5),
        (100, 0, 60, 160, 0),
        (100, 0, 60, 10_000, 0),
        (100, 0, 0.25, 100, 0.25),
    ],
)
def test_an_unused_model_is_unloaded_in_time(
    last_used: float, leases: int, timeout: float, now: float, left: float | None
) -> None:
    assert idle_seconds_left(last_used, leases, timeout, now) == left
