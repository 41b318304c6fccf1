"""A client's connection: what goes wrong before a handler runs, in our statuses and shape; time-outs; back-pressure."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from aiohttp import StreamReader, hdrs, web
from aiohttp.http import RawRequestMessage, StreamWriter
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import ERROR, RequestHandler, _ErrInfo

from gateway.errors import (
    BadRequest,
    ClientTimeout,
    CorralError,
    HeaderFieldsTooLarge,
)
from gateway.http.hot import HotRequest, HotRoutes
from gateway.http.malformed import error_response, misframed, parse_error
from gateway.settings import Settings

if TYPE_CHECKING:
    from gateway.pipeline.splice import Splice

log = logging.getLogger("corral.http")

KEEP_ALIVE_SECONDS = 75.0
STALLED_SECONDS = 60.0  # a client that has taken no byte for so long is gone, as nginx's send_timeout has it
MAX_HEAD_BYTES = 128 * 1024  # of a head that comes in pieces; MAX_HEADERS alone would allow 512 KB a connection
_WITHOUT_VERSION = re.compile(rb"[A-Z]{1,20} [^ \r\n]*\r?\n")


class ClientConnection(RequestHandler):
    """aiohttp's connection, with our errors, with the splice that an answer may be written through, and with a short
    way for hot routes."""

    __slots__ = (
        "_answered", "_body", "_head_bytes", "_head_of", "_head_since", "_hot", "_owed", "_ready", "_unsent",
        "_unsent_since", "splice",
    )  # fmt: skip

    def __init__(self, server: web.Server, hot: HotRoutes, **about: Any) -> None:
        super().__init__(server, **about)
        self._hot = hot

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.splice: Splice | None = None
        self._answered = 0  # requests
        self._body: StreamReader = EMPTY_PAYLOAD  # of the last request whose head has come
        self._head_since: float | None = self._loop.time()  # since when the next request's head is awaited
        self._head_of = 0  # how many requests had come by then
        self._head_bytes = 0
        self._owed: int | None = 0  # bytes to the end of a request; None: it is not known where one ends
        self._ready: HotRequest | None = None  # one that has not gone through the parser
        self._unsent, self._unsent_since = 0, 0.0  # as it was last seen, and since when it has not shrunk
        # A slow reader then holds what was read from llama-server at once, 256 KB at most, and nothing more.
        cast(asyncio.Transport, transport).set_write_buffer_limits(0)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._body = EMPTY_PAYLOAD  # which refers to the connection

    def data_received(self, data: bytes) -> None:
        waiter = self._waiter
        idle = self._request_count == 0 if waiter is None else not waiter.done()
        if idle and self._owed == 0 and not self._messages:
            self._ready = self._hot.known(data, self)
            if self._ready is not None:
                self._request_count += 1
                self._head_since = None
                if waiter is not None:
                    waiter.set_result(None)
                return
        before, in_body = self._request_count, not self._body.is_eof()
        super().data_received(data)
        if self._request_count != before:
            self._heads_came(self._request_count - before)
        elif data and not in_body:
            self._head_goes_on(data)
        if self._owed is not None:
            self._owed = self._still_owed(data, self._owed, self._request_count - before)

    def _still_owed(self, data: bytes, owed: int, count: int) -> int | None:
        """Where the parser stands after `data`, of which `count` heads were new: how much of its message is missing.

        None where that is not beyond doubt, and from then on. Whoever takes a boundary for one that is none lets a
        client smuggle requests.
        """
        if owed == 0:
            if not data:
                return 0
            message = self._messages[-1][0] if count == 1 and self._messages else None
            end = data.find(b"\r\n\r\n") + 4
            if message is None or isinstance(message, _ErrInfo) or message.chunked or message.upgrade:
                return None
            if end < 4 or data.startswith(b"\r\n") or data.count(b"\n", 0, end) != data.count(b"\r\n", 0, end):
                return None
            owed = end + int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
            if owed == len(data):
                self._hot.learn(data, message, self)
        elif count:
            return None
        owed -= len(data)
        return owed if owed > 0 or (owed == 0 and self._body.is_eof()) else None

    async def start(self) -> None:
        """The requests of this connection, one after the other, until it closes; as aiohttp's own, but that one on a
        hot route is answered right here."""
        going_on = True
        try:
            while going_on and not (self._close or self._force_close):
                if not self._messages and self._ready is None:
                    await self._more()
                hot, self._ready = self._ready, None
                body = EMPTY_PAYLOAD
                if hot is None:
                    message, body = self._next_message()
                    if not isinstance(message, _ErrInfo):
                        hot = self._hot.request(message, body, self)
                if hot is None:
                    going_on = await self._by_aiohttp(message, body)
                else:
                    going_on = await self._by_hot_route(hot)
                self._keepalive = going_on
                if not body.is_eof():
                    going_on = await self._thrown_away(body) and going_on
                self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
                if going_on and self._keepalive_handle is None:
                    self._keepalive_handle = self._loop.call_at(
                        self._next_keepalive_close_time, self._process_keepalive
                    )
        except asyncio.CancelledError:  # the client has left; raised again, it would keep all that its request was
            self.force_close()
        except Exception:  # the errors middleware lets none through, so this is a fault of ours
            log.exception("a connection broke off")
            self.force_close()
        if not self._force_close:
            self._task_handler = None
            if self.transport is not None:
                self.transport.close()

    async def _more(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _next_message(self) -> tuple[RawRequestMessage | _ErrInfo, StreamReader]:
        message, body = self._messages.popleft()
        if self._parser is not None:
            self._parser.message_consumed()
        if self._buffer_paused and len(self._messages) <= self._msg_queue_resume_size:
            self._resume_reading_if_drained()
        return message, body

    async def _by_hot_route(self, request: HotRequest) -> bool:
        """Whether the connection may serve another request."""
        self._request_in_progress = True
        try:
            return await self._hot.answer(request)
        except ConnectionError:
            return False  # the client is gone
        finally:
            self._request_in_progress = False
            self._answered += 1
            if self._handler_waiter is not None:
                self._handler_waiter.set_result(None)

    async def _by_aiohttp(self, message: RawRequestMessage | _ErrInfo, body: StreamReader) -> bool:
        """Whether the connection may serve another request."""
        assert self._manager is not None
        assert self._request_factory is not None
        assert self._request_handler is not None
        handler = self._request_handler
        if isinstance(message, _ErrInfo):
            handler, message = self._make_error_handler(message), ERROR
        self._manager.requests_count += 1
        running = asyncio.current_task()
        assert running is not None
        request = self._request_factory(message, body, self, StreamWriter(self, self._loop), running)
        task = self._loop.create_task(self._handle_request(request, None, handler))
        try:
            response, reset = await task
        except ConnectionError:
            return False
        return bool(response.keep_alive) and not reset

    async def _thrown_away(self, body: StreamReader) -> bool:
        """Read what nobody wanted of a body, for a client may look at the answer only when it has sent all of it."""
        try:
            async with asyncio.timeout(self._lingering_time):
                while not body.is_eof() and not self._force_close:
                    await body.readany()
        except (TimeoutError, ConnectionError, CorralError, web.RequestPayloadError):
            return False
        return not self._force_close

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:  # aiohttp asks for it at the end of each body
            super().resume_reading(resume_parser)

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

    @property
    def unsent(self) -> int:
        """Bytes of answers that the client has not taken yet."""
        return self.transport.get_write_buffer_size() if self.writing_paused and self.transport is not None else 0

    def expire(self, now: float, header_timeout: float, stalled_timeout: float) -> None:
        """Cut a connection whose request head does not come to its end, or whose client takes nothing any more."""
        before, self._unsent = self._unsent, self.unsent
        if not before or self._unsent < before:
            self._unsent_since = now
        elif now - self._unsent_since >= stalled_timeout and self.transport is not None:
            self.transport.abort()  # as if it had left: whoever does not read keeps a place from the others
            return
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
        return CLOSED

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


KEPT, CLOSED = Relayed(keep_alive=True), Relayed(keep_alive=False)  # it has no state of its own


def connection_factory(server: web.Server, settings: Settings, hot: HotRoutes) -> Callable[[], ClientConnection]:
    """What `loop.create_server` makes for each client."""
    loop = asyncio.get_running_loop()

    def make() -> ClientConnection:
        return ClientConnection(
            server,
            hot,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            access_log=None,
            max_line_size=settings.max_request_line_size,
            max_field_size=settings.max_header_line_size,
            max_headers=settings.max_headers,
            auto_decompress=False,
        )

    return make


def expire_connections(server: web.Server, now: float, settings: Settings) -> None:
    stalled_timeout = min(STALLED_SECONDS, settings.request_timeout)
    for connection in server.connections:
        if isinstance(connection, ClientConnection):
            connection.expire(now, settings.client_header_timeout, stalled_timeout)


def is_unsent(server: web.Server) -> bool:
    return any(isinstance(connection, ClientConnection) and connection.unsent for connection in server.connections)
