"""One model and the one task that owns its state. Others hold leases and ask; only the owner acts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from abc import ABC, abstractmethod
from typing import Any

from gateway.backend import Backend
from gateway.errors import BadRequest, CorralError, ModelFailed, ModelLoading, ShuttingDown
from gateway.events import Events
from gateway.models.fingerprint import Stamp, as_it_lies
from gateway.models.registry import ModelSpec
from gateway.state import Board, ModelState

log = logging.getLogger("corral.models")

# what is not known of a model that has no server
GONE: dict[str, None] = {"load_progress": None, "pid": None, "port": None, "detail": None, "vram_used_mb": None}


class Lease:
    """A request's hold on a model, from before the model is chosen until the answer's last byte."""

    __slots__ = ("_owner", "generation")

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self.generation = 0

    async def __aenter__(self) -> Lease:
        self._owner.lease_taken()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._owner.lease_ended(self.generation)

    @property
    def ctx(self) -> int | None:
        """The model's context of one request, tokens, where it is known."""
        return self._owner.ctx

    @property
    def loading(self) -> bool:
        """Whether `backend` would have to wait."""
        return self._owner.backend is None

    async def backend(self, deadline: float) -> Backend:
        """The model's server, loaded if need be; `deadline` is on the loop's clock.

        Raises ModelLoading at the deadline, InsufficientMemory, ModelFailed, ShuttingDown.
        """
        owner = self._owner
        backend = owner.backend
        if backend is None:
            backend = await owner.wait_ready(deadline)
        if self.generation != owner.generation:
            self.generation = owner.generation
            owner.serving += 1
        return backend

    async def died(self) -> bool:
        """After a connection broke: whether this lease's server has crashed.

        It has not if only that connection broke, or if the server was unloaded without waiting.
        """
        if self._owner.unloaded == self.generation:
            return False
        await self._owner.notice_death(self.generation)
        return self._owner.backend is None or self._owner.generation != self.generation


class Owner(ABC):
    """State, leases and readiness of one model; a subclass says how its server comes to be."""

    def __init__(self, spec: ModelSpec, board: Board, events: Events) -> None:
        self.spec = spec
        self.backend: Backend | None = None  # there exactly while the model is ready
        self.generation = 0  # counts the servers that this model has had
        self.unloaded = 0  # the last of them that was unloaded on purpose
        self.leases = 0
        self.evictions = 0
        self.serving = 0  # the leases that have got the server of this generation
        self.slots: int | None = None
        self.ctx: int | None = None  # of one request, tokens, as the server itself reports it
        self.started_as: str | None = None  # what its server was started from, as `lies_as` told it then
        self.last_used = time.monotonic()
        self.kept = False  # loaded without being asked for, and again after a crash
        self._board, self._events = board, events
        self._waiting: set[asyncio.Future[None]] = set()
        self._wake = asyncio.Event()
        self._free: asyncio.Event | None = None
        self._stir = asyncio.Event()  # set when it is loaded, is off, or nobody uses it any more
        self._wanted = False
        self._closing = False
        self._refusal: type[CorralError] = ModelFailed
        self._task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def state(self) -> ModelState:
        return self._board.models[self.spec.id].state

    @property
    def detail(self) -> str | None:
        return self._board.models[self.spec.id].detail

    def lease(self) -> Lease:
        return Lease(self)

    def lease_taken(self) -> None:
        self.leases += 1
        self.want()

    def lease_ended(self, generation: int) -> None:
        """`generation` is that of the server which it had got, 0 for none."""
        self.leases -= 1
        if generation and generation == self.generation:
            self.serving -= 1
        self.last_used = time.monotonic()
        self._board.models[self.spec.id].last_used_at = time.time()
        if not self.leases:
            self._unused()
            if self._free is not None:
                self._free.set()

    async def unused(self) -> None:
        """Until nobody holds a lease."""
        self._free = asyncio.Event()
        while self.leases:
            self._free.clear()
            await self._free.wait()
        self._free = None

    def want(self) -> None:
        """Ask for the model to be loaded; returns at once."""
        if not self._wanted:
            self._wanted = True
            self._wake.set()

    @abstractmethod
    def lies_as(self, stamp: Stamp = as_it_lies) -> str | None:
        """What a server that is started now would be started from; None where that cannot be told. Blocking.

        An answer of a server whose `started_as` is another one is not this model's as it is now.
        """

    def load(self) -> None:
        """Ask for the model to be loaded although no request waits for it; returns at once."""
        self.want()

    def change(self, spec: ModelSpec) -> None:
        """It is configured otherwise: what runs goes on, and what starts from now on is as `spec` says."""
        self.spec = spec

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
            self._set(ModelState.OFF, **GONE)

    def leave_board(self) -> None:
        """Another one stands for this model from now on: nobody need know what happens to this one until its end."""
        self._board = Board()
        self._board.add_model(self.spec.id, required=False)

    async def wait_ready(self, deadline: float) -> Backend:
        """Wait for the load that all who wait share."""
        while self.backend is None:
            self._raise_if_hopeless()
            self.want()
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                async with asyncio.timeout_at(deadline):
                    await waiter
            except TimeoutError:
                raise self._too_late() from None
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

    async def eject(self, force: bool) -> None:
        """Unload it when its running requests have come to their ends, or, with `force`, at once.

        Returns when it is off; requests that come meanwhile load it again. Raises BadRequest.
        """
        raise BadRequest(f"{self.spec.id} is served by another machine: it cannot be unloaded from here")

    @abstractmethod
    def reset(self) -> None:
        """What failed is off again, and may be tried anew."""

    async def look_again(self) -> str | None:
        """What speaks against this model before it is tried, by now."""
        spec = self.spec
        if spec.problem and spec.look_again is not None:
            seen = await asyncio.to_thread(spec.look_again)
            if self.spec is spec:  # else it was configured otherwise meanwhile
                self.spec = seen
        return self.spec.problem

    # --- for subclasses

    @abstractmethod
    def _unused(self) -> None:
        """The last lease has ended."""

    def _too_late(self) -> CorralError:
        """For one whose deadline came before the model was ready."""
        progress = self._board.models[self.spec.id].load_progress
        about = f" ({progress:.0%} loaded)" if progress else ""
        return ModelLoading(f"{self.spec.id} is still loading{about}", retry_after=5)

    def _set(self, state: ModelState, **changes: Any) -> None:
        self._board.set_model(self.spec.id, state, **changes)

    async def _ready(self, backend: Backend) -> None:
        await self._learn(backend)
        self.generation += 1
        self.serving = 0
        self.last_used = time.monotonic()
        self.backend = backend
        self._set(ModelState.READY, load_progress=1.0, error_message=None, slots=self.slots, started_at=time.time())
        self._settle_waiting(None)

    def _not_ready(self) -> None:
        self.backend = None

    def _settle_waiting(self, error: CorralError | None) -> None:
        self._stir.set()
        for waiter in self._waiting:
            if not waiter.done():
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(error)

    def _failed(self, message: str, refusal: type[CorralError] = ModelFailed) -> None:
        """`refusal` is what requests are told until it is tried again."""
        self._refusal = refusal
        self._not_ready()
        self._wanted = False
        self._set(ModelState.FAILED, error_message=message, **GONE)
        self._events.emit("model.failed", f"{self.spec.id}: {message}", logging.ERROR, model=self.spec.id)
        self._settle_waiting(refusal(f"{self.spec.id} has failed: {message}", retry_after=60))

    def _raise_if_hopeless(self) -> None:
        if self._closing:
            raise ShuttingDown("the service is shutting down", retry_after=5)
        status = self._board.models[self.spec.id]
        if status.state is ModelState.FAILED:
            raise self._refusal(f"{self.spec.id} has failed: {status.error_message}", retry_after=60)

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
        while True:
            try:
                return await self._live()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.exception("the owner of %s stumbled", self.spec.id)
                self._failed(f"internal error: {error}")
            while self.state is ModelState.FAILED:  # a reset lets it live again
                self._wake.clear()
                await self._wake.wait()
