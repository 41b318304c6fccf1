"""A full waiting room: who gives way, and that in the end every key has its share of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.order import HIGH, LOW, NORMAL, Entry
from gateway.admission.share import gives_way
from gateway.errors import QueueFull
from tests.clock_loop import clock, run, settle
from tests.queue_kit import House, Who

PRIORITIES = ("high", "normal", "low")


@pytest.mark.parametrize(
    ("waiting", "comes", "goes"),
    [
        ("aaaa", ("b", NORMAL), 3),
        ("aaaab", ("b", NORMAL), 3),
        ("aaabb", ("b", NORMAL), None),  # three and two: that would only turn it round
        ("aaaabb", ("b", NORMAL), 3),
        ("aaaa", ("a", NORMAL), None),
        ("aaabbbc", ("c", NORMAL), 5),
        ("aabb", ("c", NORMAL), 3),
        ("abcd", ("e", NORMAL), None),
        ("a", ("b", NORMAL), None),
        ("", ("b", NORMAL), None),
        ("aaaa", ("b", HIGH), 3),
        ("aaaa", ("b", LOW), None),  # nobody gives way to what is less urgent
    ],
)
def test_who_gives_way(waiting: str, comes: tuple[str, int], goes: int | None) -> None:
    entries = [Entry(key) for key in waiting]
    held = Counter(waiting)
    found = gives_way(reversed(entries), held, *comes)
    assert found is (None if goes is None else entries[goes])
    assert held == Counter(waiting)


def test_who_is_more_urgent_than_the_one_that_comes_stays() -> None:
    entries = [Entry("a", LOW), Entry("a", HIGH), Entry("a", NORMAL)]
    held = Counter("aaa")
    assert gives_way(reversed(entries), held, "b", HIGH) is entries[2]
    assert gives_way(reversed(entries), held, "b", LOW) is entries[0]


def held_by(house: House) -> Counter[str]:
    return Counter(job.who.key for job in house.jobs if job.waits)


def test_one_key_may_have_all_of_it_until_others_come() -> None:
    async def main() -> None:
        house = House(capacity=1, max_waiting=8)
        jobs = [house.arrive(who=Who("a")) for _ in range(9)]
        await settle()
        refused = house.arrive(who=Who("a"))
        await settle()
        assert isinstance(refused.error, QueueFull)
        for key in "bbbbbb":
            house.arrive(who=Who(key))
            await settle()
        assert held_by(house) == {"a": 4, "b": 4}
        gone = [job for job in jobs if job.error]
        assert gone == jobs[5:], "the newest"
        assert all(isinstance(job.error, QueueFull) and job.error.retry_after for job in gone)
        assert house.reasons == ["full"] * (1 + 4 + 2)
        await house.empty()

    run(main())


def test_one_who_was_let_go_at_the_last_moment_holds_nothing() -> None:
    async def main() -> None:
        house = House(capacity=1, max_waiting=2)
        house.arrive(who=Who("a"))
        jobs = [house.arrive(who=Who("a"), size=5) for _ in range(2)]
        await settle()
        house.arrive(who=Who("b"), size=5)
        await settle(1)
        jobs[1].cancel()  # it has been told, and has not heard it yet
        await settle()
        assert house.budget.held == 10
        await house.empty()

    run(main())


arrivals = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from(PRIORITIES), st.booleans()), min_size=1, max_size=60
)


@settings(max_examples=200)
@given(st.integers(1, 9), arrivals)
def test_whoever_is_refused_has_as_much_as_any(room: int, sequence: list[tuple[str, str, bool]]) -> None:
    """Or those who have more are more urgent. And the room stays full, and the count right."""

    async def main() -> None:
        house = House(capacity=1, max_waiting=room)
        house.arrive(who=Who("runs"))
        await settle()
        for key, priority, then_serve in sequence:
            before = held_by(house)
            job = house.arrive(who=Who(key, priority))
            await settle()
            after = held_by(house)
            queue = house.queues[0]
            assert queue.waiting == sum(after.values()) <= room
            assert queue._held == after
            if isinstance(job.error, QueueFull):
                assert after == before
                assert sum(before.values()) == room
                larger = [held for held, count in before.items() if count > before[key] + 1]
                most = max(before.values())
                urgent = [
                    PRIORITIES.index(other.who.priority) < PRIORITIES.index(priority)
                    for other in house.jobs
                    if other.waits and before[other.who.key] == most
                ]
                assert not larger or all(urgent)
            if then_serve:
                clock().now += 0.1
                next(other for other in house.jobs if other.inside).leaves.set()
                await settle()
        await house.empty()

    run(main())
