"""Those who come to a queue, and what must hold when they are gone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.admission.queue import ByteBudget, Queue, Ticket
from gateway.errors import CorralError, QueueFull, QueueTimeout
from tests.clock_loop import clock, settle


@dataclass(eq=False)
class Job:
    """One who asks for places, stays until told to leave, and notes what happened to it."""

    queue: Queue
    arrival: int
    places: int
    size: int
    deadline: float
    inside: bool = False
    entered: bool = False
    cancelled: bool = False
    error: CorralError | None = None
    leaves: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def live(self) -> None:
        try:
            async with self.queue.place(Ticket("k", self.places, self.size, self.deadline)):
                assert not self.cancelled, "a place was given to one who had been cancelled"
                self.inside = self.entered = True
                await self.leaves.wait()
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

    def arrive(self, places: int = 1, size: int = 0, patience: float = 100, queue: int = 0) -> Job:
        job = Job(self.queues[queue], len(self.jobs), places, size, clock().now + patience)
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
        assert self.budget.held == 0
