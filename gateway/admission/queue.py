"""Places at a model and the one queue before them.

A place is given, waited for and given back only here: whoever holds one holds a `Place`, and leaving its block is all
that anyone must remember. Whose turn it is, `order` says; how long it will take, `forecast`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from gateway.admission.forecast import Forecast
from gateway.admission.order import LEVELS, Entry, Order
from gateway.admission.share import gives_way
from gateway.admission.ticket import ByteBudget, Ticket
from gateway.errors import QueueFull, QueueTimeout, ShuttingDown

__all__ = ["ByteBudget", "Place", "Queue", "Ticket"]

# A forecast is within 30 % for most. Whoever's own time is so much shorter will not get a place in it.
CLEARLY = 1.5
FEW = 64  # while no more wait, each is given a forecast; of more, every ONE_OF_MANY-th, to see how good they are
ONE_OF_MANY = 8


class _Waiter(Entry):
    __slots__ = ("granted",)

    def __init__(self, ticket: Ticket, granted: asyncio.Future[None]) -> None:
        super().__init__(ticket.key_id, LEVELS[ticket.priority], ticket.weight, ticket.cost, ticket.places)
        self.granted = granted


class Place:
    """What one request holds, as a context manager.

    A class, for a generator's context manager costs three times as much.
    """

    __slots__ = ("_begun", "_entry", "_loop", "_places", "_queue", "_ticket", "_tokens")

    def __init__(self, queue: Queue, ticket: Ticket) -> None:
        self._queue, self._ticket = queue, ticket
        self._places, self._begun = 0, 0.0
        self._tokens: float | None = None
        self._entry: Entry | None = None  # of one who had to wait, and is charged for it

    async def __aenter__(self) -> Place:
        queue, ticket = self._queue, self._ticket
        self._loop = asyncio.get_running_loop()
        if queue.closed:
            raise ShuttingDown("the service is shutting down", retry_after=5)
        if not ticket.places:
            return self
        places = min(ticket.places, queue.capacity)  # never more than there are
        if not queue._waiters and queue.active + places <= queue.capacity:
            queue.active += places
        else:
            self._entry = await queue.wait(ticket, self._loop)
            places = self._entry.places  # how many there are can change while it waits
        self._places = places
        self._begun = self._loop.time()
        queue.forecast.started(self._begun, places, ticket.cost)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._places:
            queue, cost, now = self._queue, self._ticket.cost, self._loop.time()
            tokens = cost if self._tokens is None else self._tokens
            queue.forecast.finished(now - self._begun, self._begun, self._places, cost, tokens)
            if self._entry is not None:
                queue.order.correct(self._entry, tokens)
            queue.leave(self._places, now)

    def serving(self) -> None:
        """The model is loaded: what came before says nothing of its speed."""
        if self._places:
            now = self._loop.time()
            self._queue.forecast.restarted(self._begun, now, self._places)
            self._begun = now

    def served(self, tokens: float) -> None:
        """What it really took, prompt and answers, cached tokens left out. Not told, what was expected stands."""
        self._tokens = tokens


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
        self.closed = False
        self.processed_total = 0
        self.rejected_total = 0
        self.rejected = rejected
        self.order = Order()
        self.forecast = Forecast()
        self._budget = budget
        self._asked = 0
        self._waiters: dict[_Waiter, None] = {}  # those who have not been given a place yet, the oldest first
        self._held: Counter[str] = Counter()  # how many they are of each key

    @property
    def waiting(self) -> int:
        return len(self._waiters)

    @property
    def occupied(self) -> bool:
        """Whether anybody holds a place or waits for one."""
        return self.active > 0 or bool(self._waiters)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self._grant(asyncio.get_running_loop().time())

    def place(self, ticket: Ticket) -> Place:
        """Hold places for as long as an `async with` block runs.

        Raises QueueFull at once if the queue is full, QueueTimeout at the ticket's deadline, or at once if that is
        clearly too early, ShuttingDown when the service drains meanwhile. However it ends, and also when cancelled,
        nothing stays behind.
        """
        return Place(self, ticket)

    def close(self) -> None:
        """Drain: whoever waits is told so, and so is everyone who comes."""
        self.closed = True
        for waiter in tuple(self._waiters):
            self._take_out(waiter)
            self.order.remove(waiter, 0.0)
            if not waiter.granted.done():
                waiter.granted.set_exception(ShuttingDown("the service is shutting down", retry_after=5))

    def predicted_wait(self, ticket: Ticket) -> float:
        """Seconds until this one would get its places if it came now. A guess until `forecast.known`."""
        places = min(ticket.places, self.capacity)
        if not self.waiting and self.active + places <= self.capacity:
            return 0.0
        level, forecast = LEVELS[ticket.priority], self.forecast
        now = asyncio.get_running_loop().time()
        asking = Entry(ticket.key_id, level, ticket.weight, ticket.cost)
        speed = self.capacity / forecast.price
        ahead = self.order.ahead(asking, now, forecast.ratio, speed)
        return forecast.bias[level] * self._forecast(ahead, places)

    def retry_after(self) -> float:
        """Seconds until all who wait now, and one more, have a place; at least 1."""
        return max(1.0, self._all_served())

    async def wait(self, ticket: Ticket, loop: asyncio.AbstractEventLoop) -> Entry:
        """Waits for its places; `leave` gives them back."""
        victim = self._check_bounds(ticket)
        predicted = self._check_deadline(ticket, loop.time())
        if victim is not None:
            self._turn_away(victim, loop.time())
        waiter = _Waiter(ticket, loop.create_future())
        self._waiters[waiter] = None
        self._held[waiter.key] += 1
        self.order.push(waiter, loop.time())
        self._budget.held += ticket.size
        try:
            if self.active < self.capacity:
                self._grant(loop.time())  # it may be its turn before one who needs more places than are free
            async with asyncio.timeout_at(ticket.deadline):
                await waiter.granted
            if predicted is not None:
                self.forecast.saw(waiter.level, predicted, loop.time() - waiter.arrived)
            return waiter
        except QueueFull:
            self._count_rejection("full")
            raise
        except TimeoutError:
            self._abandon(waiter, loop.time())
            self._count_rejection("timeout")
            if predicted is not None and loop.time() - waiter.arrived > predicted:
                self.forecast.saw(waiter.level, predicted, loop.time() - waiter.arrived)
            raise QueueTimeout(
                "no place became free in time; the model is busy", retry_after=max(1.0, self.predicted_wait(ticket))
            ) from None
        except asyncio.CancelledError:
            self._abandon(waiter, loop.time())
            raise
        finally:
            self._budget.held -= ticket.size

    def leave(self, places: int, now: float) -> None:
        self.active -= places
        self.processed_total += 1
        if self._waiters:
            self._grant(now)
        elif not self.active:
            self.forecast.idle()

    def _all_served(self) -> float:
        if not self._waiters and self.active < self.capacity:
            return 0.0
        return self._forecast(self.order.backlog() * self.forecast.ratio, 1)

    def _forecast(self, ahead: float, places: int) -> float:
        now = asyncio.get_running_loop().time()
        return self.forecast.wait(ahead, places, max(1, self.capacity), self.active, now)

    def _check_bounds(self, ticket: Ticket) -> _Waiter | None:
        """The one who has to go, if this one comes in. Raises QueueFull."""
        victim: _Waiter | None = None
        if self.max_waiting and self.waiting >= self.max_waiting:
            newest_first = (waiter for waiter in reversed(self._waiters) if not waiter.granted.done())
            victim = gives_way(newest_first, self._held, ticket.key_id, LEVELS[ticket.priority])
            if victim is None:
                self._count_rejection("full")
                raise QueueFull(f"{self.waiting} requests are waiting already", retry_after=self.retry_after())
        if self._budget.held + ticket.size > self._budget.limit:
            self._count_rejection("bytes")
            raise QueueFull(
                f"waiting requests hold {self._budget.held} bytes already; the bound is {self._budget.limit}",
                retry_after=self.retry_after(),
            )
        return victim

    def _turn_away(self, waiter: _Waiter, now: float) -> None:
        """It was let in while there was room, and others have a right to some now."""
        self._take_out(waiter)
        self.order.remove(waiter, now)
        waiter.granted.set_exception(
            QueueFull(
                f"{self._held[waiter.key] + 1} requests of this key were waiting, more than its share",
                retry_after=self.retry_after(),
            )
        )

    def _check_deadline(self, ticket: Ticket, now: float) -> float | None:
        """Whoever will clearly not get a place in time is told so now, not when its time is over.

        The predicted wait of those for whom it was looked at.
        """
        if not self.forecast.known:
            return None
        self._asked += 1
        left = max(0.0, ticket.deadline - now)
        if self.waiting > FEW and self._asked % ONE_OF_MANY and self._all_served() <= left:
            return None
        wait = self.predicted_wait(ticket)
        if wait > CLEARLY * left:
            self._count_rejection("deadline")
            raise QueueTimeout(
                f"a place will be free in about {wait:.0f} s, and the request waits only {left:.0f} s",
                retry_after=max(1.0, wait - left),
            )
        return wait

    def _count_rejection(self, reason: str) -> None:
        self.rejected_total += 1
        self.rejected(reason)

    def _take_out(self, waiter: _Waiter) -> None:
        del self._waiters[waiter]
        self._held[waiter.key] -= 1
        if not self._held[waiter.key]:
            del self._held[waiter.key]

    def _abandon(self, waiter: _Waiter, now: float) -> None:
        """The one who waited is gone: its position, or the places that it was just being given, go to the next."""
        if waiter in self._waiters:
            self._take_out(waiter)
            self.order.remove(waiter, now)
        elif not self._was_closed(waiter):
            self.active -= waiter.places
            self.order.correct(waiter, 0)
        self._grant(now)

    @staticmethod
    def _was_closed(waiter: _Waiter) -> bool:
        granted = waiter.granted
        return granted.cancelled() or (granted.done() and granted.exception() is not None)

    def _grant(self, now: float) -> None:
        while self._waiters:
            waiter = self.order.peek(now)
            assert isinstance(waiter, _Waiter)
            if waiter.granted.done():  # cancelled, and about to leave
                self._take_out(waiter)
                self.order.remove(waiter, now)
                continue
            places = min(waiter.places, self.capacity)
            if self.active + places > self.capacity:
                return  # nobody overtakes one who needs many places
            self.order.pop(now)
            self._take_out(waiter)
            waiter.places = places
            self.active += places
            waiter.granted.set_result(None)
