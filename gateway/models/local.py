"""The owner of a model whose llama-server is our child: load on demand, watch, restart with back-off, unload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.backend import Backend
from gateway.errors import CorralError, InsufficientMemory
from gateway.events import Events
from gateway.metrics import Metrics
from gateway.models.command import Launch
from gateway.models.download import DownloadError
from gateway.models.owner import Owner
from gateway.models.plan import Herd, Planned, Planner
from gateway.models.policy import Crash, Need, Resident, idle_seconds_left, residency, restart_delay
from gateway.models.ports import Ports
from gateway.models.registry import ModelSpec
from gateway.models.room import Landlord, mib
from gateway.models.run import FlagRefused, NotWanted, OutOfMemory, Run, glance
from gateway.models.sources import fetch
from gateway.settings import Settings
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")


@dataclass(frozen=True)
class Means:
    """What a local owner needs from the rest of the house."""

    settings: Settings
    planner: Planner
    output: Callable[[bytes], None]  # where llama-server's own lines go
    connect: Callable[[str, str], Backend]  # url, key
    keep_secret: Callable[[str], None]  # logs will mask it
    hub_caches: Sequence[Path]  # folders where Hugging Face models may lie already
    metrics: Metrics
    landlord: Landlord
    ports: Ports
    herd: Callable[[], Herd]


class LocalOwner(Owner):
    def __init__(self, spec: ModelSpec, board: Board, events: Events, means: Means) -> None:
        super().__init__(spec, board, events)
        self.measured: Need | None = None
        self._means = means
        self._without: frozenset[str] = frozenset()
        self._run: Run | None = None
        self._crashes: list[Crash] = []
        self._not_before = 0.0  # monotonic: the back-off after a crash
        self._going: str | None = None  # why its server is being unloaded
        self._forced = False
        self._stays_until: float | None = None
        self._asked = False  # to be loaded, by somebody who does not wait for it
        self._tried_again = False  # after it had run out of memory
        self._stale = False  # its server was started with another configuration
        self._failed_as: object = None
        self._off = asyncio.Event()
        self._off.set()

    # --- asked from outside

    async def notice_death(self, generation: int) -> None:
        run = self._run
        if run is None or generation != self.generation:
            return
        if await run.process.ended_within(0.5) and generation == self.generation:
            self._not_ready()  # else it lives, and only the connection broke

    def kill(self) -> None:
        self._closing = True  # its end is no crash
        if self._run is not None:
            self._run.process.kill()

    @property
    def pid(self) -> int | None:
        return self._run.process.pid if self._run is not None and self._run.process.running else None

    def resident(self, need: Need) -> Resident:
        return Resident(
            self.id,
            need,
            last_used=self.last_used,
            leases=self.leases,
            pinned=self.spec.pinned,
            leaving=self._going is not None,
            stays_until=self._stays_until,
        )

    def evict(self, reason: str) -> None:
        assert not self.leases
        self._go(reason, "memory")

    def waits(self, why: str | None) -> None:
        if why != self.detail:
            self._board.set_model(self.id, detail=why)

    async def eject(self, force: bool) -> None:
        while not force and self.backend is None and self.leases and not self._off.is_set():
            await self._changed()  # it is being loaded for those who wait: they are served first
        if self._off.is_set():
            self._wanted = bool(self.leases)
            if self.state is ModelState.CRASHED and not self._wanted:
                self._set(ModelState.OFF)
            return
        self._forced |= force
        self._go("it was ejected", "eject")
        self._wake.set()
        await self._off.wait()

    def reset(self) -> None:
        self._crashes = []
        self._not_before = 0.0
        if self.state in (ModelState.FAILED, ModelState.CRASHED):
            self._failed_as = None
            self._set(ModelState.OFF, error_message=None, detail=None)
            self._events.emit("model.reset", self.id, model=self.id)
        self._wanted = self.kept or bool(self.leases) or self.backend is not None
        self._wake.set()

    def load(self) -> None:
        self._asked = True
        super().load()

    def change(self, spec: ModelSpec) -> None:
        super().change(spec)
        if not self._off.is_set():
            self._stale = True
            if not self.leases:
                self._go_stale()

    async def estimate(self) -> Need:
        """What it would book; nothing for one whose file is not here yet."""
        if self.spec.path is None or self.spec.problem:
            return {}
        return (await self._plan(self.spec.path, port=0)).sizes.need

    # --- its one task

    async def _live(self) -> None:
        while True:
            await self._until_wanted()
            self._off.clear()
            try:
                crash = await self._serve_once()
                if self._closing:
                    return
                if crash is None:
                    self._set(ModelState.OFF, load_progress=None, pid=None, port=None, detail=None, vram_used_mb=None)
                else:
                    self._crashed(*crash)
            except (DownloadError, OSError) as error:
                self._fail(str(error))
            except OutOfMemory as error:
                await self._ran_out(error)
            except InsufficientMemory as error:
                self._no_room(error)
            except NotWanted:
                self._set(ModelState.OFF, load_progress=None, pid=None, port=None, detail=None)
            except FlagRefused as refused:
                self._without |= {refused.flag}
                log.info("%s: this llama-server does not know %s; starting without it", self.id, refused.flag)
            finally:
                self._going, self._forced, self._stale = None, False, False
                self._off.set()

    async def _until_wanted(self) -> None:
        while not self._wanted or self.state is ModelState.FAILED:
            self._wake.clear()
            await self._wake.wait()
        while (left := self._not_before - time.monotonic()) > 0:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._wake.wait()

    async def _serve_once(self) -> tuple[bool, str] | None:
        """One life of a server. None if it was unloaded on purpose, else whether it had been ready and why it ended."""
        if self.spec.problem:
            raise OSError(self.spec.problem)
        means = self._means
        path = self.spec.path
        if path is None:
            self._set(ModelState.DOWNLOADING, load_progress=0.0)
            models_dir = means.settings.models_dir
            path = await self._unless_going(fetch(self.spec, models_dir, means.hub_caches, self._tell_progress))
        port = means.ports.take()
        try:
            planned = await self._plan(path, port)
            if self._going is not None:
                raise NotWanted
            self._set(ModelState.STARTING, port=port, load_progress=0.0, error_message=None)
            await means.landlord.book(self, planned.sizes.need)
            if planned.sizes.key is not None and not planned.sizes.measured and not means.herd().single:
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
        run = self._run = await Run.start(planned, means.output, means.connect)
        watch = asyncio.create_task(run.kill_when_wedged(lambda: self.serving, self._wedged), name=f"watch {self.id}")
        try:
            self._set(ModelState.LOADING, pid=run.process.pid)
            if reason := await run.until_ready(self._tell_progress, lambda: self._going is None):
                return False, reason
            self.slots, self.ctx = planned.launch.parallel or None, planned.ctx
            await self._ready(run.backend)
            await self._loaded(run)
            if reason := await self._until_over(run):
                self._events.emit("model.evicted", f"{self.id}: {reason}", model=self.id)
                return None
            return True, run.process.explain(await run.process.wait())
        finally:
            watch.cancel()
            self._not_ready()
            if run.process.running and (self._closing or self._going):
                self._set(ModelState.STOPPING)
            await run.end()
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

    async def _measure(self, planned: Planned) -> None:
        """The first start of its kind: llama-server itself is asked what it needs, and that is booked instead."""
        means, sizes = self._means, planned.sizes
        buffers = await glance(planned)
        if not buffers or sizes.key is None:
            return
        await asyncio.to_thread(means.planner.book.put, sizes.key, buffers, 0.0)
        self.measured = sizes.of(buffers)
        means.landlord.leave(self)
        await means.landlord.book(self, self.measured)

    async def _plan(self, path: Path, port: int) -> Planned:
        means = self._means
        planned = await asyncio.to_thread(means.planner.plan, self.spec, path, means.herd(), port, self._without)
        means.landlord.found(planned.memory)
        return planned

    # --- ends of a load

    async def _loaded(self, run: Run) -> None:
        """What it really takes is booked from now on, and remembered."""
        means, sizes, seconds, buffers = self._means, run.planned.sizes, run.seconds, run.measured
        means.metrics.model_load.labels(self.id).observe(seconds)
        self._events.emit("model.loaded", f"{self.id} in {seconds:.2f} s", model=self.id)
        self._stays_until = time.monotonic() + residency(seconds)
        self._asked = self._tried_again = False
        if buffers:
            self.measured = sizes.of(buffers)
            means.landlord.rebook(self, self.measured)
        elif sizes.measured:
            self.measured = sizes.need
        booked = means.landlord.needs.get(self.id, {})
        self._board.set_model(self.id, vram_used_mb=mib(booked, means.landlord.budget))
        means.landlord.look()
        if sizes.key is not None:
            await asyncio.to_thread(means.planner.book.put, sizes.key, buffers, seconds)

    def _crashed(self, was_ready: bool, reason: str) -> None:
        now = time.monotonic()
        self._crashes = [*self._crashes[-20:], Crash(now, was_ready)]
        delay = restart_delay(self._crashes, now)
        if delay is None:
            self._fail(reason)
            return
        self._wanted = self.kept or self._asked or bool(self.leases)  # else it starts again when it is wanted
        self._not_before = now + delay
        self._set(ModelState.CRASHED, error_message=reason, load_progress=None, pid=None, detail=None)
        again = f"next start in {delay:g} s" if self._wanted else "it starts again when it is wanted"
        self._events.emit("model.crashed", f"{self.id}: {reason}; {again}", logging.ERROR, model=self.id)
        self._means.metrics.restarts.labels(self.id).inc()

    def _fail(self, message: str) -> None:
        self._asked = False
        self._failed_as = _signature(self.spec.path)
        self._failed(message)

    async def _ran_out(self, error: OutOfMemory) -> None:
        """It was given what it should need, and that was too little: one more model goes, and it is tried once more."""
        landlord, sizes = self._means.landlord, error.planned.sizes
        if sizes.key is not None:
            await asyncio.to_thread(self._means.planner.book.raise_to, sizes.key, sizes.need)
        if self._means.herd().single:  # nobody else can go
            self._crashed(False, str(error))
            return
        if self._tried_again or not landlord.evict_one(self):
            refusal = landlord.refusal(self, sizes.need)
            self._no_room(InsufficientMemory(f"{refusal.message}; {error}", retry_after=30))
            return
        self._tried_again = True
        self._set(ModelState.STARTING, pid=None, detail="ran out of memory: tried once more with another one gone")

    def _no_room(self, error: InsufficientMemory) -> None:
        """Not its fault, and it may fit another time: those who wait are told the numbers."""
        if self._means.herd().single:
            self._fail(error.message)
            return
        self._wanted = self._asked = self._tried_again = False
        self._set(ModelState.OFF, error_message=error.message, load_progress=None, pid=None, port=None, detail=None)
        self._board.release(self.id)
        self._events.emit("model.refused", error.message, logging.WARNING, model=self.id)
        self._settle_waiting(error)

    def _raise_if_hopeless(self) -> None:
        if self.state is ModelState.FAILED and self.spec.path and _signature(self.spec.path) != self._failed_as:
            self.reset()  # the file is another one by now
            self.want()
        super()._raise_if_hopeless()

    # --- helpers of the task

    def _go(self, reason: str, kind: str) -> None:
        """Unload the server: whoever comes from now on waits for the next one."""
        if self._going is not None:
            return
        self._going, self._wanted, self._asked = reason, False, False
        self.evictions += 1
        self._means.metrics.evictions.labels(kind).inc()
        if self.backend is not None:
            self.unloaded = self.generation
            self._not_ready()
            self._set(ModelState.STOPPING)
        self._means.landlord.give_up(self, NotWanted())
        self._wake.set()
        if self._waiting:
            self.want()

    def _go_stale(self) -> None:
        self._go("its configuration has changed", "changed")
        self.want()

    def _unused(self) -> None:
        if self._stale and self._going is None and self.backend is not None:
            self._go_stale()
        if self.backend is None and self.detail is not None and not (self.kept or self._asked):
            self._wanted = False
            self._means.landlord.give_up(self, NotWanted())
        self._means.landlord.look()
        if self._going is not None:
            self._wake.set()

    def lease_ended(self, generation: int) -> None:
        super().lease_ended(generation)
        if self._going is not None and not self.serving:
            self._wake.set()

    def _too_late(self) -> CorralError:
        if self.detail is not None:
            return InsufficientMemory(f"{self.id} {self.detail}", retry_after=10)
        return super()._too_late()

    async def _unless_going(self, work: Coroutine[Any, Any, Path]) -> Path:
        """What `work` gives; it is cancelled when the model is to go meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                if self._going is not None:
                    raise NotWanted
                self._wake.clear()
                woken = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait((task, woken), return_when=asyncio.FIRST_COMPLETED)
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

    async def _changed(self) -> None:
        """Until something about this model has changed on the board."""
        changed = asyncio.Event()
        stop = self._board.listen(lambda name: changed.set() if name == self.id else None)
        try:
            await changed.wait()
        finally:
            stop()


def _about(launch: Launch) -> str:
    slots = f"{launch.parallel} slots" if launch.parallel else "its own number of slots"
    ctx = f"{launch.ctx_total} tokens of context in all" if launch.ctx_total else "the context of its flags"
    return f"{slots}, {ctx}, {launch.ngl} layers on the GPU, {launch.threads} threads"


def _signature(path: Path | None) -> object:
    try:
        about = path.stat() if path is not None else None
    except OSError:
        return None
    return about and (about.st_mtime_ns, about.st_size)
