"""Places at a model and the queue before them, case by case."""

from __future__ import annotations

import asyncio

import pytest

from gateway.errors import QueueFull, QueueTimeout, ShuttingDown
from tests.clock_loop import clock, run, settle
from tests.queue_kit import House


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
        assert queue.retry_after() == pytest.approx(30 / 2, rel=0.02)
        for _ in range(5):
            house.arrive()
        await settle()
        assert queue.retry_after() == pytest.approx(30 * 4 / 2, rel=0.02)
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
