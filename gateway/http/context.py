"""What the middlewares learn of a request and its handler needs, and the headers that every answer carries."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web

from gateway.pipeline.identity import new_request_id
from gateway.pipeline.splice import Headers
from gateway.runtime import Runtime
from gateway.stores.keys.file import Key

RUNTIME = web.AppKey("runtime", Runtime)

REQUEST_ID = web.RequestKey("request_id", str)
TRACEPARENT = web.RequestKey("traceparent", str)
RECEIVED_AT = web.RequestKey("received_at", float)  # on the loop's clock
ORIGIN = web.RequestKey("origin", str)  # an allowed one
KEY = web.RequestKey("key", Key)
ERROR = web.RequestKey("error", str)  # the code that it was refused with
ACCOUNTED = web.RequestKey("accounted", bool)  # the spine has counted it
TEMPLATE = web.RequestKey("template", str)  # of its route, where aiohttp's router was not asked
BODY = web.RequestKey("body", bytes)  # where it came together with its head
CALLER = web.RequestKey("caller", str)  # whose limits a request counts on

EXPOSED = (
    "x-request-id, request-id, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    "x-queue-time-ms, x-cache, openai-processing-ms, retry-after, retry-after-ms, x-should-retry"
)

_STATUS_LINE = {status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus}


def template(request: web.Request) -> str | None:
    """The template of its route; None where there is no such route."""
    found = request.get(TEMPLATE)
    if found is None:
        resource = request.match_info.route.resource
        found = resource.canonical if resource is not None else None
    return found


def common_headers(request: web.Request) -> Headers:
    """On every response: the request's id, and CORS where the origin is allowed."""
    headers: Headers = [("x-request-id", request.get(REQUEST_ID) or new_request_id())]
    origin = request.get(ORIGIN)
    if origin is not None:
        headers += [("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", EXPOSED)]
        if origin != "*":
            headers.append(("Vary", "Origin"))
    return headers


async def on_prepare(request: web.Request, response: web.StreamResponse) -> None:
    """For the responses that aiohttp writes; a splice writes its own head."""
    response.headers["Server"] = "Corral"
    for name, value in common_headers(request):
        own = response.headers.get(name) if name == "Vary" else None
        response.headers[name] = f"{own}, {value}" if own else value


def response_head(status: int, headers: Headers) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return f"{_STATUS_LINE.get(status) or f'HTTP/1.1 {status} '}\r\n{lines}\r\n".encode("latin-1", "replace")
