"""Large bodies take turns, so that the event loop is never held for longer than one step on one of them takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LARGE_BYTES = 1024 * 1024

T = TypeVar("T")


class Turns:
    """Work on large bodies, one after the other, whoever's they are: in a thread, or a step in each turn of the loop.

    The thread shares the interpreter with the loop, which gets it back between two calls of what is written in C; none
    of those takes more than some milliseconds on the largest body.
    """

    def __init__(self) -> None:
        self._next = asyncio.Lock()
        self._worker: ThreadPoolExecutor | None = None  # its thread is there from the first large body on

    async def take(self) -> None:
        """Returns when the step may be done; the loop has gone on since the step before."""
        async with self._next:
            await asyncio.sleep(0)

    async def of(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; it must change nothing that others see meanwhile."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="large bodies")
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=False, cancel_futures=True)
