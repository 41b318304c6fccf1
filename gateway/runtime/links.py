"""What one part of the house must hear of another, and the one timer for all that is looked at now and then."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any

from gateway.admission.queue import Queue
from gateway.metrics import Metrics
from gateway.state import ModelState
from gateway.stores.keys.ring import ReloadReport

if TYPE_CHECKING:
    from gateway.runtime import Runtime
    from gateway.stores.records.books import Books

log = logging.getLogger("corral.runtime")

TICK_SECONDS = 0.25


def connect_parts(runtime: Runtime) -> None:
    """What one part must hear of another."""
    board, metrics, landlord = runtime.board, runtime.metrics, runtime.manager.landlord

    def model_changed(model_id: str | None) -> None:
        if model_id is None or model_id not in board.models:
            return
        status = board.models[model_id]
        for state in ModelState:
            metrics.model_state.labels(model_id, state).set(state is status.state)
        booked = landlord.needs.get(model_id)
        metrics.model_vram.labels(model_id).set(landlord.budget.counted_bytes([booked]) if booked else 0)
        owner = runtime.manager.owners.get(model_id)
        slots = owner and (owner.spec.slots or owner.slots)
        if status.state is ModelState.READY and slots and not runtime.settings.max_concurrent_requests:
            runtime.queues[model_id].resize(slots)

    def keys_changed(report: ReloadReport) -> None:
        for problem in report.problems:
            log.warning("%s", problem)
        runtime.events.emit("keys.reloaded", f"{report.loaded} keys are loaded")

    loop = asyncio.get_running_loop()
    metrics.vram_budget.set_function(lambda: landlord.budget.in_all or 0)
    metrics.vram_used.set_function(lambda: landlord.used_bytes)
    metrics.tasks.set_function(lambda: len(asyncio.all_tasks(loop)))
    if runtime.settings.nats_url is None:
        metrics.registry.unregister(metrics.nats_up)  # a 0 would mean that NATS is away
    board.listen(model_changed)
    for model_id in board.models:
        model_changed(model_id)
    for problem in runtime.keys.report.problems:
        log.warning("%s", problem)
    runtime.keys.subscribe(keys_changed)


def watch_books(books: Books, metrics: Metrics) -> None:
    metrics.records_dropped.set(books.dropped)
    metrics.records_failing.set(books.database.problem is not None)


def make_gauges(metrics: Metrics, model_ids: Iterable[str]) -> None:
    for model_id in model_ids:
        for state in ModelState:
            metrics.model_state.labels(model_id, state)


def forget(model_id: str, queues: dict[str, Queue], metrics: Metrics) -> None:
    """A model that is not configured any more."""
    queues.pop(model_id, None)
    with contextlib.suppress(KeyError):
        metrics.queue_depth.remove(model_id)
    with contextlib.suppress(KeyError):
        metrics.model_vram.remove(model_id)
    for state in ModelState:
        with contextlib.suppress(KeyError):
            metrics.model_state.remove(model_id, state)


@contextlib.asynccontextmanager
async def ticking(ticks: list[Callable[[float], Any]], metrics: Metrics) -> AsyncIterator[None]:
    """One timer for all that is looked at now and then, instead of one for each request."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            metrics.loop_lag.observe(max(0.0, now - due))
            for tick in ticks:
                tick(now)

    task = asyncio.create_task(run(), name="ticker")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
