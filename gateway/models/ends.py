"""How the loads of a local model end, well or badly, and what follows: the next start, a refusal, or nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.backend import Backend
from gateway.errors import CorralError, InsufficientMemory, ModelFailed
from gateway.events import Events
from gateway.metrics import Metrics
from gateway.models.memory.landlord import Landlord, mib
from gateway.models.owner import GONE, Owner
from gateway.models.plan import Herd, Planner, Sizes
from gateway.models.policy import Crash, Need, Resident, residency, restart_delay
from gateway.models.ports import Ports
from gateway.models.registry import ModelSpec
from gateway.models.run import FlagRefused, NotWanted, OutOfMemory, Run
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


class Ending(Owner):
    """The lowest of three floors: what is known of the starts so far. Above it, `life` makes them; `local` is asked."""

    def __init__(self, spec: ModelSpec, board: Board, events: Events, means: Means) -> None:
        super().__init__(spec, board, events)
        self.measured: Need | None = None
        self._means = means
        self._going: str | None = None  # why its server is being unloaded
        self._forced = False
        self._stale = False  # its server was started with another configuration
        self._asked = False  # to be loaded, by somebody who does not wait for it
        self._stays_until: float | None = None
        self._crashes: list[Crash] = []
        self._not_before = 0.0  # monotonic: the back-off after a crash
        self._without: frozenset[str] = frozenset()  # flags that this build does not know
        self._tried_again = False  # after it had run out of memory
        self._failed_as: object = None  # the file as it was then

    # --- the landlord's tenant

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

    # --- it loaded

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
        if self._stale and not self.leases:
            self._go_stale()  # it was changed while it loaded, and who wanted it has left
        means.landlord.look()
        if sizes.key is not None:
            await asyncio.to_thread(means.planner.book.put, sizes.key, buffers, seconds)

    # --- it did not, or not for long

    def _crashed(self, was_ready: bool, reason: str) -> None:
        now = time.monotonic()
        self._crashes = [*self._crashes[-20:], Crash(now, was_ready)]
        delay = restart_delay(self._crashes, now)
        if delay is None:
            self._fail(reason)
            return
        self._wanted = self.kept or self._asked or bool(self.leases)  # else it starts again when it is wanted
        self._not_before = now + delay
        self._set(ModelState.CRASHED, error_message=reason, **GONE)
        again = f"next start in {delay:g} s" if self._wanted else "it starts again when it is wanted"
        self._events.emit("model.crashed", f"{self.id}: {reason}; {again}", logging.ERROR, model=self.id)
        self._means.metrics.restarts.labels(self.id).inc()

    def _fail(self, message: str, refusal: type[CorralError] = ModelFailed) -> None:
        self._asked = False
        self._failed_as = signature(self.spec.path)
        self._failed(message, refusal)

    def _refused_flag(self, refused: FlagRefused) -> None:
        self._without |= {refused.flag}
        log.info("%s: this llama-server does not know %s; starting without it", self.id, refused.flag)

    async def _ran_out(self, error: OutOfMemory) -> None:
        """It was given what it should need, and that was too little: one more model goes, and it is tried once more."""
        landlord, planned = self._means.landlord, error.planned.sizes
        await asyncio.to_thread(self._remember_shortage, planned)
        if self._means.herd().single:  # nobody else can go
            self._crashed(False, str(error))
            return
        if self._tried_again or not landlord.evict_one(self):
            refusal = landlord.refusal(self, planned.need)
            self._no_room(InsufficientMemory(f"{refusal.message}; {error}", retry_after=30))
            return
        self._tried_again = True
        log.warning("%s ran out of memory while it loaded; it is tried once more with another one gone", self.id)
        self._set(ModelState.STARTING, pid=None, load_progress=0.0)

    def _remember_shortage(self, sizes: Sizes) -> None:
        """Blocking. What llama-server told of its buffers, if it did, is nearer to the truth than what we foretell."""
        book, key = self._means.planner.book, sizes.key
        if key is not None:
            known = book.get(key)
            book.raise_to(key, {} if known is not None and known.buffers else sizes.buffers)

    def _no_room(self, error: InsufficientMemory) -> None:
        """Not its fault, and it may fit another time: those who wait are told the numbers."""
        if self._means.herd().single:
            self._fail(error.message, InsufficientMemory)
            return
        self._wanted = self._asked = self._tried_again = False
        self._set(ModelState.OFF, error_message=error.message, **GONE)
        self._board.release(self.id)
        self._events.emit("model.refused", error.message, logging.WARNING, model=self.id)
        self._settle_waiting(error)


def signature(path: Path | None) -> object:
    """By what a file that has been replaced is told from the one that failed."""
    try:
        about = path.stat() if path is not None else None
    except OSError:
        return None
    return about and (about.st_mtime_ns, about.st_size)
