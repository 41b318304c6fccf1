"""Places at a model and the queue before them, case by case."""

from __future__ import annotations

import asyncio

import pytest

from gateway.admission.queue import Ticket
from gateway.errors import QueueFull, QueueTimeout, ShuttingDown
from tests.clock_loop import clock, run, settle
from tests.queue_kit import House, Who


def test_first_come_first_served() -> None:
    async def main() -> None:
        house = House(capacity=2)
        jobs = [house.arrive() for _ in range(5)]
        await settle()
        for first in range(4):
            assert [job.inside for job in jobs] == [first <= n < first + 2 for n in range(5)]
            assert house.queues[0].waiting == max(0, 3 - first)
            jobs[first].leaves.set()
            await settle()
        await house.empty()

    run(main())


def test_one_who_needs_many_places_is_not_overtaken() -> None:
    async def main() -> None:
        house = House(capacity=4)
        one, two, three, late = (house.arrive(places) for places in (1, 2, 3, 1))
        await settle()
        assert [job.inside for job in house.jobs] == [True, True, False, False]  # `late` would fit
        assert house.queues[0].active == 3
        two.leaves.set()
        await settle()
        assert three.inside and house.queues[0].active == 4 and not late.inside
        one.leaves.set()
        await settle()
        assert late.inside
        await house.empty()

    run(main())


def test_more_places_than_there_are_take_all_that_there_are() -> None:
    async def main() -> None:
        house = House(capacity=3)
        house.arrive(places=8)
        await settle()
        assert house.jobs[0].inside and house.queues[0].active == 3
        await house.empty()

    run(main())


@pytest.mark.parametrize(("before", "after", "got"), [(4, 2, 2), (2, 4, 4), (4, 1, 1), (1, 9, 6)])
def test_one_who_waits_while_the_capacity_changes_gives_back_what_it_got(before: int, after: int, got: int) -> None:
    async def main() -> None:
        house = House(capacity=before)
        first, second = house.arrive(places=before), house.arrive(places=6)
        await settle()
        house.queues[0].resize(after)
        first.leaves.set()
        await settle()
        assert second.inside and house.queues[0].active == got
        await house.empty()

    run(main())


def test_more_capacity_lets_the_waiting_in_at_once() -> None:
    async def main() -> None:
        house = House()
        jobs = [house.arrive() for _ in range(4)]
        await settle()
        house.queues[0].resize(3)
        await settle()
        assert [job.inside for job in jobs] == [True, True, True, False]
        await house.empty()

    run(main())


def test_what_needs_no_place_waits_for_none() -> None:
    async def main() -> None:
        house = House(max_waiting=1)
        for places in (1, 1, 0):
            house.arrive(places)
        await settle()
        assert house.jobs[2].inside and house.queues[0].active == 1
        house.queues[0].close()
        refused = house.arrive(places=0)
        await settle()
        assert isinstance(refused.error, ShuttingDown)
        await house.empty()
        assert house.queues[0].processed_total == 1

    run(main())


def test_the_queue_is_bounded_by_count_bytes_and_time() -> None:
    async def main() -> None:
        house = House(max_waiting=2, budget=100)
        house.arrive(size=10**6)  # what does not wait holds nothing
        await settle()
        other = [house.arrive(), house.arrive(size=30, queue=1, patience=50), house.arrive(queue=1)]
        waiting = house.arrive(size=70, patience=10)
        await settle()
        assert house.budget.held == 70 and waiting.waits
        third = house.arrive()
        await settle()
        full = third.error
        assert isinstance(full, QueueFull) and full.status == 503 and full.code == "queue_full"
        assert other[2].waits
        too_much = house.arrive(size=31, queue=1)
        await settle()
        assert isinstance(too_much.error, QueueFull) and "100" in too_much.error.message
        enough = house.arrive(size=30, queue=1)
        await clock().advance(9.9)
        assert waiting.waits and house.budget.held == 100
        await clock().advance(0.1)
        assert isinstance(waiting.error, QueueTimeout) and waiting.error.code == "queue_timeout"
        assert house.budget.held == 30 and enough.waits
        assert house.reasons == ["full", "bytes", "timeout"]
        await house.empty()

    run(main())


def test_retry_after_follows_how_long_places_are_held() -> None:
    async def main() -> None:
        house = House(capacity=2)
        queue = house.queues[0]
        assert queue.retry_after() == 1.0
        for _ in range(60):
            job = house.arrive()
            await settle()
            await clock().advance(30)
            job.leaves.set()
            await settle()
        assert queue.retry_after() == 1.0  # there are free places
        for _ in range(4):
            house.arrive()
        await settle()
        assert queue.retry_after() == pytest.approx(60, rel=0.2)
        await clock().advance(20)
        assert queue.retry_after() == pytest.approx(40, rel=0.2)
        await house.empty()

    run(main())


def test_closing_tells_those_who_wait_and_leaves_those_who_run() -> None:
    async def main() -> None:
        house = House()
        running, waiting = house.arrive(), house.arrive(size=5)
        await settle()
        house.queues[0].close()
        late = house.arrive()
        await settle()
        assert running.inside
        assert isinstance(waiting.error, ShuttingDown) and isinstance(late.error, ShuttingDown)
        assert waiting.error.code == "shutting_down" and "Retry-After" in waiting.error.headers()
        await house.empty()
        assert house.reasons == []

    run(main())


@pytest.mark.parametrize("leaver", ["cancelled", "timed out"])
def test_one_who_leaves_at_the_moment_of_its_turn_passes_it_on(leaver: str) -> None:
    async def main() -> None:
        house = House()
        first, second, third = (house.arrive(patience=patience) for patience in (100, 10, 100))
        await settle()
        first.leaves.set()
        if leaver == "cancelled":
            await asyncio.sleep(0)
            assert house.queues[0].waiting == 1 and second.waits  # the place is its own, but it has not run yet
            second.cancel()
        else:
            clock().now += 10
        await settle()
        assert not second.entered and third.inside
        assert house.queues[0].active == 1
        await house.empty()

    run(main())


def test_anothers_first_is_not_behind_one_keys_two_hundred() -> None:
    async def main() -> None:
        house = House(capacity=1)
        crowd = [house.arrive(who=Who("a", cost=10)) for _ in range(200)]
        await settle()
        alone = house.arrive(who=Who("b", cost=10))
        urgent = house.arrive(who=Who("a", "high", cost=10))
        await settle()
        crowd[0].leaves.set()
        await settle()
        assert urgent.inside
        urgent.leaves.set()
        await settle()
        if not alone.inside:  # it was the first one's turn already
            crowd[1].leaves.set()
            await settle()
        assert alone.inside and sum(job.entered for job in crowd) <= 2
        await house.empty()

    run(main())


def test_a_high_one_takes_what_a_wide_one_cannot_use_yet_and_the_wide_one_comes_next() -> None:
    async def main() -> None:
        house = House(capacity=4)
        first = [house.arrive(who=Who("a")) for _ in range(2)]
        await settle()
        wide, late = house.arrive(places=4, who=Who("b")), house.arrive(who=Who("c"))
        await settle()
        assert wide.waits and late.waits
        high = house.arrive(who=Who("d", "high"))
        await settle()
        assert high.inside
        for job in (*first, high):
            assert wide.waits and late.waits
            job.leaves.set()
            await settle()
        assert wide.inside and late.waits
        await house.empty()

    run(main())


def test_what_was_served_counts_not_what_was_expected() -> None:
    async def main() -> None:
        house = House(capacity=1)
        house.arrive(who=Who("x"))
        await settle()
        modest = [house.arrive(who=Who("modest", cost=1000, tokens=10)) for _ in range(6)]
        honest = [house.arrive(who=Who("honest", cost=100, tokens=100)) for _ in range(6)]
        await settle()
        for _ in range(7):
            next(job for job in house.jobs if job.inside).leaves.set()
            await settle()
        assert [sum(job.entered for job in jobs) for jobs in (modest, honest)] == [6, 1]
        await house.empty()

    run(main())


async def measured(house: House, seconds: float, times: int = 30) -> None:
    """Both places are held, again and again, for so long."""
    for _ in range(times):
        job = house.arrive(who=Who("m", cost=100, tokens=50))
        await settle()
        await clock().advance(seconds)
        job.leaves.set()
        await settle()


def test_a_deadline_that_will_be_missed_is_told_at_once() -> None:
    async def main() -> None:
        house = House(capacity=1)
        queue = house.queues[0]
        assert queue.predicted_wait(Ticket("k", 1, 0, 0)) == 0
        await measured(house, 20)
        assert queue.forecast.tokens_per_second == pytest.approx(2.5)
        for _ in range(3):
            house.arrive(who=Who("m", cost=100), patience=1000)
        await settle()
        assert queue.predicted_wait(Ticket("m", 1, 0, 0, cost=100)) == pytest.approx(60, rel=0.05)
        assert queue.predicted_wait(Ticket("m", 1, 0, 0, "high", cost=100)) == pytest.approx(20, rel=0.05)
        hurried, patient = (house.arrive(who=Who("m", cost=100), patience=wait) for wait in (30, 50))
        await settle()
        error = hurried.error
        assert isinstance(error, QueueTimeout) and error.code == "queue_timeout"
        assert error.retry_after == pytest.approx(30, abs=4)
        assert patient.waits  # it may be lucky
        assert house.reasons == ["deadline"]
        for job in house.jobs:
            job.cancel()
        await settle()
        assert queue.predicted_wait(Ticket("k", 1, 0, 0)) == 0
        await house.empty()

    run(main())


def test_in_a_long_queue_too_the_hurried_are_told_at_once() -> None:
    async def main() -> None:
        house = House(capacity=1)
        await measured(house, 20)
        for _ in range(100):
            house.arrive(who=Who("m", cost=100), patience=10_000)
        await settle(200)
        asked = [house.arrive(who=Who("m", cost=100), patience=60) for _ in range(20)]
        await settle(50)
        assert all(isinstance(job.error, QueueTimeout) for job in asked) and house.reasons == ["deadline"] * 20
        for job in house.jobs:
            job.cancel()
        await settle(300)
        await house.empty()

    run(main())


def test_nobody_is_turned_away_on_a_guess() -> None:
    async def main() -> None:
        house = House(capacity=1)
        await measured(house, 1000, times=5)
        house.arrive()
        hurried = house.arrive(patience=1)
        await settle()
        assert hurried.waits
        await house.empty()

    run(main())


def test_the_time_that_a_model_loads_is_not_its_speed() -> None:
    async def main() -> None:
        queue = House(capacity=1).queues[0]
        for load in (500, 0, 0):
            async with queue.place(Ticket("k", 1, 0, 1e9, cost=10)) as place:
                clock().now += load
                place.serving()
                clock().now += 10
                place.served(5)
        assert queue.forecast.mean_held == pytest.approx(10)
        assert queue.forecast.price == pytest.approx(2)
        assert queue.forecast.ratio == pytest.approx(0.5)
        assert queue.forecast.running == (0, 0)

    run(main())
