"""Places at a model and the one queue before them.

A place is given, waited for and given back only here: whoever holds one holds a `Place`, and closing it is all that
anyone must remember. Order is first come, first served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from gateway.errors import QueueFull, QueueTimeout, ShuttingDown


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the queue wants to know of a request. `deadline` is on the loop's clock, in seconds."""

    key_id: str
    places: int  # `n` answers need n slots
    size: int  # bytes that are held while it waits
    deadline: float


class ByteBudget:
    """Bounds the bodies held by all requests that wait, at all models, and by those that are being read."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def hold(self, size: int) -> None:
        """Raises QueueFull."""
        if self.held + size > self.limit:
            raise QueueFull(
                f"requests hold {self.held} bytes already; MAX_QUEUED_BYTES allows {self.limit}", retry_after=5
            )
        self.held += size

    def release(self, size: int) -> None:
        self.held -= size


class _Waiter:
    __slots__ = ("granted", "places")

    def __init__(self, places: int, granted: asyncio.Future[None]) -> None:
        self.places = places
        self.granted = granted


class Queue:
    """One model's places and queue.

    `max_waiting` 0 means unlimited. `rejected(reason)` is told of every request that gets no place.
    """

    def __init__(
        self, capacity: int, max_waiting: int, budget: ByteBudget, rejected: Callable[[str], None] = lambda _: None
    ) -> None:
        self.capacity = capacity
        self.max_waiting = max_waiting
        self.active = 0
        self.processed_total = 0
        self.rejected_total = 0
        self.rejected = rejected
        self._budget = budget
        self._waiting: deque[_Waiter] = deque()
        self._closed = False
        self._service_seconds = 1.0  # moving mean of how long a place is held

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._grant()

    @contextlib.asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Hold places for as long as the block runs.

        Raises QueueFull at once if the queue is full, QueueTimeout at the ticket's deadline, ShuttingDown when the
        service drains meanwhile. However it ends, and also when cancelled, nothing stays behind.
        """
        loop = asyncio.get_running_loop()
        if self._closed:
            raise ShuttingDown("the service is shutting down", retry_after=5)
        places = await self._enter(ticket, loop) if ticket.places else 0
        begun = loop.time()
        try:
            yield
        finally:
            if places:
                self._service_seconds += 0.1 * (loop.time() - begun - self._service_seconds)
                self.active -= places
                self.processed_total += 1
                self._grant()

    def close(self) -> None:
        """Drain: whoever waits is told so, and so is everyone who comes."""
        self._closed = True
        for waiter in self._waiting:
            if not waiter.granted.done():
                waiter.granted.set_exception(ShuttingDown("the service is shutting down", retry_after=5))
        self._waiting.clear()

    def retry_after(self) -> float:
        """Seconds until a place is likely free for one who comes now."""
        return max(1.0, self._service_seconds * (len(self._waiting) + 1) / max(1, self.capacity))

    async def _enter(self, ticket: Ticket, loop: asyncio.AbstractEventLoop) -> int:
        """How many places it got: never more than there are, which can change while it waits."""
        places = min(ticket.places, self.capacity)
        if not self._waiting and self.active + places <= self.capacity:
            self.active += places
            return places
        self._check_bounds(ticket)
        waiter = _Waiter(ticket.places, loop.create_future())
        self._waiting.append(waiter)
        self._budget.held += ticket.size
        try:
            async with asyncio.timeout_at(ticket.deadline):
                await waiter.granted
            return waiter.places
        except TimeoutError:
            self._leave(waiter)
            self._count_rejection("timeout")
            raise QueueTimeout(
                "no place became free in time; the model is busy", retry_after=self.retry_after()
            ) from None
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        finally:
            self._budget.held -= ticket.size

    def _check_bounds(self, ticket: Ticket) -> None:
        if self.max_waiting and len(self._waiting) >= self.max_waiting:
            self._count_rejection("full")
            raise QueueFull(f"{len(self._waiting)} requests are waiting already", retry_after=self.retry_after())
        if self._budget.held + ticket.size > self._budget.limit:
            self._count_rejection("bytes")
            raise QueueFull(
                f"waiting requests hold {self._budget.held} bytes already; the bound is {self._budget.limit}",
                retry_after=self.retry_after(),
            )

    def _count_rejection(self, reason: str) -> None:
        self.rejected_total += 1
        self.rejected(reason)

    def _leave(self, waiter: _Waiter) -> None:
        """The one who waited is gone: its position, or the places that it was just being given, go to the next."""
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self.active -= waiter.places
        else:
            with contextlib.suppress(ValueError):
                self._waiting.remove(waiter)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            waiter = self._waiting[0]
            if waiter.granted.done():  # cancelled, and about to leave
                self._waiting.popleft()
                continue
            places = min(waiter.places, self.capacity)
            if self.active + places > self.capacity:
                return
            self._waiting.popleft()
            waiter.places = places
            self.active += places
            waiter.granted.set_result(None)
