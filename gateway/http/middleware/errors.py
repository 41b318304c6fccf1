"""Third: whatever is raised behind this becomes an answer in the one error shape, or in the route's dialect."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.errors import (
    BadRequest,
    CorralError,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
)
from gateway.http.context import ERROR, REQUEST_ID
from gateway.pipeline.dialects import anthropic_error
from gateway.pipeline.plain import infer_failure
from gateway.pipeline.routes import INFER

log = logging.getLogger("corral.http")


@web.middleware
async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ConnectionError:
        raise  # the client is gone; there is nobody to tell
    except Exception as error:
        return told(request, error)


def told(request: web.Request, error: Exception) -> web.Response:
    """The answer for what was raised."""
    if isinstance(error, CorralError):
        return render(request, error)
    if isinstance(error, web.HTTPException):
        return render(request, translate(error))
    about = {"request_id": request.get(REQUEST_ID)}
    log.error("%s %s failed", request.method, request.path, exc_info=error, extra=about)
    return render(request, CorralError("something went wrong inside the gateway; its log has the details"))


def render(request: web.Request, error: CorralError) -> web.Response:
    request[ERROR] = error.code
    headers = error.headers()
    if request.path.startswith("/v1/messages"):
        name = request[REQUEST_ID]
        headers.setdefault("request-id", name)
        body = {"type": "error", "error": anthropic_error(error.body()["error"]), "request_id": name}
    else:
        body = infer_failure(error) if request.path == INFER else error.body()
    response = web.json_response(body, status=error.status, headers=headers)
    if error.status in (408, 413) or request.content.exception() is not None:
        response.force_close()  # the rest of the body is not worth reading, or cannot be read
    return response


def translate(error: web.HTTPException) -> CorralError:
    """aiohttp's own refusals."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{error.method} is not allowed here; use {allowed}", headers={"Allow": allowed})
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return PayloadTooLarge("the body is larger than MAX_REQUEST_BODY_SIZE")
    if error.status == 404:
        return NotFound("there is no such route")
    return BadRequest(error.reason or "the request cannot be served")
