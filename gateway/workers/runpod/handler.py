"""The handler that RunPod's SDK calls with each job: one call through the spine, its answer as the job's output."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from gateway.errors import CorralError, ExpiredKey, InsufficientScope, ModelNotFound, ShuttingDown
from gateway.pipeline.account import Record
from gateway.pipeline.call import Call
from gateway.pipeline.events import collected, events_of
from gateway.pipeline.frames import Frame
from gateway.pipeline.identity import identity, sane_id
from gateway.pipeline.plain import trace_of
from gateway.pipeline.routes import ROUTES
from gateway.pipeline.usage import NO_USAGE, Usage
from gateway.runtime import Runtime
from gateway.state import ModelState
from gateway.stores.keys.file import Key
from gateway.workers.refusals import Refused, note
from gateway.workers.runpod.jobs import Asked, failure, read_job, route_of, shape_of

log = logging.getLogger("corral.runpod")

KEY_ID = "runpod"
# RunPod has checked its own key, and would fail a job that a limit refuses, so there is none unless one is set.
UNLIMITED = Key(KEY_ID, rpm=0, tpm=0)
PROGRESS_SECONDS = 1.0  # of silence, before a client is told what its job waits for
MOST_WAITING = 256  # events that RunPod has not taken yet; then llama-server's connection is read no further

Job = dict[str, Any]
Tell = Callable[[Job, dict[str, Any]], None]


class _Run:
    """One job's call, in a task of its own: the SDK forgets its generators where it stops a job.

    What comes of it is taken in heaps: one event where the taker is faster, all that wait where it is slower. That
    matters because RunPod's own answer to each part of a stream takes longer than a token.
    """

    def __init__(self, runtime: Runtime, call: Call) -> None:
        self.call = call
        self.usage: Usage = NO_USAGE
        self.seconds = 0.0
        self._runtime = runtime
        self._left = False
        self._waiting: asyncio.Queue[Frame | CorralError | None] = asyncio.Queue(MOST_WAITING)
        self.task = asyncio.create_task(self._run(), name=f"job {call.request_id}")

    def leave(self, _: object = None) -> None:
        """Nobody waits for it any more: it ends, and its slot becomes free."""
        self._left = True
        self.task.cancel()

    async def left(self) -> None:
        self.leave()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({self.task})

    async def heap(self) -> list[Frame]:
        """Empty at the end. Raises CorralError."""
        found: list[Frame] = []
        item = await self._waiting.get()
        while isinstance(item, Frame):
            found.append(item)
            if self._waiting.empty():
                return found
            item = self._waiting.get_nowait()
        if found:  # the end is for the next one who asks
            await self._waiting.put(item)
            return found
        if item is not None:
            raise item
        return found

    async def _run(self) -> None:
        end: CorralError | None = None
        try:
            await self._follow()
        except CorralError as error:
            end = error
        except asyncio.CancelledError:
            if self._left:
                raise
            end = ShuttingDown("the service is shutting down", retry_after=5)
        except Exception:
            log.exception("a job broke off", extra={"request_id": self.call.request_id})
            end = CorralError("something went wrong inside the gateway")
        await self._waiting.put(end)

    async def _follow(self) -> None:
        spine, meter = self._runtime.spine, self._runtime.accounts.meter(self.call.places)
        if not self.call.stream:
            answer, record = await collected(spine, self.call, meter)
            self._took(record)
            await self._waiting.put(Frame(None, answer.body))
            return
        async with events_of(spine, self.call, meter) as events:
            async for frame in events:
                await self._waiting.put(frame)
            if events.record is not None:
                self._took(events.record)

    def _took(self, record: Record) -> None:
        self.usage, self.seconds = record.told, record.duration_ms / 1000


class Handler:
    """`handle` is what the SDK gets; `tell` shows a client how far its job is."""

    def __init__(self, runtime: Runtime, tell: Tell | None = None) -> None:
        self._runtime = runtime
        self._tell = tell

    def places(self) -> int:
        """How many jobs to have at once: the places of the models that are loaded, or else of the smallest one."""
        models, queues = self._runtime.board.models, self._runtime.queues
        ready = [queue.capacity for name, queue in queues.items() if models[name].state is ModelState.READY]
        return max(1, sum(ready) or min((queue.capacity for queue in queues.values()), default=1))

    async def handle(self, job: Job) -> AsyncIterator[Any]:
        """The job's outputs; what went wrong is one too, `{"error": …}`, at which the SDK fails the job."""
        try:
            asked = read_job(job.get("input"), self._runtime.settings.max_request_body_size)
            if asked.models:
                yield self._models()
                return
            call = self._call(asked, str(job.get("id", "")))
        except CorralError as error:
            told = Refused("runpod", str(job.get("id", "")), KEY_ID, route_of(job.get("input")))
            note(self._runtime, told, error)
            yield failure(error)
            return
        run = _Run(self._runtime, call)
        sdk_task = asyncio.current_task()
        assert sdk_task is not None
        sdk_task.add_done_callback(run.leave)
        try:
            shape = shape_of(asked, call)
            frames = await self._first(run, job)
            while frames:
                if (part := shape.take(frames)) is not None:
                    yield part
                frames = await run.heap()
            if (last := shape.end(run.usage, run.seconds)) is not None:
                yield last
        except CorralError as error:
            yield failure(error)
        finally:
            sdk_task.remove_done_callback(run.leave)
            await run.left()

    def _call(self, asked: Asked, job_id: str) -> Call:
        """Raises BadRequest, InvalidJSON, ExpiredKey, InsufficientScope."""
        key = self._key()
        plain = asked.plain
        request_id, traceparent = identity((plain and plain.req_id) or sane_id(job_id), None)
        if plain is not None and plain.trace_id is not None:
            traceparent = trace_of(plain.trace_id, traceparent)
        call = Call(
            route=ROUTES["/v1/chat/completions"],
            key=key,
            caller=key.id,
            request_id=request_id,
            traceparent=traceparent,
            received_at=asyncio.get_running_loop().time(),
            model=None,
            fields={},
            size=asked.size,
            transport="runpod",
        )
        asked.fill(call)
        return call

    def _key(self) -> Key:
        keys = self._runtime.keys
        key = keys.by_id(KEY_ID)
        if key is None and keys.knows(KEY_ID):  # what it forbade does not become allowed
            raise ExpiredKey(f"the key {KEY_ID}, on which jobs count, has expired")
        key = key or UNLIMITED
        if not key.has("infer"):
            raise InsufficientScope(f"the key {KEY_ID} lacks the scope infer")
        return key

    def _models(self) -> dict[str, Any]:
        key, board = self._key(), self._runtime.board
        rows = [
            {
                "id": name,
                "object": "model",
                "created": int(board.started_at),
                "owned_by": "corral",
                "status": board.models[name].state,
            }
            for name in self._runtime.manager.registry.specs
            if key.may_use(name)
        ]
        return {"object": "list", "data": rows}

    async def _first(self, run: _Run, job: Job) -> list[Frame]:
        """The first events. As long as there are none, the client is told what its job waits for."""
        first = asyncio.ensure_future(run.heap())
        told = None
        try:
            while not (await asyncio.wait({first}, timeout=PROGRESS_SECONDS))[0]:
                now = self._waits_for(run.call)
                if self._tell is not None and now != told:
                    self._tell(job, now)
                told = now
            return await first
        finally:
            first.cancel()

    def _waits_for(self, call: Call) -> dict[str, Any]:
        runtime = self._runtime
        try:
            model = runtime.manager.registry.resolve(call.model).id
        except ModelNotFound:  # a reload has taken it away
            return {"state": "queued"}
        status = runtime.board.models[model]
        if status.state is not ModelState.READY:
            progress = status.load_progress
            return {"state": "loading", "model": model, "progress": progress and round(progress, 1)}
        return {"state": "queued" if runtime.queues[model].waiting else "running", "model": model}
