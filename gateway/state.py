"""The one state machine: what the service and each model are doing, published to a file for the health server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class ServiceState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class ModelState(StrEnum):
    OFF = "off"
    DOWNLOADING = "downloading"
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    CRASHED = "crashed"
    FAILED = "failed"


_COMING = (ModelState.DOWNLOADING, ModelState.STARTING, ModelState.LOADING, ModelState.CRASHED)


@dataclass(slots=True)
class ModelStatus:
    """What is known of one model. Times are unix seconds, progress is 0–1, memory MiB."""

    alias: str
    state: ModelState = ModelState.OFF
    port: int | None = None
    pid: int | None = None
    slots: int | None = None
    started_at: float | None = None
    last_used_at: float | None = None
    load_progress: float | None = None
    error_message: str | None = None
    detail: str | None = None  # what it waits for, in one sentence
    vram_used_mb: int | None = None
    updated_at: float = field(default_factory=time.time)
    settled: bool = False  # it has answered since its start or its last crash
    away: bool = False  # a foreign server that does not answer: nobody here can bring it back

    def as_json(self) -> dict[str, Any]:
        row = asdict(self)
        del row["settled"], row["away"]
        row["status"] = row["state"]
        return row


@dataclass(frozen=True, slots=True)
class Seen:
    """A model as `service_state` sees it."""

    state: ModelState
    settled: bool
    away: bool = False


def service_state(required: list[Seen], single: bool, was_ready: bool, others: Sequence[Seen] = ()) -> ServiceState:
    """The state of an accepting service (CONTRACT 2), from its resident models and the `others`, loaded on demand.

    With nothing to preload it is ready at once. An idle unload keeps ready (the model stays settled); a crash
    unsettles: with one model that means loading again, among several the service stays ready. A foreign server that
    is away is not waited for, and where all resident models have failed, another one that answers is enough.
    """
    if not required:
        return ServiceState.READY
    if all(model.state is ModelState.FAILED for model in required):
        usable = any(model.settled or (was_ready and model.state in _COMING) for model in others)
        return ServiceState.READY if usable else ServiceState.FAILED
    ended = [model.settled or model.away or model.state is ModelState.FAILED for model in required]
    if single:
        return ServiceState.READY if required[0].settled else ServiceState.LOADING
    if was_ready:
        return ServiceState.READY
    answers = any(model.settled for model in (*required, *others))
    return ServiceState.READY if all(ended) and answers else ServiceState.LOADING


def _seen(models: Iterable[ModelStatus]) -> list[Seen]:
    return [Seen(model.state, model.settled, model.away) for model in models]


class Board:
    """Holds the state. Everyone reads it; the runtime and the models' owners write it; nobody else."""

    def __init__(self) -> None:
        self.status = ServiceState.STARTING
        self.since = time.time()
        self.detail = "starting"
        self.started_at = self.since
        self.models: dict[str, ModelStatus] = {}
        self.single = True
        self._required: tuple[str, ...] = ()
        self._listeners: list[Callable[[str | None], None]] = []

    def add_model(self, model_id: str, *, required: bool) -> None:
        self.models[model_id] = ModelStatus(alias=model_id)
        if required:
            self._required += (model_id,)
        self._tell(model_id)

    def remove_model(self, model_id: str) -> None:
        del self.models[model_id]
        self.release(model_id)

    def require(self, model_id: str) -> None:
        """It must be resident: the service is not ready before it has come to an end state."""
        if model_id not in self._required:
            self._required += (model_id,)

    def release(self, model_id: str) -> None:
        """It need not be resident any more."""
        self._required = tuple(name for name in self._required if name != model_id)
        self._tell(model_id)
        if self.status in (ServiceState.LOADING, ServiceState.READY, ServiceState.FAILED):
            self.refresh()

    def listen(self, callback: Callable[[str | None], None]) -> Callable[[], None]:
        """`callback(model id, or None for the service)` after each change; returns the way to stop listening."""
        self._listeners.append(callback)
        return lambda: self._listeners.remove(callback)

    def set_service(self, status: ServiceState, detail: str) -> None:
        if (status, detail) == (self.status, self.detail):
            return
        if status is not self.status:
            self.since = time.time()
        self.status, self.detail = status, detail
        self._tell(None)

    def set_model(self, model_id: str, state: ModelState | None = None, **changes: Any) -> None:
        model = self.models[model_id]
        for name, value in changes.items():
            setattr(model, name, value)
        if state is not None:
            model.state = state
            if state is ModelState.READY:
                model.settled = True
            elif state in (ModelState.CRASHED, ModelState.FAILED):
                model.settled = False
        model.updated_at = time.time()
        self._tell(model_id)
        if self.status in (ServiceState.LOADING, ServiceState.READY, ServiceState.FAILED):
            self.refresh()

    def refresh(self) -> None:
        """Derive the service's state anew; the runtime calls it once when it begins to accept."""
        models = [self.models[name] for name in self._required]
        others = [model for name, model in self.models.items() if name not in self._required]
        was_ready = self.status is ServiceState.READY
        status = service_state(_seen(models), self.single, was_ready, _seen(others))
        self.set_service(status, self._describe(status, models))

    @staticmethod
    def _describe(status: ServiceState, models: list[ModelStatus]) -> str:
        if status is ServiceState.READY:
            return "accepting requests"
        if status is ServiceState.FAILED:
            return "; ".join(f"{m.alias}: {m.error_message or 'failed'}" for m in models)
        return ", ".join(f"{m.alias} is {m.state}" for m in models if not m.settled)

    def _tell(self, what: str | None) -> None:
        for listener in tuple(self._listeners):
            listener(what)

    def snapshot(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "since": self.since,
            "detail": self.detail,
            "models": {name: model.as_json() for name, model in self.models.items()},
        }


HEARTBEAT_SECONDS = 1.0  # at most; one of three may be late without being missed


@contextlib.asynccontextmanager
async def publishing(board: Board, path: Path | None, stale_seconds: float = 10.0) -> AsyncIterator[None]:
    """Keep `path` (on tmpfs) up to date: at each change, and as a heartbeat, well before the last one is stale.

    The heartbeat is CLOCK_MONOTONIC, which all processes of a machine share and no clock step moves. It comes from
    the loop itself, so that a blocked loop looks as dead as it is.
    """
    if path is None:
        yield
        return
    loop = asyncio.get_running_loop()
    pending: asyncio.Handle | None = None

    def write() -> None:
        nonlocal pending
        pending = None
        record = board.snapshot() | {"heartbeat": time.monotonic(), "pid": os.getpid()}
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # the health server then sees no heartbeat, and says so
            temporary.write_text(json.dumps(record))
            temporary.replace(path)

    def changed(_: str | None) -> None:
        nonlocal pending
        if pending is None:
            pending = loop.call_soon(write)

    async def beat() -> None:
        while True:
            write()
            await asyncio.sleep(min(HEARTBEAT_SECONDS, stale_seconds / 3))

    stop_listening = board.listen(changed)
    task = asyncio.create_task(beat(), name="state heartbeat")
    try:
        yield
    finally:
        stop_listening()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        write()
