"""What a key may see of the models and of their state."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import UTC, datetime
from typing import Any

from aiohttp import web

from gateway.errors import ModelNotFound
from gateway.http.context import KEY, RUNTIME
from gateway.models.registry import ModelSpec
from gateway.runtime import Runtime
from gateway.state import ModelStatus, ServiceState

_QUANT = re.compile(r"(?:^|[-_.])((?:I?Q\d|TQ\d|MXFP\d|BF16|F16|F32)[A-Z0-9_]*)$", re.IGNORECASE)


async def list_models(request: web.Request) -> web.Response:
    runtime, key = request.app[RUNTIME], request[KEY]
    specs = [spec for spec in runtime.manager.registry.specs.values() if key.may_use(spec.id)]
    return web.json_response({"object": "list", "data": [_openai_model(runtime, spec) for spec in specs]})


async def get_model(request: web.Request) -> web.Response:
    runtime = request.app[RUNTIME]
    return web.json_response(_openai_model(runtime, _named(request)))


async def list_files(request: web.Request) -> web.Response:
    """GET /models, the shape of an earlier system."""
    runtime, key = request.app[RUNTIME], request[KEY]
    rows = []
    for spec in runtime.manager.registry.specs.values():
        if not key.may_use(spec.id):
            continue
        name = spec.path.name if spec.path else spec.id
        quant = _QUANT.search(name.removesuffix(".gguf"))
        family = re.split(r"[-_.\d]", name, maxsplit=1)[0].lower()
        rows.append(
            {
                "id": spec.id,
                "name": name,
                "path": str(spec.path) if spec.path else None,
                "quant": quant[1].upper() if quant else None,
                "family": family or None,
            }
        )
    return web.json_response({"models": rows})


async def instances(request: web.Request) -> web.Response:
    """GET /status, the shape of an earlier system."""
    runtime = request.app[RUNTIME]
    board = runtime.board
    rows = []
    for model_id, status in visible(request).items():
        queue = runtime.queues[model_id]
        rows.append(
            {
                "model_id": model_id,
                "state": status.state,
                "last_used_unix": status.last_used_at,
                "est_vram_mb": status.vram_used_mb,
                "queue_len": queue.waiting,
                "inflight": queue.active,
                "max_queue_depth": runtime.settings.max_queue_size,
                "port": status.port,
                "pid": status.pid,
            }
        )
    errors = [status.error_message for status in board.models.values() if status.error_message]
    body = {
        "instances": rows,
        "budget_mb": runtime.settings.vram_budget_mb,
        "used_est_mb": sum(status.vram_used_mb or 0 for status in board.models.values()),
        "margin_mb": runtime.settings.vram_margin_mb,
        "state": board.status,
        "last_error": errors[-1] if errors else None,
        "uptime_seconds": round(time.time() - board.started_at, 3),
        "server_time_unix": time.time(),
        "evictions_total": int(runtime.metrics.value(runtime.metrics.evictions)),
        "loads_total": sum(owner.generation for owner in runtime.manager.owners.values()),
        "warmups_in_progress": sum(status.state in ("starting", "loading") for status in board.models.values()),
        "draining_count": int(board.status is ServiceState.DRAINING),
    }
    return web.json_response(body)


async def all_status(request: web.Request) -> web.Response:
    return web.json_response(full_status(request.app[RUNTIME], visible(request)))


async def one_status(request: web.Request) -> web.Response:
    spec = _named(request)
    return web.json_response(status_row(request.app[RUNTIME].board.models[spec.id]))


async def failed(request: web.Request) -> web.Response:
    rows = {name: status_row(status) for name, status in visible(request).items() if status.state == "failed"}
    return web.json_response({"failed": rows, "total": len(rows)})


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
    summary = {
        f"total_{out}": sum(row[name] for row in per_model.values())
        for out, name in (
            ("queued", "queued"),
            ("processing", "processing"),
            ("processed", "processed"),
            ("rejected", "rejected"),
        )
    }
    return web.json_response({"summary": summary, "per_model": per_model})


def full_status(runtime: Runtime, models: dict[str, ModelStatus]) -> dict[str, Any]:
    by_status: dict[str, int] = {}
    for status in models.values():
        by_status[status.state] = by_status.get(status.state, 0) + 1
    board = runtime.board
    return {
        "server": {"status": board.status, "started_at": _iso(board.started_at), "updated_at": _iso(time.time())},
        "models": {name: status_row(status) for name, status in models.items()},
        "summary": {"total": len(models), "by_status": by_status},
    }


def status_row(status: ModelStatus) -> dict[str, Any]:
    row = status.as_json()
    return {
        "alias": row["alias"],
        "status": row["state"],
        "port": row["port"],
        "started_at": _iso(status.started_at),
        "last_used_at": _iso(status.last_used_at),
        "load_progress": row["load_progress"],
        "error_message": row["error_message"],
        "vram_used_mb": row["vram_used_mb"],
        "updated_at": _iso(status.updated_at),
    }


def visible(request: web.Request) -> dict[str, ModelStatus]:
    key = request[KEY]
    return {name: status for name, status in request.app[RUNTIME].board.models.items() if key.may_use(name)}


def _named(request: web.Request) -> ModelSpec:
    """The model in the path; one that this key may not use does not exist for it."""
    registry, name = request.app[RUNTIME].manager.registry, request.match_info["model"]
    with contextlib.suppress(ModelNotFound):
        spec = registry.named(name)
        if request[KEY].may_use(spec.id):
            return spec
    known = ", ".join(sorted(filter(request[KEY].may_use, registry.specs))) or "none for this key"
    raise ModelNotFound(f"the model {name!r} does not exist; there are: {known}", param="model")


def _openai_model(runtime: Runtime, spec: ModelSpec) -> dict[str, Any]:
    owner, status = runtime.manager.owners[spec.id], runtime.board.models[spec.id]
    return {
        "id": spec.id,
        "object": "model",
        "created": int(runtime.board.started_at),
        "owned_by": "corral",
        "status": status.state,
        "meta": {"slots": owner.slots, "n_ctx": owner.ctx, "aliases": list(spec.aliases)},
    }


def _iso(at: float | None) -> str | None:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds") if at is not None else None
