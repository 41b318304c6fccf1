"""Those who come to a queue, and what must hold when they are gone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.admission.order import Order
from gateway.admission.queue import ByteBudget, Queue, Ticket
from gateway.errors import BackendGone, CorralError, QueueFull, QueueTimeout
from tests.clock_loop import clock, settle


@dataclass(frozen=True)
class Who:
    """Whose request it is, and what it will take."""

    key: str = "k"
    priority: str = "normal"
    weight: float = 1.0
    cost: float = 1.0
    tokens: float | None = None  # what it takes in the end; None: nobody says


@dataclass(eq=False)
class Job:
    """One who asks for places, stays until told to leave, and notes what happened to it."""

    queue: Queue
    arrival: int
    places: int
    size: int
    deadline: float
    who: Who = Who()
    crashes: bool = False  # an error ends it inside its place
    inside: bool = False
    entered: bool = False
    asked_at: float = 0.0
    entered_at: float = 0.0
    cancelled: bool = False
    error: CorralError | None = None
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def live(self) -> None:
        who, self.asked_at = self.who, clock().now
        ticket = Ticket(who.key, self.places, self.size, self.deadline, who.priority, who.weight, who.cost)
        try:
            async with self.queue.place(ticket) as place:
                assert not self.cancelled, "a place was given to one who had been cancelled"
                assert not self.entered, "it was served twice"
                self.inside = self.entered = True
                self.entered_at = clock().now
                await self.leaves.wait()
                if self.crashes:
                    raise BackendGone("it died")
                if who.tokens is not None:
                    place.served(who.tokens)
        except CorralError as error:
            self.error = error
        finally:
            self.inside = False

    def cancel(self) -> None:
        assert self.task is not None
        self.cancelled = self.task.cancel() or self.cancelled

    @property
    def waits(self) -> bool:
        assert self.task is not None
        return not self.inside and not self.task.done()


class House:
    """Two queues under one byte budget, and all who ever came."""

    def __init__(self, capacity: int = 1, max_waiting: int = 0, budget: int = 10**9) -> None:
        self.reasons: list[str] = []
        self.budget = ByteBudget(budget)
        self.queues = [Queue(capacity, max_waiting, self.budget, self.reasons.append) for _ in range(2)]
        self.jobs: list[Job] = []

    def arrive(self, places: int = 1, size: int = 0, patience: float = 100, queue: int = 0, who: Who = Who()) -> Job:
        job = Job(self.queues[queue], len(self.jobs), places, size, clock().now + patience, who)
        job.task = asyncio.create_task(job.live())
        self.jobs.append(job)
        return job

    def of(self, queue: Queue) -> list[Job]:
        return [job for job in self.jobs if job.queue is queue and job.places]

    async def empty(self) -> None:
        for job in self.jobs:
            job.leaves.set()
        await settle(40 + 8 * len(self.jobs))
        assert all(job.task and job.task.done() for job in self.jobs)
        for queue in self.queues:
            assert (queue.active, queue.waiting) == (0, 0)
            assert queue.processed_total == sum(job.entered for job in self.of(queue))
            refused = [
                job for job in self.jobs if job.queue is queue and isinstance(job.error, QueueFull | QueueTimeout)
            ]
            assert queue.rejected_total == len(refused)
            check_empty(queue.order)
            assert queue.forecast.running == (0, 0)
        assert self.budget.held == 0


def check_empty(order: Order) -> None:
    """Nobody waits or runs, and nothing of those who did is kept but debts."""
    assert len(order) == 0 and order.backlog() == 0
    for level in order._levels:
        assert (level.busy, len(level.ages), len(level._heap)) == (0, 0, 0)
        assert abs(level.weight) < 1e-6
        for line in level.lines.values():
            assert not line.waiting and (line.open, line.running, line.backlog, line.spot) == (0, 0, 0, 0)
