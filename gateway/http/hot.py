"""The short way of an inference request: the same steps and handler, without aiohttp's Request, router and task.

Only the plain case goes it: POST to one of `routes`, spelled exactly so, in HTTP/1.1, without Expect and Upgrade. All
else goes aiohttp's way, and is answered alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from aiohttp import HttpVersion11, StreamReader, hdrs, web
from aiohttp.http import RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.typedefs import Handler

from gateway.http.context import ACCOUNTED, BODY, TEMPLATE, common_headers, response_head
from gateway.http.middleware.auth import authenticated, recognised
from gateway.http.middleware.cors import note_origin
from gateway.http.middleware.errors import told
from gateway.http.middleware.limits import check_length
from gateway.http.middleware.request_id import count, name
from gateway.pipeline.account import CLIENT_LEFT

if TYPE_CHECKING:
    from gateway.http.protocol import ClientConnection


MAX_HEADS = 256
MAX_HEAD_BYTES = 4096  # of those that are kept
# With these a head never comes twice, or its body is not what follows it.
_NOT_KEPT = frozenset({"traceparent", "x-request-id", "transfer-encoding", "content-encoding"})


def split(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """A request's head up to the digits of its length, the head from there on, and its body.

    None where that is not exactly what `data` is.
    """
    end = data.find(b"\r\n\r\n", 0, MAX_HEAD_BYTES) + 4
    at = data.find(b"\r\nContent-Length: ", 0, end)
    if at < 0:
        at = data.find(b"\r\ncontent-length: ", 0, end)
    if end < 4 or at < 0:
        return None
    at += 18
    stop = data.find(b"\r\n", at)
    digits = data[at:stop]
    if not (digits.isdigit() and len(digits) < 8 and int(digits) == len(data) - end):
        return None
    return data[:at], data[stop:end], data[end:]


class HotRequest(dict[Any, Any]):
    """What middlewares and the inference handler use of a web.Request, under its names; the mapping is the request's
    own state."""

    __slots__ = ("app", "content", "headers", "keep_alive", "method", "path", "protocol", "version")

    def __init__(
        self, app: Mapping[Any, Any], message: RawRequestMessage, content: StreamReader, protocol: ClientConnection
    ) -> None:
        self.app = app
        self.method, self.path, self.version = message.method, message.path, message.version
        self.headers = message.headers
        self.keep_alive = not message.should_close
        self.content = content
        self.protocol = protocol
        self[TEMPLATE] = message.path

    @property
    def transport(self) -> asyncio.Transport | None:
        return self.protocol.transport

    @property
    def remote(self) -> str | None:
        peer = self.protocol.peername
        return str(peer[0]) if isinstance(peer, (list, tuple)) else None

    @property
    def content_type(self) -> str:
        """Without its parameters, in lower case."""
        return self.headers.get(hdrs.CONTENT_TYPE, "application/octet-stream").partition(";")[0].strip().lower()

    @property
    def content_length(self) -> int | None:
        if BODY in self:
            return len(self[BODY])
        length = self.headers.get(hdrs.CONTENT_LENGTH)
        return None if length is None else int(length)


class HotRoutes:
    """`routes` are the templates, which have no placeholders and need the scope `infer`; `app` is what requests find
    under `request.app`."""

    def __init__(self, app: Mapping[Any, Any], routes: Iterable[str], handler: Handler) -> None:
        self._app = app
        self._routes = frozenset(routes)
        # What stands before the length in a head, and what behind it; clients send the same but for that all day.
        self._heads: dict[tuple[bytes, ...], RawRequestMessage] = {}
        self._handler = handler

    def request(
        self, message: RawRequestMessage, content: StreamReader, connection: ClientConnection
    ) -> HotRequest | None:
        """None where it has to go aiohttp's way."""
        if message.path not in self._routes or message.method != "POST" or message.version != HttpVersion11:
            return None
        if message.upgrade or hdrs.EXPECT in message.headers:
            return None
        return HotRequest(self._app, message, content, connection)

    def known(self, data: bytes, connection: ClientConnection) -> HotRequest | None:
        """The request, if `data` is exactly one, with a head that the parser has already found good."""
        parts = split(data)
        message = self._heads.get(parts[:2]) if parts is not None else None
        if parts is None or message is None:
            return None
        request = HotRequest(self._app, message, EMPTY_PAYLOAD, connection)
        request[BODY] = parts[2]
        return request

    def learn(self, data: bytes, message: RawRequestMessage, connection: ClientConnection) -> None:
        """`data` is exactly one request, and `message` what the parser made of its head."""
        headers = message.headers
        if self.request(message, EMPTY_PAYLOAD, connection) is None or not _NOT_KEPT.isdisjoint(
            map(str.lower, headers)
        ):
            return
        parts = split(data)
        if parts is not None and len(headers.getall(hdrs.CONTENT_LENGTH, ())) == 1:
            if len(self._heads) >= MAX_HEADS:
                self._heads.clear()
            self._heads[parts[:2]] = message

    async def answer(self, hot: HotRequest) -> bool:
        """Whether the connection may serve another request. The steps are those of `app.MIDDLEWARE`."""
        request = cast(web.Request, hot)
        name(request)  # 1 request_id
        note_origin(request)  # 2 cors
        try:  # 3 errors
            check_length(request)  # 4 limits
            if not recognised(request, "infer"):  # 5 auth
                await authenticated(request, "infer")
            response = await self._handler(request)
        except (ConnectionError, asyncio.CancelledError):
            if ACCOUNTED not in hot:
                count(request, CLIENT_LEFT)
            raise
        except Exception as error:
            refusal = told(request, error)
            self._write(hot, refusal)
            response = refusal
        if ACCOUNTED not in hot:
            count(request, response.status)
        return hot.keep_alive and response.keep_alive is not False

    def _write(self, request: HotRequest, response: web.Response) -> None:
        """aiohttp would write it as well, but for a Request of its own."""
        body = response.body if isinstance(response.body, bytes) else b""
        headers = [*response.headers.items(), ("Content-Length", str(len(body)))]
        headers += common_headers(cast(web.Request, request))
        if not (request.keep_alive and response.keep_alive is not False):
            headers.append(("Connection", "close"))
        if request.transport is not None and not request.transport.is_closing():
            request.transport.write(response_head(response.status, headers) + body)
