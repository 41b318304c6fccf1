"""Which models there are, in OpenAI's list and as files; and an operator's commands to them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web

from gateway.errors import BadRequest, MethodNotAllowed, ModelNotFound, ShuttingDown, UnsupportedMediaType
from gateway.http.context import KEY, RUNTIME
from gateway.http.inference import read_body
from gateway.http.visible import named_model, visible_specs
from gateway.models.gguf.header import GGUFError, read_header
from gateway.models.registry import ModelSpec
from gateway.pipeline.call import parse_json_object, typed_field
from gateway.runtime import Runtime
from gateway.state import ModelState, ServiceState

_COMMANDS = ("load", "eject")  # /v1/models/{command}, which a model's own path would hide


async def list_models(request: web.Request) -> web.Response:
    rows = await openai_models(request.app[RUNTIME], visible_specs(request))
    return web.json_response({"object": "list", "data": rows})


async def get_model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    try:
        spec = named_model(request, name)
    except ModelNotFound:
        if name in _COMMANDS:
            raise MethodNotAllowed(
                f"{request.method} is not allowed here; use POST", headers={"Allow": "POST"}
            ) from None
        raise
    rows = await openai_models(request.app[RUNTIME], [spec])
    if not rows:
        raise ModelNotFound(f"{spec.id} has just been taken out of the configuration", param="model")
    return web.json_response(rows[0])


async def openai_models(runtime: Runtime, specs: Sequence[ModelSpec]) -> list[dict[str, Any]]:
    """OpenAI's rows, and what is known here besides: `task` is generate, embed or rerank."""
    tasks = [facts.task for facts in await files_facts(specs)]
    owners, board = runtime.manager.owners, runtime.board
    return [
        {
            "id": spec.id,
            "object": "model",
            "created": int(board.started_at),
            "owned_by": "corral",
            "status": board.models[spec.id].state,
            "meta": {
                "slots": owners[spec.id].slots,
                "n_ctx": owners[spec.id].ctx,
                "task": task,
                "aliases": list(spec.aliases),
            },
        }
        for spec, task in zip(specs, tasks, strict=True)
        if spec.id in owners  # it may have been taken out of the configuration meanwhile
    ]


# --- files


@dataclass(frozen=True)
class FileFacts:
    """What a model's file says of itself; None where it does not say, or cannot be read."""

    quant: str | None = None
    family: str | None = None
    task: str | None = None


async def list_files(request: web.Request) -> web.Response:
    """GET /models."""
    specs = visible_specs(request)
    rows = [
        {
            "id": spec.id,
            "name": spec.path.name if spec.path else spec.id,
            "path": str(spec.path) if spec.path else None,
            "quant": facts.quant,
            "family": facts.family,
        }
        for spec, facts in zip(specs, await files_facts(specs), strict=True)
    ]
    return web.json_response({"models": rows})


async def files_facts(specs: Sequence[ModelSpec]) -> list[FileFacts]:
    """Beside the loop: files may lie on a disk that is slow or asleep."""
    return await asyncio.to_thread(lambda: [file_facts(spec.path, spec.embedding) for spec in specs])


def file_facts(path: Path | None, embedding: bool | None) -> FileFacts:
    """Blocking. A file that has been read is not read again before it changes; `embedding` wins over what it says."""
    facts = FileFacts()
    if path is not None:
        with contextlib.suppress(GGUFError, OSError):
            seen = path.stat()
            facts = _file_facts(path, seen.st_mtime_ns, seen.st_size)
    return dataclasses.replace(facts, task="embed") if embedding and facts.task != "rerank" else facts


@lru_cache(maxsize=1024)
def _file_facts(path: Path, _mtime_ns: int, _size: int) -> FileFacts:
    header = read_header(path)
    task = "rerank" if header.is_reranker else "embed" if header.is_embedding else "generate"
    return FileFacts(header.file_type or None, header.architecture or None, task)


# --- commands


async def load(request: web.Request) -> web.Response:
    """Asks for the model, and answers before it is there: /v1/models/{model}/status tells how it goes."""
    runtime = request.app[RUNTIME]
    spec, _ = await command(request)
    if runtime.board.status in (ServiceState.DRAINING, ServiceState.STOPPED):
        raise ShuttingDown("the service is shutting down", retry_after=5)
    runtime.manager.load(spec.id)
    return web.json_response({"model": spec.id, "status": runtime.board.models[spec.id].state}, status=202)


async def eject(request: web.Request) -> web.Response:
    """Answers when the model has no server any more. It is unloaded also if the client does not wait for that."""
    runtime = request.app[RUNTIME]
    spec, force = await command(request)
    await runtime.manager.eject(spec.id, force=force)
    status = runtime.board.models.get(spec.id)  # one that has failed stays so
    failed = status is not None and status.state is ModelState.FAILED
    return web.json_response({"model": spec.id, "status": ModelState.FAILED if failed else ModelState.OFF})


async def reset(request: web.Request) -> web.Response:
    """What has failed may be tried again."""
    runtime = request.app[RUNTIME]
    spec = named_model(request, request.match_info["model"])
    runtime.manager.reset(spec.id)
    return web.json_response({"model": spec.id, "status": runtime.board.models[spec.id].state})


async def plan(request: web.Request) -> web.Response:
    """What loading the model would evict, and why; nothing is done."""
    spec, _ = await command(request)
    told = await request.app[RUNTIME].manager.plan(spec.id, request[KEY].may_use)
    return web.json_response(dataclasses.asdict(told))


async def command(request: web.Request) -> tuple[ModelSpec, bool]:
    """The model that the body names, and `force`. Raises BadRequest, ModelNotFound, and what `read_body` raises."""
    runtime = request.app[RUNTIME]
    kind = request.content_type
    if "Content-Type" in request.headers and kind != "application/json" and not kind.endswith("+json"):
        raise UnsupportedMediaType(f"Content-Type is {kind[:100]}: send application/json")
    fields = parse_json_object(await read_body(request, runtime.settings, runtime.budget))
    name = typed_field(fields, "model", str, "a string")
    if not name:
        raise BadRequest('model is missing: send {"model": ID}', param="model")
    force = typed_field(fields, "force", bool, "true or false")
    return named_model(request, name), bool(force)
