"""A client's connection: what goes wrong before a handler runs, in our statuses and shape; time-outs; back-pressure."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.errors import (
    BadRequest,
    ClientTimeout,
    CorralError,
    HeaderFieldsTooLarge,
    URITooLong,
)
from gateway.http.context import new_request_id
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.pipeline.splice import Splice

KEEP_ALIVE_SECONDS = 75.0
MAX_HEAD_BYTES = 128 * 1024  # of a head that comes in pieces; MAX_HEADERS alone would allow 512 KB a connection
_WITHOUT_VERSION = re.compile(rb"[A-Z]{1,20} [^ \r\n]*\r?\n")
_REASONS = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


class ClientConnection(RequestHandler):
    """aiohttp's connection, with our errors and with the splice that an answer may be written through."""

    __slots__ = ("_answered", "_body", "_head_bytes", "_head_of", "_head_since", "splice")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.splice: Splice | None = None
        self._answered = 0  # requests
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last request whose head has come
        self._head_since: float | None = self._loop.time()  # since when the next request's head is awaited
        self._head_of = 0  # how many requests had come by then
        self._head_bytes = 0
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        before, in_body = self._request_count, not self._body.is_eof()
        super().data_received(data)
        if self._request_count != before:
            self._heads_came(self._request_count - before)
        elif data and not in_body:
            self._head_goes_on(data)

    def _heads_came(self, count: int) -> None:
        """The last `count` messages are new, and nobody has looked at them yet."""
        self._head_since = None
        for at in range(-count, 0):
            message, body = self._messages[at]
            if isinstance(message, _ErrInfo):
                if not self._body.is_eof():
                    self._body_failed(parse_error(message.exc))
                    return
            elif error := misframed(message):
                self._messages[at] = (_ErrInfo(error.status, error, error.message), EMPTY_PAYLOAD)
            self._body = body

    def _body_failed(self, error: CorralError) -> None:
        """A bad chunk: aiohttp would leave the one who reads that body waiting, and then answer a second time."""
        self._messages.pop()
        if self._answered < self._request_count - 1:  # else what is read is only thrown away
            self._body.set_exception(error)
        self._body.feed_eof()
        self._close = True  # when that request has been answered

    def _head_goes_on(self, data: bytes) -> None:
        """A part of a request's head has come, and not its end."""
        if self._head_since is None or self._head_of != self._request_count:
            self._head_since, self._head_of = self._loop.time(), self._request_count
            self._head_bytes = 0
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES + self.max_line_size + self.max_field_size:
            self._refuse(HeaderFieldsTooLarge(f"the headers have more than {MAX_HEAD_BYTES} bytes in all"))
        elif self._head_bytes == len(data) and _WITHOUT_VERSION.match(data):
            self._refuse(BadRequest("this is HTTP/0.9, which is not served"))

    def expire(self, now: float, header_timeout: float) -> None:
        """Cut a connection whose request head does not come to its end."""
        if self._head_since is None or now - self._head_since < header_timeout:
            return
        if self._head_of == self._request_count:
            self._refuse(ClientTimeout(f"the request's headers were not complete within {header_timeout:g} s"))

    def _refuse(self, error: CorralError) -> None:
        """Answer what has not become a request, and close; not while another request is being answered."""
        if self.transport is not None and not self._request_in_progress and not self._messages:
            self.transport.write(error_response(error))
            self.force_close()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.splice is not None:
            self.splice.pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.splice is not None:
            self.splice.resume_writing()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called for a request that could not be parsed; aiohttp would answer in plain text as HTTP/1.0."""
        if self.transport is not None:
            self.transport.write(error_response(parse_error(exc)))
        return Relayed(keep_alive=False)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # from before the middlewares: aiohttp does not know this Expect
            resp = self.handle_error(request, exc=BadRequest("Expect may only be 100-continue"))
        finished = await super().finish_response(request, resp, start_time)
        self._answered += 1
        if self._messages:  # it may have parsed what came behind an offer to upgrade
            self._body = self._messages[-1][1]
        return finished


class Relayed(web.StreamResponse):
    """Stands for a response whose bytes have gone to the transport already: aiohttp has nothing more to write."""

    def __init__(self, *, keep_alive: bool) -> None:
        super().__init__()
        self._keep_alive = keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


def connection_factory(server: web.Server, settings: Settings) -> Callable[[], ClientConnection]:
    """What `loop.create_server` makes for each client."""
    loop = asyncio.get_running_loop()

    def make() -> ClientConnection:
        return ClientConnection(
            server,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=settings.max_request_line_size,
            max_field_size=settings.max_header_line_size,
            max_headers=settings.max_headers,
            auto_decompress=False,
        )

    return make


def expire_connections(server: web.Server, now: float, header_timeout: float) -> None:
    for connection in server.connections:
        if isinstance(connection, ClientConnection):
            connection.expire(now, header_timeout)


def misframed(message: RawRequestMessage) -> CorralError | None:
    """What aiohttp takes, and others on the way may read differently."""
    if message.version < HttpVersion10:
        return BadRequest("this is HTTP/0.9, which is not served")
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
