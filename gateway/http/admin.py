"""What only the scope admin may do."""

from __future__ import annotations

from aiohttp import web

from gateway.errors import NotFound
from gateway.http.context import RUNTIME
from gateway.http.visible import named_model
from gateway.refusals import translate_error

UPSTREAM_SECONDS = 10.0
_UPSTREAM = ("slots", "props", "lora-adapters", "metrics")


async def reload(request: web.Request) -> web.Response:
    return web.json_response(await request.app[RUNTIME].reload())


async def upstream(request: web.Request) -> web.Response:
    """A loaded llama-server's own view of itself; never loads one."""
    runtime = request.app[RUNTIME]
    spec = named_model(request, request.match_info["model"])
    what = request.match_info["what"]
    backend = runtime.manager.loaded().get(spec.id)
    if what not in _UPSTREAM:
        raise NotFound(f"there is no {what!r}; there are: {', '.join(_UPSTREAM)}")
    if backend is None:
        raise NotFound(f"{spec.id} is not loaded; it is {runtime.board.models[spec.id].state}")
    status, body = await backend.get(f"/{what}", UPSTREAM_SECONDS)
    if status != 200:
        raise translate_error(status, body)
    kind = "text/plain; version=0.0.4" if what == "metrics" else "application/json"
    return web.Response(body=body, headers={"Content-Type": kind})
