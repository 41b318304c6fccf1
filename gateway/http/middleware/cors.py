"""Second: may this origin read the answers? Preflights end here, without a key."""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.http.context import ORIGIN, RUNTIME

_METHODS = "GET, HEAD, POST, PUT, DELETE, OPTIONS"
_MAX_AGE = "600"


@web.middleware
async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
    note_origin(request)
    if request.method != "OPTIONS":
        return await handler(request)
    response = web.Response(status=204)
    if request.get(ORIGIN) is not None:
        response.headers["Access-Control-Allow-Methods"] = _METHODS
        asked = request.headers.get("Access-Control-Request-Headers")
        response.headers["Access-Control-Allow-Headers"] = asked or "Authorization, Content-Type"
        response.headers["Access-Control-Max-Age"] = _MAX_AGE
    return response


def note_origin(request: web.Request) -> None:
    origin = request.headers.get("Origin")
    if origin is None:
        return
    allowed = request.app[RUNTIME].settings.cors_origins
    if "*" in allowed:
        request[ORIGIN] = "*"
    elif origin in allowed:
        request[ORIGIN] = origin
