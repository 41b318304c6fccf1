"""The one task of a local model's owner: it waits until the model is wanted, finds room, starts, serves and unloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from gateway.errors import InsufficientMemory
from gateway.events import Events
from gateway.models.command import Launch
from gateway.models.ends import Ending, Means
from gateway.models.fetching.download import DownloadError
from gateway.models.fetching.sources import fetch
from gateway.models.fingerprint import Stamp, as_it_lies, fingerprint
from gateway.models.owner import GONE
from gateway.models.plan import Planned, Sizes
from gateway.models.policy import idle_seconds_left
from gateway.models.registry import ModelSpec
from gateway.models.run import FlagRefused, NotWanted, OutOfMemory, Run, glance
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")
T = TypeVar("T")


class Living(Ending):
    def __init__(self, spec: ModelSpec, board: Board, events: Events, means: Means) -> None:
        super().__init__(spec, board, events, means)
        self._run: Run | None = None
        self._file: Path | None = None  # where it lies, once that is known
        self._glanced: str | None = None  # the kind of start that llama-server was last asked about
        self._off = asyncio.Event()
        self._off.set()

    async def _live(self) -> None:
        while True:
            await self._until_wanted()
            self._off.clear()
            try:
                crash = await self._serve_once()
                if self._closing:
                    return
                if crash is None:
                    self._set(ModelState.OFF, **GONE)
                else:
                    self._crashed(*crash)
            except (DownloadError, OSError) as error:
                self._fail(str(error))
            except OutOfMemory as error:
                await self._ran_out(error)
            except InsufficientMemory as error:
                self._no_room(error)
            except NotWanted:
                self._set(ModelState.OFF, **GONE)
            except FlagRefused as refused:
                self._refused_flag(refused)
            finally:
                self._going, self._forced, self._stale = None, False, False
                self._off.set()
                self._stir.set()

    async def _until_wanted(self) -> None:
        """And until the back-off after a crash is over. What speaks against it is told without its being wanted."""
        while True:
            if self.state is not ModelState.FAILED and (problem := await self.look_again()):
                self._fail(problem)
            left: float | None = None
            if self._wanted and self.state is not ModelState.FAILED:
                left = self._not_before - time.monotonic()
                if left <= 0:
                    return
            elif self.state in (ModelState.STARTING, ModelState.LOADING):
                self._set(ModelState.OFF, **GONE)  # it was to be tried again, and nobody wants it any more
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    async def _serve_once(self) -> tuple[bool, str] | None:
        """One life of a server. None if it was unloaded on purpose, else whether it had been ready and why it ended."""
        means = self._means
        path = self.spec.path
        if path is None:
            self._set(ModelState.DOWNLOADING, load_progress=0.0)
            models_dir = means.settings.models_dir
            path = await self._unless_going(fetch(self.spec, models_dir, means.hub_caches, self._tell_progress))
        self._file = path
        port = means.ports.take()
        try:
            planned = await self._plan(path, port)
            if self._going is not None:
                raise NotWanted
            self._set(ModelState.STARTING, port=port, load_progress=0.0, error_message=None)
            await means.landlord.book(self, planned.sizes.need)
            if self._unknown(planned.sizes):
                await self._measure(planned)
            return await self._serve(planned)
        finally:
            self._stays_until = None
            means.landlord.leave(self)
            means.ports.give_back(port)

    async def _serve(self, planned: Planned) -> tuple[bool, str] | None:
        means = self._means
        self._events.emit("model.loading", f"{self.id}: {_about(planned.launch)}", model=self.id)
        means.keep_secret(planned.launch.api_key)
        lies_as = await asyncio.to_thread(self.lies_as)
        run = self._run = await Run.start(planned, means.output, means.connect)
        watch = asyncio.create_task(run.kill_when_wedged(lambda: self.serving, self._wedged), name=f"watch {self.id}")
        try:
            self._set(ModelState.LOADING, pid=run.process.pid)
            if reason := await run.until_ready(self._tell_progress, lambda: self._going is None):
                return False, reason
            self.slots, self.ctx = planned.launch.parallel or None, planned.ctx
            # a file that was replaced during the load: nobody knows which of the two it is
            self.started_as = lies_as if await asyncio.to_thread(self.lies_as) == lies_as else None
            await self._ready(run.backend)
            await self._loaded(run)
            if reason := await self._until_over(run):
                self._events.emit("model.evicted", f"{self.id}: {reason}", model=self.id)
                return None
            self._not_ready()
            return True, await run.why_ended()
        finally:
            watch.cancel()
            self._not_ready()
            if run.process.running and (self._closing or self._going):
                self._set(ModelState.STOPPING)
            await run.end(at_once=self._forced)
            self._run = None

    async def _until_over(self, run: Run) -> str | None:
        """Why its server is to be unloaded, when nothing runs on it any more; None when it has ended by itself."""
        while run.process.running:
            if self._going is not None and (self._forced or not self.serving):
                return self._going
            timeout = self._idle_timeout()
            left = idle_seconds_left(self.last_used, self.leases, timeout, time.monotonic())
            if left == 0:
                self._go("it was idle", "idle")
            else:
                await run.until_woken(self._wake, left or timeout or None)
        return None

    def lies_as(self, stamp: Stamp = as_it_lies) -> str | None:
        file, planner = self.spec.path or self._file, self._means.planner
        return fingerprint(self.spec, file, planner.binary, planner.settings, stamp) if file is not None else None

    async def _plan(self, path: Path, port: int) -> Planned:
        means = self._means
        planned = await asyncio.to_thread(means.planner.plan, self.spec, path, means.herd(), port, self._without)
        means.landlord.found(planned.memory)
        return planned

    def _unknown(self, sizes: Sizes) -> bool:
        """Whether it would be the first start of its kind beside others."""
        return not sizes.measured and sizes.key not in (None, self._glanced) and not self._means.herd().single

    async def _measure(self, planned: Planned) -> None:
        """llama-server itself is asked what it needs, and that is booked instead of what was foretold."""
        means, sizes = self._means, planned.sizes
        buffers = await self._unless_going(glance(planned))
        self._glanced = sizes.key
        if not buffers or sizes.key is None:
            return
        await asyncio.to_thread(means.planner.book.put, sizes.key, buffers, 0.0)
        if self._going is not None:
            raise NotWanted
        self.measured = sizes.of(buffers)
        if all(size <= sizes.need.get(device, 0) for device, size in self.measured.items()):
            means.landlord.rebook(self, self.measured)
            return
        means.landlord.leave(self)
        await means.landlord.book(self, self.measured)

    async def _unless_going(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; it is cancelled when the model is to go meanwhile. Raises NotWanted."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if self._going is not None:
                    raise NotWanted
                self._wake.clear()
                woken = asyncio.ensure_future(self._wake.wait())
                try:
                    await asyncio.wait((task, woken), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    woken.cancel()
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait((task,))

    def _tell_progress(self, progress: float | None) -> None:
        shown = self._board.models[self.id].load_progress
        if progress is None or shown is None or progress >= shown + 0.01:
            self._board.set_model(self.id, load_progress=progress and round(progress, 3))

    def _wedged(self, reason: str) -> None:
        log.error("%s: %s", self.id, reason)

    def _idle_timeout(self) -> float:
        """Seconds; 0 is never."""
        if self.spec.pinned:
            return 0.0
        own = self.spec.idle_timeout
        return self._means.settings.idle_timeout_seconds if own is None else own


def _about(launch: Launch) -> str:
    slots = f"{launch.parallel} slots" if launch.parallel else "its own number of slots"
    ctx = f"{launch.ctx_total} tokens of context in all" if launch.ctx_total else "the context of its flags"
    return f"{slots}, {ctx}, {launch.ngl} layers on the GPU, {launch.threads} threads"
