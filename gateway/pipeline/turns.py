"""Large bodies take turns, so that the event loop is never held for longer than one step on one of them takes."""

from __future__ import annotations

import asyncio

LARGE_BYTES = 1024 * 1024  # a step on 10 MB takes 3 to 10 ms


class Turns:
    """At most one step on a large body in each turn of the loop, whoever's it is."""

    def __init__(self) -> None:
        self._next = asyncio.Lock()

    async def take(self) -> None:
        """Returns when the step may be done; the loop has gone on since the step before."""
        async with self._next:
            await asyncio.sleep(0)
