"""The owner of a model whose llama-server is our child: load on demand, watch, restart with back-off, unload."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.backend import Backend
from gateway.errors import BackendError, BackendTimeout
from gateway.events import Events
from gateway.metrics import Metrics
from gateway.models.command import Launch, build_argv, build_environment, refused_flag
from gateway.models.device import available_memory
from gateway.models.download import DownloadError, fetch_url
from gateway.models.gguf import GGUFError, GGUFHeader, read_header
from gateway.models.hub import fetch_hf
from gateway.models.ledger import fit_parallel
from gateway.models.owner import Owner
from gateway.models.policy import Crash, idle_seconds_left, restart_delay
from gateway.models.process import Process, free_port
from gateway.models.registry import ModelSpec
from gateway.settings import Settings
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")

MOST_SLOTS = 4  # unless PARALLEL says otherwise
CACHE_RAM_MB = 1024  # llama-server's own default is 8 GiB, which no estimate would show
MOST_BATCH = 8192  # tokens of a text to embed; the memory for it grows with it
LOAD_SECONDS = 1800.0  # a server that is not ready by then will not be
_FIRST_POLL_SECONDS, _SLOWEST_POLL_SECONDS = 0.01, 0.25
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Means:
    """What a local owner needs from the rest of the house."""

    settings: Settings
    binary: Path
    inherited: Mapping[str, str]  # the environment that a child may have
    output: Callable[[bytes], None]  # where llama-server's own lines go
    connect: Callable[[str, str], Backend]  # url, key
    keep_secret: Callable[[str], None]  # logs will mask it
    hub_caches: Sequence[Path]  # folders where Hugging Face models may lie already
    metrics: Metrics


class _FlagRefused(Exception):
    def __init__(self, flag: str) -> None:
        super().__init__(flag)
        self.flag = flag


class LocalOwner(Owner):
    def __init__(self, spec: ModelSpec, board: Board, events: Events, means: Means) -> None:
        super().__init__(spec, board, events)
        self._means = means
        self._without: frozenset[str] = frozenset()
        self._process: Process | None = None
        self._crashes: list[Crash] = []

    async def notice_death(self, generation: int) -> None:
        process = self._process
        if process is None or generation != self.generation:
            return
        with contextlib.suppress(TimeoutError):  # it lives: only the connection broke
            async with asyncio.timeout(0.5):
                await process.wait()
                if generation == self.generation:
                    self._not_ready()

    def kill(self) -> None:
        self._closing = True  # its end is no crash
        if self._process is not None:
            self._process.kill()

    async def _live(self) -> None:
        while True:
            await self._until_wanted()
            try:
                crash = await self._serve_once()
            except (DownloadError, OSError) as error:
                self._failed(str(error))
                return
            except _FlagRefused as refused:
                self._without |= {refused.flag}
                log.info("%s: this llama-server does not know %s; starting without it", self.spec.id, refused.flag)
                continue
            if self._closing:
                return
            if crash is None:
                self._set(ModelState.OFF, load_progress=None, pid=None, port=None)
                continue
            was_ready, reason = crash
            now = time.monotonic()
            self._crashes = [*self._crashes[-20:], Crash(now, was_ready)]
            delay = restart_delay(self._crashes, now)
            if delay is None:
                self._failed(reason)
                return
            self._set(ModelState.CRASHED, error_message=reason, load_progress=None, pid=None)
            self._events.emit(
                "model.crashed",
                f"{self.spec.id}: {reason}; next start in {delay:g} s",
                logging.ERROR,
                model=self.spec.id,
            )
            self._means.metrics.restarts.labels(self.spec.id).inc()
            await asyncio.sleep(delay)

    async def _until_wanted(self) -> None:
        while not self._wanted:
            self._wake.clear()
            await self._wake.wait()

    async def _serve_once(self) -> tuple[bool, str] | None:
        """One life of a server. None if it was unloaded on purpose, else whether it had been ready and why it ended."""
        path = self.spec.path or await self._fetch()
        begun = time.monotonic()
        launch = await self._plan(path)
        self._set(ModelState.STARTING, port=launch.port, load_progress=0.0)
        self._events.emit(
            "model.loading",
            f"{self.spec.id}: {launch.parallel} × {launch.ctx} tokens of context, {launch.ngl} layers on the GPU",
            model=self.spec.id,
        )
        self._means.keep_secret(launch.api_key)
        process = self._process = await Process.spawn(
            build_argv(self.spec, path, launch), build_environment(self._means.inherited, launch), self._means.output
        )
        backend = self._means.connect(f"http://127.0.0.1:{launch.port}", launch.api_key)
        try:
            self._set(ModelState.LOADING, pid=process.pid)
            if not await self._until_ready(process, backend):
                return self._load_ended(process, launch)
            self.slots, self.ctx = launch.parallel, launch.ctx
            await self._ready(backend)
            seconds = time.monotonic() - begun
            self._means.metrics.model_load.labels(self.spec.id).observe(seconds)
            self._events.emit("model.loaded", f"{self.spec.id} in {seconds:.2f} s", model=self.spec.id)
            if await self._until_exit_or_idle(process):
                self._wanted = False  # from here on a wish is for the next server
                self._set(ModelState.STOPPING)
                self._not_ready()
                self._means.metrics.evictions.labels("idle").inc()
                self._events.emit("model.evicted", f"{self.spec.id} was idle", model=self.spec.id)
                return None
            return True, process.explain(await process.wait())
        finally:
            self._not_ready()
            backend.close()  # before the signal: an open stream makes llama-server hang on SIGTERM
            if process.running and self._closing:
                self._set(ModelState.STOPPING)
            await process.stop()
            self._process = None

    async def _fetch(self) -> Path:
        self._set(ModelState.DOWNLOADING, load_progress=0.0)
        shown = 0

        def progress(done: int, total: int | None) -> None:
            nonlocal shown
            percent = done * 100 // total if total else done // (256 * _MIB)
            if percent != shown:
                shown = percent
                self._set(ModelState.DOWNLOADING, load_progress=done / total if total else None)
                if not total or percent % 10 == 0:
                    log.info("%s: %d MiB fetched%s", self.spec.id, done // _MIB, f" ({percent} %)" if total else "")

        models_dir = self._means.settings.models_dir
        if self.spec.hf is not None:
            return await fetch_hf(self.spec.hf, models_dir, self._means.hub_caches)
        assert self.spec.download_url is not None
        return await fetch_url(self.spec.download_url, models_dir, sha256=self.spec.sha256, progress=progress)

    async def _plan(self, path: Path) -> Launch:
        settings = self._means.settings
        ctx, parallel = settings.ctx, settings.parallel
        header: GGUFHeader | None = None
        try:
            header = await asyncio.to_thread(read_header, path)
        except (GGUFError, OSError) as error:
            log.warning("%s: %s", self.spec.id, error)  # llama-server has the last word on its files
        else:
            if header.n_ctx_train and ("CTX" not in settings.explicit or not ctx):
                ctx = min(ctx or header.n_ctx_train, header.n_ctx_train)
            if parallel is None:
                parallel = await asyncio.to_thread(self._fitting, header, ctx)
        return Launch(
            binary=self._means.binary,
            port=free_port(settings.port_backend),
            ctx=ctx,
            parallel=parallel or 1,
            ngl=settings.ngl,
            threads=settings.threads or usable_cores(),
            cache_ram_mb=CACHE_RAM_MB,
            extra_args=settings.extra_args,
            api_key=secrets.token_urlsafe(32),
            embedding=header is not None and header.is_embedding,
            reranking=header is not None and header.is_reranker,
            batch=min(ctx, MOST_BATCH) if header is not None and header.embeds_at_once else 0,
            without=self._without,
        )

    def _fitting(self, header: GGUFHeader, ctx: int) -> int:
        """As many slots as memory has room for; blocking."""
        settings = self._means.settings
        memory = available_memory(gpu=settings.ngl > 0)
        budget = settings.vram_budget_mb * _MIB or memory.free
        ngl = settings.ngl if memory.kind == "gpu" else None
        slots = fit_parallel(header, ctx, min(budget, memory.free), settings.vram_margin_mb * _MIB, MOST_SLOTS, ngl)
        if slots < MOST_SLOTS:
            log.warning(
                "%s: PARALLEL is %d, because %d MiB of %s are free",
                self.spec.id,
                slots,
                memory.free // _MIB,
                memory.kind,
            )
        return slots

    async def _until_ready(self, process: Process, backend: Backend) -> bool:
        """False where the process ended, or would not become ready in LOAD_SECONDS."""
        pause = _FIRST_POLL_SECONDS
        give_up_at = time.monotonic() + LOAD_SECONDS
        while process.running and time.monotonic() < give_up_at:
            try:
                status, _ = await backend.get("/health", 5)
                if status == 200:
                    return True
            except (BackendError, BackendTimeout):
                pass  # it does not listen yet
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await process.wait()
            pause = min(_SLOWEST_POLL_SECONDS, pause * 1.5)
        return False

    def _load_ended(self, process: Process, launch: Launch) -> tuple[bool, str]:
        if flag := refused_flag(process.last_lines, launch):
            raise _FlagRefused(flag)
        if process.running:
            return False, f"llama-server was not ready after {LOAD_SECONDS:g} s"
        return False, process.explain(process.status)

    async def _until_exit_or_idle(self, process: Process) -> bool:
        """True when nobody has used the model for the idle time-out, False when the process has ended."""
        timeout = self._means.settings.idle_timeout_seconds
        while process.running:
            left = idle_seconds_left(self._last_used, self.leases, timeout, time.monotonic())
            if left == 0:
                return True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left if left is not None else timeout or None):
                    await process.wait()
        return False


def usable_cores() -> int:
    """What the scheduler and a container's CPU quota (cgroup v2) let us have."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number
    return cores
