"""Answers that are being made, and the requests that wait for one instead of making it again."""

from __future__ import annotations

import asyncio

from gateway.admission.queue import ByteBudget
from gateway.stores.cache.answers import Stored

MOST_FOLLOWERS = 512  # of one answer

FlightKey = tuple[str, str]  # what is asked for, and how urgently: nobody waits for one who may wait longer


class Flight:
    """An answer that is being made."""

    def __init__(self) -> None:
        self.followers = 0
        self.how = "hit"  # what those who waited for it were given
        # What was made; None: whoever made it left, another one may; False: each has to go for itself.
        self.landed: asyncio.Future[Stored | bool | None] = asyncio.get_running_loop().create_future()


class Flights:
    """What those who wait hold counts on `budget`."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._flights: dict[FlightKey, Flight] = {}

    def __contains__(self, key: FlightKey) -> bool:
        return key in self._flights

    def take_off(self, key: FlightKey) -> Flight:
        flight = self._flights[key] = Flight()
        return flight

    def land(self, key: FlightKey, flight: Flight, result: Stored | bool | None) -> None:
        """The first result counts."""
        if self._flights.get(key) is flight:
            del self._flights[key]
        if not flight.landed.done():
            flight.landed.set_result(result)

    async def follow(self, key: FlightKey, size: int, until: float) -> tuple[Stored, str] | None:
        """What others make, and how they came by it; None where there is nobody, or it takes too long.

        `size` is what the one who waits holds, in bytes; `until` is on the loop's clock. Raises QueueFull.
        """
        loop = asyncio.get_running_loop()
        while (flight := self._flights.get(key)) is not None and flight.followers < MOST_FOLLOWERS:
            self._budget.hold(size)
            flight.followers += 1
            try:
                await asyncio.wait((flight.landed,), timeout=max(0.0, until - loop.time()))
            finally:
                flight.followers -= 1
                self._budget.release(size)
            result = flight.landed.result() if flight.landed.done() else False
            if isinstance(result, Stored):
                return result, flight.how
            if result is False:
                return None
        return None
