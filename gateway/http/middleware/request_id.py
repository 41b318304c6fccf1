"""First: a name for the request, the client's own if it is sane; its place in a trace; and it is counted."""

from __future__ import annotations

import asyncio
import time

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.http.context import ACCOUNTED, ERROR, KEY, RECEIVED_AT, REQUEST_ID, RUNTIME, TRACEPARENT, template
from gateway.pipeline.account import CLIENT_LEFT, Record
from gateway.pipeline.identity import identity
from gateway.pipeline.routes import ROUTES


@web.middleware
async def request_id(request: web.Request, handler: Handler) -> web.StreamResponse:
    name(request)
    try:
        response = await handler(request)
    except (ConnectionError, asyncio.CancelledError):
        count(request, CLIENT_LEFT)
        raise
    count(request, response.status)
    return response


def name(request: web.Request) -> None:
    request[RECEIVED_AT] = asyncio.get_running_loop().time()
    headers = request.headers
    request[REQUEST_ID], request[TRACEPARENT] = identity(headers.get("x-request-id"), headers.get("traceparent"))


def count(request: web.Request, status: int) -> None:
    """What has come to the spine is counted there."""
    if not request.get(ACCOUNTED):
        path = template(request) or "unknown"
        request.app[RUNTIME].metrics.count_request(path, method_label(request.method), status, "")
        if request.method == "OPTIONS":  # a browser's question about a request that is still to come
            return
        if path in ROUTES:
            write_down(request, path, status)
        elif request.path in ROUTES:  # another method
            write_down(request, request.path, status)


def write_down(request: web.Request, path: str, status: int) -> None:
    """A request for a model that was refused before it came to the spine; without a key, as long as they are few."""
    key, accounts = request.get(KEY), request.app[RUNTIME].accounts
    if key is None and not accounts.strangers.admitted(request[RECEIVED_AT]):
        request.app[RUNTIME].metrics.records_skipped.inc()
        return
    took = asyncio.get_running_loop().time() - request[RECEIVED_AT]
    record = Record(
        ts=time.time() - took,
        request_id=request[REQUEST_ID],
        trace_id=request[TRACEPARENT][3:35],
        key_id=key.id if key is not None else "",
        route=path,
        method=method_label(request.method),
        transport="http",
        stream=False,
        status=status,
        error=request.get(ERROR),
        duration_ms=took * 1000,
    )
    accounts.refused(record)


def method_label(method: str) -> str:
    """Clients must not be able to make new series with methods of their own invention."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH") else "other"
