"""What signals mean to a running gateway or worker: SIGTERM and SIGINT end it, SIGHUP reads its files anew."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.runtime import Runtime

log = logging.getLogger("corral.serve")


class Signals:
    """Heard from its making on, by the running loop. The first signal to end sets `stop`, a second one `hurry`."""

    def __init__(self) -> None:
        self.stop, self.hurry = asyncio.Event(), asyncio.Event()
        self._again = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._again.set)

    def _end(self) -> None:
        if self.stop.is_set():
            self.hurry.set()
        self.stop.set()

    def reload_on_hangup(self, runtime: Runtime) -> None:
        """From now on, and at once if it came while the house was opened."""
        self._tasks.append(asyncio.create_task(self._reload(runtime), name="reload"))

    async def _reload(self, runtime: Runtime) -> None:
        while True:
            await self._again.wait()
            self._again.clear()
            try:
                await runtime.reload()
            except Exception:
                log.exception("reading the files anew broke off; the next SIGHUP tries it again")

    def kill_when_hurried(self, runtime: Runtime) -> None:
        """From now on a second signal leaves llama-servers no more time, until the very end."""
        self._tasks.append(asyncio.create_task(self._kill(runtime), name="kill"))

    async def _kill(self, runtime: Runtime) -> None:
        await self.hurry.wait()
        runtime.manager.kill()


def ignore_hangups() -> None:
    """Until there is a loop: a reload that comes before the files were read is done with their reading.

    A handler of our own, for SIG_IGN would go on in every process that we start.
    """
    signal.signal(signal.SIGHUP, lambda *_: None)
