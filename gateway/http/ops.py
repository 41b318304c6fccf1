"""What operators and platforms ask without a key: liveness, readiness, health, metrics."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web

from gateway import metrics as exposition
from gateway.backend import Backend
from gateway.errors import CorralError
from gateway.http.context import RUNTIME
from gateway.runtime import Runtime
from gateway.state import ServiceState

SCRAPE_SECONDS = 1.0  # for a llama-server to show its own metrics
_PLATFORM_STATUS = {ServiceState.STARTING: 204, ServiceState.LOADING: 204, ServiceState.READY: 200}


async def ping(request: web.Request) -> web.Response:
    """The process lives. Where this port is the platform's health port too, its table holds (CONTRACT 2)."""
    runtime = request.app[RUNTIME]
    settings = runtime.settings
    if settings.port_health != settings.port or settings.health_mode == "liveness":
        return web.Response(text="pong")
    return web.Response(status=_PLATFORM_STATUS.get(runtime.board.status, 503))


async def healthz(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def readyz(request: web.Request) -> web.Response:
    status = request.app[RUNTIME].board.status
    if status is ServiceState.READY:
        return web.Response(text="ready")
    loading = status in (ServiceState.STARTING, ServiceState.LOADING)
    return web.Response(status=503, text="loading" if loading else str(status))


async def health(request: web.Request) -> web.Response:
    runtime = request.app[RUNTIME]
    board, settings = runtime.board, runtime.settings
    ready = board.status is ServiceState.READY
    body = {
        "status": "ok" if ready else str(board.status),
        "state": board.status,
        "since": board.since,
        "detail": board.detail,
        "models": {name: {"state": model.state, "slots": model.slots} for name, model in board.models.items()},
        "queue": queue_summary(runtime),
        "authentication": {"enabled": settings.auth_enabled, "keys": runtime.keys.view().keys},
        "uptime": round(time.time() - board.started_at, 3),
    }
    if runtime.shared is not None:
        body["redis"] = runtime.shared.view()
    return web.json_response(body, status=200 if ready else 503)


def queue_summary(runtime: Runtime) -> dict[str, int]:
    queues = runtime.queues.values()
    return {
        "max_concurrent": sum(queue.capacity for queue in queues),
        "max_queue_size": runtime.settings.max_queue_size,
        "active": sum(queue.active for queue in queues),
        "waiting": sum(queue.waiting for queue in queues),
    }


async def metrics(request: web.Request) -> web.Response:
    runtime = request.app[RUNTIME]
    if "application/json" in request.headers.get("Accept", ""):
        return web.json_response(runtime.metrics.as_json())
    own = runtime.metrics.render(with_keys=runtime.settings.metrics_auth_enabled)
    loaded = runtime.manager.loaded()  # only these: a scrape never wakes a sleeping model
    texts = await asyncio.gather(*(_scrape(backend) for backend in loaded.values()))
    theirs = exposition.merge(dict(zip(loaded, texts, strict=True)))
    return web.Response(body=own + theirs.encode(), headers={"Content-Type": exposition.CONTENT_TYPE})


async def _scrape(backend: Backend) -> str:
    try:
        status, body = await backend.get("/metrics", SCRAPE_SECONDS)
    except CorralError:
        return ""
    return body.decode(errors="replace") if status == 200 else ""
