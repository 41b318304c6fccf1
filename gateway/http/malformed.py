"""Requests that cannot be read, or that others on the way may read differently: which error, and its bytes."""

from __future__ import annotations

import json

from aiohttp import HttpVersion10, HttpVersion11, hdrs
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from gateway.errors import BadRequest, CorralError, HeaderFieldsTooLarge, URITooLong
from gateway.pipeline.identity import new_request_id

_REASONS = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


def misframed(message: RawRequestMessage) -> CorralError | None:
    """What aiohttp takes, and others on the way may read differently."""
    if message.version < HttpVersion10:
        return BadRequest("this is HTTP/0.9, which is not served")
    if message.version > HttpVersion11:  # it would be answered in kind, as HTTP/2.0
        return BadRequest("only HTTP/1.1 and HTTP/1.0 are served")
    if hdrs.TRANSFER_ENCODING not in message.headers:
        return None
    if message.version < HttpVersion11:
        return BadRequest("HTTP/1.0 has no Transfer-Encoding: send Content-Length")
    codings = ", ".join(message.headers.getall(hdrs.TRANSFER_ENCODING))
    if codings.lower() != "chunked":
        return BadRequest(f"Transfer-Encoding is {codings[:40]!r}: only chunked is understood")
    return None


def parse_error(exc: BaseException | None) -> CorralError:
    """aiohttp's parser reports all of these as 400; the texts are those of its version 3.14."""
    if isinstance(exc, CorralError):
        return exc
    message = exc.message if isinstance(exc, BadHttpMessage) else "the request cannot be read"
    if isinstance(exc, LineTooLong):
        # the C parser shows a request target as a bytearray, and a header as bytes
        if "bytearray(b'/" in message or "Status line" in message:
            return URITooLong("the request line is too long; MAX_REQUEST_LINE_SIZE bounds it")
        return HeaderFieldsTooLarge("a header line is too long; MAX_HEADER_LINE_SIZE bounds it")
    if "Too many headers" in message:
        return HeaderFieldsTooLarge("there are too many header fields; MAX_HEADERS bounds them")
    return BadRequest(f"this is not a valid HTTP request: {' '.join(message.split())[:200]}")


def error_response(error: CorralError) -> bytes:
    """A whole response, for where there is no request to answer."""
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.status} {_REASONS.get(error.status, 'Error')}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        f"x-request-id: {new_request_id()}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
