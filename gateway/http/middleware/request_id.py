"""First: a name for the request, the client's own if it is sane; its place in a trace; and it is counted."""

from __future__ import annotations

import asyncio
import re
import secrets

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.http.context import ACCOUNTED, RECEIVED_AT, REQUEST_ID, RUNTIME, TRACEPARENT, new_request_id

_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    request[RECEIVED_AT] = asyncio.get_running_loop().time()
    headers = request.headers
    given = headers.get("x-request-id")
    request[REQUEST_ID] = given if given and _SANE.fullmatch(given) else new_request_id()
    request[TRACEPARENT] = continued(headers.get("traceparent"))
    response = await handler(request)
    if not request.get(ACCOUNTED):
        resource = request.match_info.route.resource
        path = resource.canonical if resource is not None else "unknown"
        request.app[RUNTIME].metrics.count_request(path, method_label(request.method), response.status, "")
    return response


def method_label(method: str) -> str:
    """Clients must not be able to make new series with methods of their own invention."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"


def continued(given: str | None) -> str:
    """The W3C trace context to pass on: the same trace with a span of ours, or a new one."""
    span = secrets.token_hex(8)
    if given and _TRACEPARENT.fullmatch(given):
        return f"{given[:36]}{span}{given[52:]}"
    return f"00-{secrets.token_hex(16)}-{span}-01"
