"""One model and the one task that owns its state. Others hold leases and ask; only the owner acts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from gateway.backend import Backend
from gateway.errors import CorralError, ModelFailed, ModelLoading, ShuttingDown
from gateway.events import Events
from gateway.models.registry import ModelSpec
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")


class Lease:
    """A request's hold on a model, from before the model is chosen until the answer's last byte."""

    __slots__ = ("_owner", "generation")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.generation = 0

    async def backend(self, deadline: float) -> Backend:
        """The model's server, loaded if need be; `deadline` is on the loop's clock.

        Raises ModelLoading at the deadline, ModelFailed, ShuttingDown.
        """
        backend = self._owner.backend
        if backend is None:
            backend = await self._owner.wait_ready(deadline)
        self.generation = self._owner.generation
        return backend

    async def died(self) -> bool:
        """After a connection broke: whether the server of this lease is gone, or only that connection."""
        await self._owner.notice_death(self.generation)
        return self._owner.backend is None or self._owner.generation != self.generation


class Owner(ABC):
    """State, leases and readiness of one model; a subclass says how its server comes to be."""

    def __init__(self, spec: ModelSpec, board: Board, events: Events) -> None:
        self.spec = spec
        self.backend: Backend | None = None  # there exactly while the model is ready
        self.generation = 0  # counts the servers that this model has had
        self.leases = 0
        self.slots: int | None = None
        self.ctx: int | None = None  # of one request, tokens, as the server itself reports it
        self._board, self._events = board, events
        self._waiting: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()
        self._wanted = False
        self._closing = False
        self._task: asyncio.Task[None] | None = None
        self._last_used = time.monotonic()

    @property
    def state(self) -> ModelState:
        return self._board.models[self.spec.id].state

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator[Lease]:
        self.leases += 1
        self.want()
        try:
            yield Lease(self)
        finally:
            self.leases -= 1
            self._last_used = time.monotonic()
            self._board.models[self.spec.id].last_used_at = time.time()

    def want(self) -> None:
        """Ask for the model to be loaded; returns at once."""
        if not self._wanted:
            self._wanted = True
            self._wake.set()

    def start(self) -> None:
        self._task = asyncio.create_task(self._supervised(), name=f"model {self.spec.id}")

    async def close(self) -> None:
        """Stop the server and the task; leases are over by now, or are cut."""
        self._closing = True
        self._wake.set()
        self._settle_waiting(ShuttingDown("the service is shutting down", retry_after=5))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self.state is not ModelState.FAILED:
            self._set(ModelState.OFF, pid=None, load_progress=None)

    async def wait_ready(self, deadline: float) -> Backend:
        """Wait for the load that all who wait share."""
        while self.backend is None:
            self._raise_if_hopeless()
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                progress = self._board.models[self.spec.id].load_progress
                about = f" ({progress:.0%} loaded)" if progress else ""
                raise ModelLoading(f"{self.spec.id} is still loading{about}", retry_after=5) from None
            finally:
                self._waiting.discard(waiter)
        return self.backend

    @abstractmethod
    def kill(self) -> None:
        """End a server of ours at once."""

    @abstractmethod
    async def notice_death(self, generation: int) -> None:
        """Called by one whose connection broke: returns when it is known whether that server is gone."""

    @abstractmethod
    async def _live(self) -> None:
        """The owner's task: serve while wanted, until cancelled."""

    # --- for subclasses

    def _set(self, state: ModelState, **changes: Any) -> None:
        self._board.set_model(self.spec.id, state, **changes)

    async def _ready(self, backend: Backend) -> None:
        await self._learn(backend)
        self.generation += 1
        self._last_used = time.monotonic()
        self.backend = backend
        self._set(ModelState.READY, load_progress=1.0, error_message=None, slots=self.slots, started_at=time.time())
        self._settle_waiting(None)

    def _not_ready(self) -> None:
        self.backend = None

    def _settle_waiting(self, error: CorralError | None) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    def _failed(self, message: str) -> None:
        self._not_ready()
        self._set(ModelState.FAILED, error_message=message, load_progress=None, pid=None)
        self._events.emit("model.failed", f"{self.spec.id}: {message}", logging.ERROR, model=self.spec.id)
        self._settle_waiting(ModelFailed(f"{self.spec.id} has failed: {message}", retry_after=60))

    def _raise_if_hopeless(self) -> None:
        if self._closing:
            raise ShuttingDown("the service is shutting down", retry_after=5)
        status = self._board.models[self.spec.id]
        if status.state is ModelState.FAILED:
            raise ModelFailed(f"{self.spec.id} has failed: {status.error_message}", retry_after=60)

    async def _learn(self, backend: Backend) -> None:
        """Ask the server for its slots and context; one that does not tell is used with what is configured."""
        import msgspec

        with contextlib.suppress(CorralError, msgspec.DecodeError, KeyError, TypeError, ValueError):
            status, body = await backend.get("/props", 5)
            if status == 200:
                props = msgspec.json.decode(body)
                self.slots = int(props["total_slots"])
                self.ctx = int(props["default_generation_settings"]["n_ctx"]) or None

    async def _supervised(self) -> None:
        try:
            await self._live()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the owner of %s ended", self.spec.id)
            self._failed(f"internal error: {error}")
