"""One run of a model's llama-server: spawned, loading, ready, over. Its owner decides; this does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from gateway.backend import Backend
from gateway.models.command import refused_flag
from gateway.models.memory.footprint import BufferLog, glance_argv, load_progress, out_of_memory
from gateway.models.plan import Planned
from gateway.models.ports import Stranger, answers
from gateway.models.process import Process
from gateway.models.watchdog import until_wedged

GLANCE_SECONDS = 5.0
FORCED_KILL_AFTER_SECONDS = 2.0
LOAD_SECONDS = 1800.0  # a server that is not ready by then will not be
_FIRST_POLL_SECONDS, _SLOWEST_POLL_SECONDS = 0.01, 0.25


class NotWanted(Exception):
    """Nobody waits for it any more."""


class OutOfMemory(Exception):
    """While it loaded; the text is what the process said."""

    def __init__(self, reason: str, planned: Planned) -> None:
        super().__init__(reason)
        self.planned = planned


class FlagRefused(Exception):
    """This build does not know one of the flags that not every build knows."""

    def __init__(self, flag: str) -> None:
        super().__init__(flag)
        self.flag = flag


async def glance(planned: Planned) -> dict[str, int]:
    """The buffers that llama-server itself foretells for this start, bytes by device; empty where it does not tell.

    Some 20 to 600 ms, and nothing is allocated. Builds differ, and so do GPUs: they know themselves best.
    """
    buffers, settled = BufferLog(planned.sizes.gpus), asyncio.Event()

    def take(data: bytes) -> None:
        buffers.feed(data)
        if buffers.settled:
            settled.set()

    process = await Process.spawn(glance_argv(planned.argv), planned.environment, take)
    waits = [asyncio.ensure_future(settled.wait()), asyncio.ensure_future(process.wait())]
    try:
        await asyncio.wait(waits, timeout=GLANCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        process.kill()
        await process.stop()
    return buffers.projected()


class Run:
    """Made by `start`; whoever made it must `end` it."""

    def __init__(self, planned: Planned, process: Process, backend: Backend, buffers: BufferLog) -> None:
        self.planned = planned
        self.process = process
        self.backend = backend
        self.ready = False
        self._buffers = buffers
        self._begun = time.monotonic()
        self._wedged: str | None = None

    @classmethod
    async def start(
        cls, planned: Planned, output: Callable[[bytes], None], connect: Callable[[str, str], Backend]
    ) -> Run:
        """Raises OSError where the program cannot be started."""
        buffers = BufferLog(planned.sizes.gpus)
        run: Run | None = None

        def take(data: bytes) -> None:
            output(data)
            if run is None or not run.ready:
                buffers.feed(data)

        process = await Process.spawn(planned.argv, planned.environment, take)
        launch = planned.launch
        run = cls(planned, process, connect(f"http://127.0.0.1:{launch.port}", launch.api_key), buffers)
        return run

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._begun

    @property
    def measured(self) -> dict[str, int]:
        """The buffers that it told of while it loaded, bytes by device."""
        return self._buffers.measured()

    async def until_ready(self, tell: Callable[[float], None], wanted: Callable[[], bool]) -> str | None:
        """None when it is ready, else why it will not be. Raises FlagRefused, NotWanted, OutOfMemory.

        `tell` hears how far it has come, 0–1.
        """
        process, pause = self.process, _FIRST_POLL_SECONDS
        while process.running and self.seconds < LOAD_SECONDS:
            try:
                self.ready = await answers(self.backend, process.pid)
            except Stranger as stranger:
                return str(stranger)
            if self.ready:
                return None
            if not wanted():
                raise NotWanted
            if process.running and (done := load_progress(process.pid, self.planned.sizes.file_bytes)) is not None:
                tell(done)
            await process.ended_within(pause)
            pause = min(_SLOWEST_POLL_SECONDS, pause * 1.5)
        if process.running:
            return f"llama-server was not ready after {LOAD_SECONDS:g} s"
        if not wanted():
            raise NotWanted
        await process.stop()  # has ended, and now its last words are read as well
        if self._wedged is not None:
            return self._wedged
        if flag := refused_flag(process.last_lines, self.planned.launch):
            raise FlagRefused(flag)
        if out_of_memory(process.last_lines, process.status):
            raise OutOfMemory(process.explain(process.status), self.planned)
        return await self.why_ended()

    async def why_ended(self) -> str:
        """In one sentence."""
        return self._wedged or self.process.explain(await self.process.stop())

    async def until_woken(self, wake: asyncio.Event, seconds: float | None) -> None:
        """Until it has ended, somebody wakes its owner, or `seconds` are over."""
        wake.clear()
        waits = [asyncio.ensure_future(self.process.wait()), asyncio.ensure_future(wake.wait())]
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def kill_when_wedged(self, serving: Callable[[], int], said: Callable[[str], None]) -> None:
        """A task of its own beside the run: ends it when it is alive but dead."""
        self._wedged = await until_wedged(self.process, self.backend, serving)
        said(self._wedged)
        self.process.kill()

    async def end(self, *, at_once: bool = False) -> None:
        """`at_once` is for one whose answers are cut: some builds ignore SIGTERM after that, and somebody waits."""
        self.backend.close()  # before the signal: an open stream makes llama-server hang on SIGTERM
        await (self.process.stop(FORCED_KILL_AFTER_SECONDS) if at_once else self.process.stop())
