"""A client's connection: what goes wrong before a handler runs, in our statuses and shape; time-outs; back-pressure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.web_protocol import RequestHandler

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
_REASONS = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    414: "URI Too Long",
    431: "Request Header Fields Too Large",
}


class ClientConnection(RequestHandler):
    """aiohttp's connection, with our errors and with the splice that an answer may be written through."""

    __slots__ = ("head_since", "splice")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.splice: Splice | None = None
        self.head_since: float | None = self._loop.time()  # since when a request's head is awaited
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count != before:
            self.head_since = None
        elif self.head_since is None and self._current_request is None and not self._messages:
            self.head_since = self._loop.time()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.splice is not None:
            self.splice.pause_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.splice is not None:
            self.splice.resume_writing()

    def expire(self, now: float, header_timeout: float) -> None:
        """Cut a connection whose request head does not come to its end."""
        if self.head_since is None or now - self.head_since < header_timeout or self.transport is None:
            return
        if self._request_in_progress:
            return
        error = ClientTimeout(f"the request's headers were not complete within {header_timeout:g} s")
        self.transport.write(error_response(error))
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Called for a request that could not be parsed; aiohttp would answer in plain text as HTTP/1.0."""
        error = parse_error(exc)
        if self.transport is not None:
            self.transport.write(error_response(error))
        return Relayed(keep_alive=False)


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


def parse_error(exc: BaseException | None) -> CorralError:
    """aiohttp's parser reports all of these as 400; the texts are those of its version 3.14."""
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
