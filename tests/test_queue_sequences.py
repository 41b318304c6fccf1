"""Any sequence of arrivals, ends, cancellations, time-outs and changes keeps the queue's count and order."""

from __future__ import annotations

import asyncio

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.admission.queue import Queue
from gateway.errors import QueueTimeout
from tests.clock_loop import clock, run, settle
from tests.queue_kit import House, Who

PRIORITIES = ("high", "normal", "low")
operations = st.one_of(
    st.tuples(st.just("arrive"), st.integers(0, 6), st.integers(0, 60), st.integers(1, 9), st.integers(0, 1)),
    st.tuples(st.just("arrive"), st.just(1), st.just(10), st.just(99), st.integers(0, 1)),
    st.tuples(st.just("come"), st.integers(0, 3), st.sampled_from(PRIORITIES), st.integers(0, 50), st.integers(1, 9)),
    st.tuples(st.just("finish"), st.integers(0, 30)),
    st.tuples(st.just("crash"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("advance"), st.integers(1, 5)),
    st.tuples(st.just("resize"), st.integers(1, 5), st.integers(0, 1)),
    st.tuples(st.just("close"), st.integers(0, 1)),
    st.tuples(st.just("settle")),
    st.tuples(st.just("turn")),
)


class Sequence(House):
    def __init__(self, capacity: int, max_waiting: int) -> None:
        super().__init__(capacity, max_waiting, budget=100)
        self.closed: set[Queue] = set()

    async def do(self, name: str, *how: int) -> None:
        if name == "come":
            key, priority, cost, patience = how
            who = Who(f"key-{key}", str(priority), 1.0 + key, float(cost), cost * key / 2)
            self.arrive(1 + key, 1, patience * 8, 0, who)
        if name == "arrive":
            places, size, patience, queue = how
            self.arrive(places, size, patience, queue)
        elif name in ("finish", "crash", "cancel") and self.jobs:
            job = self.jobs[how[0] % len(self.jobs)]
            job.crashes = job.crashes or name == "crash"
            job.cancel() if name == "cancel" else job.leaves.set()
        elif name == "advance":
            clock().now += how[0]
        elif name == "resize":
            self.queues[how[1]].resize(how[0])
        elif name == "close":
            self.queues[how[0]].close()
            self.closed.add(self.queues[how[0]])
        elif name == "turn":
            await asyncio.sleep(0)
        elif name == "settle":
            await settle(20)
            self.check_settled()

    def check_always(self, before: list[int]) -> None:
        for queue, active in zip(self.queues, before, strict=True):
            assert 0 <= queue.active <= max(queue.capacity, active), "it grew above the capacity"
            assert sum(job.inside for job in self.of(queue)) <= queue.active
        assert 0 <= self.budget.held <= self.budget.limit

    def check_settled(self) -> None:
        assert self.budget.held == sum(job.size for job in self.jobs if job.waits)
        for queue in self.queues:
            waiting = [job for job in self.of(queue) if job.waits]
            assert queue.waiting == len(waiting) <= (queue.max_waiting or 999)
            assert not (waiting and queue in self.closed)
            assert all(job.deadline > clock().now for job in waiting)
            for job in waiting:
                entered = [other.arrival for other in self.of(queue) if other.entered and other.who == job.who]
                assert max(entered, default=-1) < job.arrival, "somebody was overtaken"
            if waiting:
                most = max(min(job.places, queue.capacity) for job in waiting)
                assert queue.active + most > queue.capacity, "a place stays empty"


@settings(max_examples=300)
@given(st.integers(1, 4), st.integers(0, 4), st.lists(operations, max_size=40))
@example(
    4, 0, [("arrive", 4, 0, 9, 0), ("arrive", 4, 0, 9, 0), ("settle",), ("resize", 2, 0), ("finish", 0), ("settle",)]
)
def test_any_sequence_keeps_the_count(
    capacity: int, max_waiting: int, sequence: list[tuple[str, *tuple[int, ...]]]
) -> None:
    async def main() -> None:
        house = Sequence(capacity, max_waiting)
        for operation in sequence:
            before = [queue.active for queue in house.queues]
            await house.do(*operation)
            house.check_always(before)
        await settle(40)
        house.check_settled()
        for job in house.jobs:
            early = isinstance(job.error, QueueTimeout) and job.deadline > clock().now
            assert not early or job.queue.forecast.known, "it was told of a time-out before its time"
            assert job.entered_at <= max(job.deadline, job.asked_at), "it waited past its deadline"
        await house.empty()

    run(main())
