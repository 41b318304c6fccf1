"""What the models do: their states, memory and queues, in the shapes that clients know, and a stream of the changes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from gateway.http import sse
from gateway.http.context import KEY, RUNTIME
from gateway.http.visible import named_model, visible_models
from gateway.models.overview import MemoryView
from gateway.runtime import Runtime
from gateway.state import Board, ModelState, ModelStatus, ServiceState
from gateway.stores.keys.file import Key
from gateway.stores.keys.ring import presented

_LOADING = (ModelState.DOWNLOADING, ModelState.STARTING, ModelState.LOADING)
_BROKEN = (ModelState.FAILED, ModelState.CRASHED)
ENDING = (ServiceState.DRAINING, ServiceState.STOPPED)


async def instances(request: web.Request) -> web.Response:
    """GET /status."""
    runtime = request.app[RUNTIME]
    board, memory = runtime.board, runtime.manager.memory()
    shown = visible_models(request)
    need = {row.id: row.measured_mb if row.measured_mb is not None else row.predicted_mb for row in memory.models}
    troubled = [status for status in shown.values() if status.error_message]
    last = max(troubled, key=lambda status: status.updated_at, default=None)
    body = {
        "instances": [instance(runtime, name, status, need.get(name)) for name, status in shown.items()],
        "budget_mb": memory.budget_mb,
        "used_est_mb": memory.used_est_mb,
        "margin_mb": memory.margin_mb,
        "state": board.status,
        "last_error": f"{last.alias}: {last.error_message}" if last else None,
        "uptime_seconds": round(time.time() - board.started_at, 3),
        "server_time_unix": time.time(),
        "evictions_total": runtime.manager.evictions_total,
        "loads_total": runtime.manager.loads_total,
        "warmups_in_progress": sum(status.state in _LOADING for status in shown.values()),
        "draining_count": sum(status.state is ModelState.STOPPING for status in shown.values()),
        "key": {"id": request[KEY].id, "scopes": sorted(request[KEY].scopes), "expires_unix": request[KEY].expires},
    }
    return web.json_response(body)


def instance(runtime: Runtime, name: str, status: ModelStatus, need_mb: int | None) -> dict[str, Any]:
    queue = runtime.queues.get(name)  # one that was taken out of the configuration has none any more
    return {
        "model_id": name,
        "state": status.state,
        "last_used_unix": status.last_used_at,
        "est_vram_mb": status.vram_used_mb if status.vram_used_mb is not None else need_mb,
        "queue_len": queue.waiting if queue else 0,
        "inflight": queue.active if queue else 0,
        "max_queue_depth": queue.max_waiting if queue else 0,
        "port": status.port,
        "pid": status.pid,
    }


async def all_status(request: web.Request) -> web.Response:
    return web.json_response(full_status(request.app[RUNTIME].board, visible_models(request)))


async def one_status(request: web.Request) -> web.Response:
    spec = named_model(request, request.match_info["model"])
    return web.json_response(status_row(request.app[RUNTIME].board.models[spec.id]))


async def status_file(request: web.Request) -> web.Response:
    """What STATE_FILE holds for the health server, but for the models that this key may not use."""
    board = request.app[RUNTIME].board
    models = {name: status.as_json() for name, status in visible_models(request).items()}
    about = {"heartbeat": time.monotonic(), "pid": os.getpid()}
    return web.json_response(board.snapshot() | {"models": models} | about)


async def failed(request: web.Request) -> web.Response:
    rows = {name: status_row(one) for name, one in visible_models(request).items() if one.state is ModelState.FAILED}
    return web.json_response({"failed": rows, "total": len(rows)})


async def health_models(request: web.Request) -> web.Response:
    body = health_body(visible_models(request))
    return web.json_response(body, status=503 if body["status"] == "failed" else 200)


def health_body(models: Mapping[str, ModelStatus]) -> dict[str, Any]:
    """An unloaded model is well, since a request loads it; `failed` where there are models and none can be used."""
    rows = {
        name: {"status": one.state, "healthy": one.state not in _BROKEN, "error_message": one.error_message}
        for name, one in models.items()
    }
    healthy = sum(one.state not in _BROKEN for one in models.values())
    verdict = "ok" if healthy == len(rows) else "degraded" if healthy else "failed"
    return {"status": verdict, "healthy": healthy, "total": len(rows), "models": rows}


async def queue_stats(request: web.Request) -> web.Response:
    runtime = request.app[RUNTIME]
    per_model = {
        name: {
            "queued": queue.waiting,
            "processing": queue.active,
            "max_concurrent": queue.capacity,
            "max_queue_size": queue.max_waiting,
            "processed": queue.processed_total,
            "rejected": queue.rejected_total,
        }
        for name, queue in runtime.queues.items()
        if request[KEY].may_use(name)
    }
    totals = ("queued", "processing", "processed", "rejected")
    summary = {f"total_{name}": sum(row[name] for row in per_model.values()) for name in totals}
    return web.json_response({"summary": summary, "per_model": per_model})


async def vram(request: web.Request) -> web.Response:
    manager = request.app[RUNTIME].manager
    await manager.look()
    return web.json_response(vram_body(manager.memory(), request[KEY]))


def vram_body(memory: MemoryView, key: Key) -> dict[str, Any]:
    """`gpu_info` sums up all GPUs; where there is none, RAM is what models compete for."""
    devices = [one for one in memory.devices if one.name != "RAM"] or list(memory.devices)
    total, used = sum(one.total_mb for one in devices), sum(one.used_mb for one in devices)
    return {
        "gpu_info": {
            "total_mb": total,
            "used_mb": used,
            "free_mb": sum(one.free_mb for one in devices),
            "usage_percentage": round(100 * used / total, 1) if total else 0.0,
        },
        "budget_mb": memory.budget_mb,
        "margin_mb": memory.margin_mb,
        "used_est_mb": memory.used_est_mb,
        "models": [dataclasses.asdict(row) for row in memory.models if key.may_use(row.id)],
        "devices": [dataclasses.asdict(row) for row in memory.devices],
        "can_load_more": memory.can_load_more,
        "status": "ok" if memory.can_load_more else "full",
    }


async def stream(request: web.Request) -> web.StreamResponse:
    """The state of all models, then each change. It ends when the service drains, and when the key has lost its right.

    A reader that is too slow misses states in between, never the last one.
    """
    board = request.app[RUNTIME].board
    response = web.StreamResponse(headers=sse.HEADERS)
    with sse.Changes(board) as changes:  # from before the first look, so that nothing is missed after it
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        shown: frozenset[str] | None = None
        said, names = board.status, set[str | None]((None,))
        clock = asyncio.get_running_loop().time
        beat = clock() + sse.HEARTBEAT_SECONDS
        while (key := current_key(request)) is not None:
            ending = board.status in ENDING  # looked at before it is told, or what comes meanwhile would get lost
            models = {name: status for name, status in board.models.items() if key.may_use(name)}
            if shown != models.keys():
                news = sse.event("full_status", full_status(board, models))
            else:
                news = updates(names, models, server_row(board) if board.status is not said else None)
            shown, said = frozenset(models), board.status
            if news:
                await response.write(news)
            if clock() >= beat:
                about = {"timestamp": iso(time.time()), "server_status": board.status}
                await response.write(sse.event("heartbeat", about))
                beat = clock() + sse.HEARTBEAT_SECONDS
            if ending:
                break
            names = await changes.take(max(0.0, beat - clock()))
    await response.write_eof()
    return response


def updates(names: set[str | None], models: Mapping[str, ModelStatus], server: Mapping[str, Any] | None) -> bytes:
    """The events for what has changed; `server` is None where nothing about the service has."""
    events = [
        sse.event("model_update", {"id": name, **status_row(models[name]), "detail": models[name].detail})
        for name in sorted(filter(None, names))
        if name in models
    ]
    if server is not None:
        events.append(sse.event("server_update", server))
    return b"".join(events)


def current_key(request: web.Request, scope: str = "infer") -> Key | None:
    """The key of a request that lasts: None if it has been taken back, has expired or may no longer look."""
    runtime = request.app[RUNTIME]
    if not runtime.settings.auth_enabled:
        return request[KEY]
    secret = presented(request.headers.get("Authorization"), request.headers.get("x-api-key"))
    key = runtime.keys.lookup(secret) if secret else None
    return key if key is not None and key.has(scope) else None


def full_status(board: Board, models: Mapping[str, ModelStatus]) -> dict[str, Any]:
    by_status: dict[str, int] = {}
    for status in models.values():
        by_status[status.state] = by_status.get(status.state, 0) + 1
    return {
        "server": server_row(board),
        "models": {name: status_row(status) for name, status in models.items()},
        "summary": {"total": len(models), "by_status": by_status},
    }


def server_row(board: Board) -> dict[str, Any]:
    return {
        "status": board.status,
        "started_at": iso(board.started_at),
        "updated_at": iso(time.time()),
    }


def status_row(status: ModelStatus) -> dict[str, Any]:
    return {
        "alias": status.alias,
        "status": status.state,
        "port": status.port,
        "started_at": iso(status.started_at),
        "last_used_at": iso(status.last_used_at),
        "load_progress": status.load_progress,
        "error_message": status.error_message,
        "vram_used_mb": status.vram_used_mb,
        "updated_at": iso(status.updated_at),
    }


def iso(at: float | None) -> str | None:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds") if at is not None else None
