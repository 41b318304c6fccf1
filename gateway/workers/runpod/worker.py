"""RunPod's queue: its SDK fetches jobs and reports what came of them, on the gateway's own loop.

The SDK's `start` would take over the process: a loop of its own, signal handlers, a forked heartbeat, prompts and
answers in a debug log, and a second's sleep before a place that has become free gets a job. So its parts are used one
by one, while the house, its signals and its end stay ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import sys
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gateway.environment import secret_named
from gateway.errors import ConfigError
from gateway.runtime import Runtime
from gateway.state import ServiceState
from gateway.workers.runpod.handler import Handler, Job

log = logging.getLogger("corral.runpod")

POLL_SECONDS = 90.0  # RunPod holds a question for a job open for less
LEAST_SECONDS = 0.25  # between two questions that bring nothing
REPORT_SECONDS = 5.0  # for the last answers to reach RunPod, after the grace
_LEVELS = {"ERROR": logging.ERROR, "WARN": logging.WARNING, "INFO": logging.DEBUG, "TIP": logging.DEBUG}
MISSING = "the runpod SDK is not installed: pip install 'corral[runpod]', or docker build --build-arg EXTRAS=runpod"


@dataclass(frozen=True)
class SDK:
    """The parts of RunPod's SDK that are used."""

    session: Callable[[], Any]  # an HTTP session with RunPod's credentials
    fetch: Callable[[Any, int], Awaitable[list[Job] | None]]  # asks for that many jobs; waits long
    handle: Callable[[Any, dict[str, Any], Job], Awaitable[object]]  # runs the handler, reports its outputs
    stops: Callable[[Any], Awaitable[list[str]]]  # the ids of jobs that are to be stopped; waits long
    progress: Callable[[Job, Any], None]
    heartbeat: Any
    jobs: Any  # those in progress, as heartbeats tell them
    mirror: Callable[[], Any]


def load_sdk() -> SDK:
    """Blocking: importing it takes most of a second. Raises ConfigError where it is not installed."""
    base = "runpod.serverless.modules"
    _spare_the_survey()
    try:
        job = importlib.import_module(f"{base}.rp_job")
        state = importlib.import_module(f"{base}.worker_state")
        ping = importlib.import_module(f"{base}.rp_ping")
        progress = importlib.import_module(f"{base}.rp_progress")
        client = importlib.import_module("runpod.http_client")
    except ImportError as error:
        raise ConfigError([MISSING if error.name == "runpod" else f"{MISSING} ({error})"]) from None
    _quieten(importlib.import_module(f"{base}.rp_logger").RunPodLogger)
    return SDK(
        client.AsyncClientSession,
        job.get_job,
        job.handle_job,
        job.get_stop_signals,
        progress.progress_update,
        ping.Heartbeat,
        state.JobsProgress(),
        state.PingJobMirror,
    )


def _spare_the_survey() -> None:
    """At its import the SDK looks for more than a second at what processor this is; only its debugger would show it."""
    survey = types.ModuleType("cpuinfo")
    survey.get_cpu_info = lambda: {"brand_raw": "unknown"}  # type: ignore[attr-defined]
    sys.modules.setdefault("cpuinfo", survey)


def _quieten(logger: Any) -> None:
    """The SDK prints, and its debug lines hold prompts and answers. What else it says goes to our log, masked."""

    def write(_: object, message: object, message_level: str = "INFO", job_id: str | None = None) -> None:
        if message_level in _LEVELS:
            log.log(_LEVELS[message_level], "%s", message, extra={"request_id": job_id})

    logger.log = write


async def take_jobs(runtime: Runtime, stop: asyncio.Event, hurry: asyncio.Event) -> int:
    """Takes jobs from when the service is ready until `stop`, then finishes those that run; the exit code.

    It is 1 where no model can be loaded: RunPod gives the jobs to other workers, and this one up. Raises ConfigError.
    """
    if key := secret_named("RUNPOD_AI_API_KEY"):
        runtime.logs.add_secret(key)
    sdk = await asyncio.to_thread(load_sdk)
    _start_heartbeat(sdk)
    ready, failed = asyncio.Event(), asyncio.Event()
    with _watched(runtime, ready, failed):
        await _first_of(ready, failed, stop)
        if not ready.is_set():
            return _outcome(runtime, failed)
        runtime.events.emit("server.ready", "taking jobs from RunPod's queue")
        async with _taking(runtime, sdk, hurry) as taking:
            taking.add_done_callback(lambda _: stop.set())  # it never ends by itself
            await _first_of(stop, failed)
            code = _outcome(runtime, failed)
            if taking.done():
                taking.result()
        return code


def _outcome(runtime: Runtime, failed: asyncio.Event) -> int:
    if failed.is_set():
        log.error("no jobs are taken any more, this worker ends: %s", runtime.board.detail)
    return int(failed.is_set())


@contextlib.contextmanager
def _watched(runtime: Runtime, ready: asyncio.Event, failed: asyncio.Event) -> Iterator[None]:
    def changed(_: str | None) -> None:
        if runtime.board.status is ServiceState.READY:
            ready.set()
        elif runtime.board.status is ServiceState.FAILED:
            failed.set()

    stop_watching = runtime.board.listen(changed)
    changed(None)
    try:
        yield
    finally:
        stop_watching()


async def _first_of(*events: asyncio.Event) -> asyncio.Event:
    """The first of them that is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    return next(event for event in events if event.is_set())


def _start_heartbeat(sdk: SDK) -> None:
    """In a thread: the SDK's own way is a fork, which other threads and a loop do not survive well."""
    if not secret_named("RUNPOD_AI_API_KEY") or sdk.heartbeat().PING_URL == "PING_NOT_SET":
        return
    mirror = sdk.mirror()
    sdk.jobs.set_mirror(mirror)
    threading.Thread(target=sdk.heartbeat.process_loop, args=(mirror,), name="runpod heartbeat", daemon=True).start()


class Taker:
    """Takes a job whenever a place is free, and stops those that RunPod says to stop."""

    def __init__(self, sdk: SDK, handler: Handler, session: Any) -> None:
        self._sdk, self._handler, self._session = sdk, handler, session
        # With the aggregate, /runsync and /status have the whole of a stream.
        self._config = {"handler": handler.handle, "return_aggregate_stream": True, "rp_args": {}}
        self.running: dict[str, asyncio.Task[None]] = {}

    async def take(self) -> None:
        """For ever; one that is cancelled in here has no job."""
        fetch = _Patient(lambda: self._sdk.fetch(self._session, self._handler.places() - len(self.running)))
        while True:
            if self._handler.places() <= len(self.running):
                await asyncio.wait(self.running.values(), timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                continue
            asked_at = asyncio.get_running_loop().time()
            jobs = await fetch.ask() or ()
            for job in jobs:
                self._begin(job)
            if not jobs:  # RunPod holds a question open; where it does not, it would be asked without end
                await asyncio.sleep(max(0.0, asked_at + LEAST_SECONDS - asyncio.get_running_loop().time()))

    async def hear_stops(self) -> None:
        hear = _Patient(lambda: self._sdk.stops(self._session))
        while True:
            stops = await hear.ask() or ()
            for job_id in stops:
                if job_id in self.running:
                    log.info("RunPod stops the job", extra={"request_id": job_id})
                    self.running[job_id].cancel()
            if not stops:
                await asyncio.sleep(1)

    def _begin(self, job: Job) -> None:
        if not isinstance(job, dict) or not isinstance(job.get("id"), str) or job["id"] in self.running:
            log.error("RunPod sent a job without an id, or one that runs already")
            return
        self._sdk.jobs.add(job)
        task = asyncio.create_task(self._run(job), name=f"runpod job {job['id']}")
        self.running[job["id"]] = task
        task.add_done_callback(lambda _: self._end(job))

    def _end(self, job: Job) -> None:
        self._sdk.jobs.remove(job)
        del self.running[job["id"]]

    async def _run(self, job: Job) -> None:
        try:
            await self._sdk.handle(self._session, self._config, job)
        except Exception:  # one job's report; the others go on
            log.exception("RunPod could not be told of a job's end", extra={"request_id": job["id"]})


class _Patient:
    """Asks RunPod again and again, with pauses that grow while it fails."""

    def __init__(self, question: Callable[[], Awaitable[Any]]) -> None:
        self._question = question
        self._failures = 0

    async def ask(self) -> Any:
        """None where there is no answer, or none in time."""
        try:
            async with asyncio.timeout(POLL_SECONDS):
                answer = await self._question()
        except TimeoutError:
            return None
        except Exception as error:  # whatever the SDK lets through: the worker has to go on asking
            self._failures += 1
            pause = 5.0 if getattr(error, "status", None) == 429 else min(30.0, 0.5 * 2**self._failures)
            log.warning("RunPod does not answer (%s); it is asked again in %g s", type(error).__name__, pause)
            await asyncio.sleep(pause)
            return None
        self._failures = 0
        return answer


@contextlib.asynccontextmanager
async def _taking(runtime: Runtime, sdk: SDK, hurry: asyncio.Event) -> AsyncIterator[asyncio.Task[None]]:
    """Jobs are taken inside the block. At its end those that run may finish; what the grace cuts is told RunPod."""
    async with sdk.session() as session:
        taker = Taker(sdk, Handler(runtime, sdk.progress), session)
        taking = asyncio.create_task(taker.take(), name="runpod queue")
        stopping = asyncio.create_task(taker.hear_stops(), name="runpod stops")
        try:
            yield taking
        finally:
            taking.cancel()
            try:
                await _drain(runtime, taker, hurry)
            finally:
                tasks: set[asyncio.Task[None]] = {taking, stopping, *taker.running.values()}
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)


async def _drain(runtime: Runtime, taker: Taker, hurry: asyncio.Event) -> None:
    """Unlike HTTP's clients, RunPod never asks again; so jobs that wait in the queue may run too."""
    active, grace = len(taker.running), runtime.settings.shutdown_grace_seconds
    runtime.board.set_service(ServiceState.DRAINING, f"{active} jobs are running")
    runtime.events.emit("server.draining", f"{active} running jobs have {grace:g} s to finish")
    if not await _ended(taker, grace, hurry):
        for queue in runtime.queues.values():
            queue.close()
        await runtime.spine.cut()
        await _ended(taker, REPORT_SECONDS, hurry)


async def _ended(taker: Taker, seconds: float, hurry: asyncio.Event) -> bool:
    """Whether all jobs end within so many seconds, and before `hurry`."""
    if not taker.running:
        return True
    ends = asyncio.gather(*taker.running.values(), return_exceptions=True)
    hurried = asyncio.ensure_future(hurry.wait())
    waits: set[asyncio.Future[Any]] = {ends, hurried}
    await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    hurried.cancel()
    return ends.done()
