"""The circuit breaker as a table: outcomes and a clock in, phases out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stores.shared.breaker import FIRST_PAUSE, LONGEST_PAUSE, STABLE_SECONDS, Breaker, Phase, unproven

OPENED = [("bad", 100.0)] * 3


def after(steps: list[tuple[str, float]], breaker: Breaker | None = None) -> Breaker:
    breaker = breaker or Breaker()
    for what, now in steps:
        match what:
            case "good" | "bad":
                breaker = breaker.called(what == "good", now)
            case "probe":
                assert breaker.due(now)
                breaker = breaker.probing()
            case "found good" | "found bad":
                breaker = breaker.probed(what == "found good", now)
    return breaker


@pytest.mark.parametrize(
    ("steps", "phase"),
    [
        ([], Phase.CLOSED),
        ([("bad", 1.0)] * 2, Phase.CLOSED),
        ([("bad", 1.0)] * 3, Phase.OPEN),
        ([("bad", 1.0), ("bad", 1.0), ("good", 1.0), ("bad", 1.0), ("bad", 1.0)], Phase.CLOSED),
        ([*OPENED, ("good", 100.1)], Phase.OPEN),  # an answer that comes late proves nothing
        ([*OPENED, ("probe", 100.25)], Phase.PROBING),
        ([*OPENED, ("probe", 100.25), ("good", 100.3), ("bad", 100.3)], Phase.PROBING),
        ([*OPENED, ("probe", 100.25), ("found good", 100.3)], Phase.CLOSED),
        ([*OPENED, ("probe", 100.25), ("found bad", 100.3)], Phase.OPEN),
        ([*OPENED, ("probe", 100.25), ("found good", 100.3), ("bad", 101.0), ("bad", 101.0)], Phase.CLOSED),
    ],
)
def test_phases(steps: list[tuple[str, float]], phase: Phase) -> None:
    breaker = after(steps)
    assert breaker.phase is phase
    assert breaker.closed is (phase is Phase.CLOSED)


def test_a_probe_is_due_after_a_pause_and_only_one() -> None:
    breaker = after(OPENED)
    assert [breaker.due(100.0 + late) for late in (0.0, FIRST_PAUSE - 0.01, FIRST_PAUSE)] == [False, False, True]
    assert not breaker.probing().due(1000.0)
    assert not Breaker().due(1000.0)
    assert unproven(5.0).due(5.0) and not unproven(5.0).closed


def test_pauses_double_up_to_a_bound() -> None:
    breaker, now, pauses = after(OPENED), 100.0, []
    for _ in range(7):
        pauses.append(breaker.probe_at - now)
        now = breaker.probe_at
        breaker = breaker.probing().probed(False, now)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    assert max(pauses) == LONGEST_PAUSE
    assert breaker.since == 100.0  # it has been open all the time


@pytest.mark.parametrize(
    ("closed_for", "pause"),
    [(0.1, 2 * FIRST_PAUSE), (STABLE_SECONDS - 0.1, 2 * FIRST_PAUSE), (STABLE_SECONDS, FIRST_PAUSE)],
)
def test_one_that_flaps_pauses_longer_each_time(closed_for: float, pause: float) -> None:
    breaker = after([*OPENED, ("probe", 101.0), ("found good", 101.0)])
    breaker = after([("bad", 101.0 + closed_for)] * 3, breaker)
    assert breaker.probe_at - breaker.since == pytest.approx(pause)


@given(st.lists(st.tuples(st.sampled_from(["good", "bad", "probe good", "probe bad"]), st.floats(0, 9)), max_size=60))
def test_it_can_always_close_again_and_never_pauses_longer_than_its_bound(steps: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(), 0.0
    for what, later in steps:
        now += later
        if not what.startswith("probe"):
            breaker = breaker.called(what == "good", now)
        elif breaker.due(now):
            breaker = breaker.probing().probed(what == "probe good", now)
        if not breaker.closed:
            assert now - LONGEST_PAUSE <= breaker.probe_at <= now + LONGEST_PAUSE or breaker.due(now)
            assert breaker.due(breaker.probe_at)
            assert breaker.probing().probed(True, breaker.probe_at).closed
