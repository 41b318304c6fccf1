"""The inference routes: a request becomes a Call, its answer is spliced to the client's socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from aiohttp import HttpVersion11, web

from gateway.admission.queue import ByteBudget
from gateway.errors import (
    BadRequest,
    ClientTimeout,
    CorralError,
    PayloadTooLarge,
    ShuttingDown,
    UnsupportedMediaType,
)
from gateway.http.context import (
    ACCOUNTED,
    BODY,
    CALLER,
    KEY,
    RECEIVED_AT,
    REQUEST_ID,
    RUNTIME,
    TRACEPARENT,
    common_headers,
    response_head,
    template,
)
from gateway.http.dialects import splice_for
from gateway.http.protocol import CLOSED, KEPT, ClientConnection
from gateway.http.wishes import log_as_asked
from gateway.pipeline.cache.key import wish_of
from gateway.pipeline.call import Call, Fields, parse_json_object, read_fields
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.forms import form_field
from gateway.pipeline.routes import ROUTES, max_wait, priority
from gateway.pipeline.splice import Headers, Splice
from gateway.pipeline.turns import LARGE_BYTES
from gateway.settings import Settings

log = logging.getLogger("corral.http")


async def infer(request: web.Request) -> web.StreamResponse:
    runtime = request.app[RUNTIME]
    connection, transport = request.protocol, request.transport
    assert isinstance(connection, ClientConnection)
    body = body_at_hand(request, runtime.settings.max_request_body_size)
    if body is None:
        body = await read_body(request, runtime.settings, runtime.budget)
    large = len(body) > LARGE_BYTES and not _is_form(request)
    call = make_call(request, body, await runtime.spine.turns.of(partial(parse_json_object, body)) if large else None)
    if transport is None:
        raise ConnectionResetError("the client has left")
    keep_alive = request.keep_alive and request.version >= HttpVersion11

    def head(status: int, headers: Headers) -> bytes:
        took = int((asyncio.get_running_loop().time() - call.received_at) * 1000)
        about = [("openai-processing-ms", str(took))] + ([] if keep_alive else [("Connection", "close")])
        return response_head(status, headers + common_headers(request) + call.headers_out + about)

    splice = splice_for(request, call, transport, head, runtime.accounts.meter(call.places))
    connection.splice = splice
    if connection.writing_paused:  # it pipelines, and has not read the last answer yet
        splice.pause_writing()
    request[ACCOUNTED] = True
    if call.stream:
        runtime.pinger.add(splice)
    try:
        await runtime.spine.forward(call, splice)
    except CorralError as error:
        tell(splice, call, error)
    except asyncio.CancelledError:
        if transport.is_closing():  # the client has left
            splice.cut()
            raise
        _not_cancelled_after_all()
        tell(splice, call, ShuttingDown("the service is shutting down", retry_after=5))
    except Exception:
        if not splice.begun:
            raise
        log.exception("an answer broke off", extra={"request_id": call.request_id, "key_id": call.key.id})
        tell(splice, call, CorralError("something went wrong inside the gateway"))
    finally:
        connection.splice = None
        runtime.pinger.discard(splice)
    return KEPT if keep_alive and not splice.was_cut else CLOSED


def tell(splice: Splice, call: Call, error: CorralError) -> None:
    """Before the answer has begun the error is raised and becomes a response; after that it goes into the answer."""
    if splice.begun:
        splice.fail(error)
        return
    error.extra_headers = dict(call.headers_out) | error.extra_headers
    raise error


def _not_cancelled_after_all() -> None:
    """This task goes on, to tell its client what has happened."""
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()


def make_call(request: web.Request, body: bytes, fields: Fields | None = None) -> Call:
    """`fields` are what the body holds, where it was parsed already.

    Raises BadRequest, InvalidJSON, UnsupportedMediaType.
    """
    path = template(request)
    assert path is not None
    route = ROUTES[path]
    call = Call(
        route=route,
        key=request[KEY],
        caller=request[CALLER],
        request_id=request[REQUEST_ID],
        traceparent=request[TRACEPARENT],
        received_at=request[RECEIVED_AT],
        model=None,
        fields={},
        size=len(body),
    )
    if "admin" in call.key.scopes:
        log_as_asked(request, call)
    if route.dialect is Dialect.TRANSCRIPTIONS:
        call.raw, call.content_type = body, form_type(request)
        call.model = form_field(body, call.content_type, "model")
    elif "Content-Type" in request.headers and not _is_json(request.content_type):
        raise UnsupportedMediaType(f"Content-Type is {request.content_type}: send application/json")
    else:
        read_fields(call, body, fields)
        if "Cache-Control" in request.headers:
            call.cache = wish_of(request.headers["Cache-Control"])
    if "X-Request-Priority" in request.headers:
        call.priority = priority(request.headers["X-Request-Priority"])
    if "X-Request-Timeout" in request.headers:
        call.max_wait = max_wait(request.headers["X-Request-Timeout"])
    elif "X-Stainless-Read-Timeout" in request.headers:  # openai-python and its kin: so long they wait for a byte
        with contextlib.suppress(BadRequest):  # it may say that none was given
            call.max_wait = max_wait(request.headers["X-Stainless-Read-Timeout"])
    return call


def form_type(request: web.Request) -> str:
    """The Content-Type of a form, for llama-server. Raises UnsupportedMediaType, BadRequest."""
    kind = request.headers.get("Content-Type", "")
    if request.content_type != "multipart/form-data":
        raise UnsupportedMediaType("audio is sent as multipart/form-data")
    if not kind.isascii() or "boundary=" not in kind.lower():
        raise BadRequest("Content-Type names no boundary, so the form cannot be read")
    return kind


async def expected(request: web.Request) -> None:
    """`Expect: 100-continue` waits for `read_body`: a refusal comes before the body. Other wishes are ignored."""


def body_at_hand(request: web.Request, bound: int) -> bytes | None:
    """The whole body, where it has come already. Raises PayloadTooLarge, UnsupportedMediaType."""
    if BODY in request:
        return request[BODY]  # with a Content-Length, which was looked at
    encoding = request.headers.get("Content-Encoding")
    if encoding is not None and encoding.lower() != "identity":
        raise UnsupportedMediaType(f"Content-Encoding is {encoding[:40]}: send the body as it is")
    content = request.content
    if not content.is_eof():
        return None
    if content.total_bytes > bound:  # it was sent in chunks, without telling how much
        raise too_large(bound)
    return content.read_nowait(-1) if content.total_bytes else b""


async def read_body(request: web.Request, settings: Settings, budget: ByteBudget) -> bytes:
    """The whole body within CLIENT_BODY_TIMEOUT; what has come of it counts on MAX_QUEUED_BYTES until then.

    Raises BadRequest, ClientTimeout, PayloadTooLarge, QueueFull.
    """
    content = request.content
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    bound = settings.max_request_body_size
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.client_body_timeout):
            while part := await content.readany():
                if size + len(part) > bound:
                    raise too_large(bound)
                budget.hold(len(part))
                size += len(part)
                parts.append(part)
    except TimeoutError:
        raise ClientTimeout(f"the request's body was not complete within {settings.client_body_timeout:g} s") from None
    finally:
        budget.release(size)
    return b"".join(parts)


def too_large(bound: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than the {bound} bytes of MAX_REQUEST_BODY_SIZE")


def _is_form(request: web.Request) -> bool:
    return request.content_type == "multipart/form-data"


def _is_json(content_type: str) -> bool:
    return content_type == "application/json" or content_type.endswith("+json")
