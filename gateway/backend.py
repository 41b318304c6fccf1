"""The client of a llama-server: the pool of connections and its time-outs. The only place that opens sockets to one."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.parse
from collections.abc import Iterable

from gateway.connection import Connection, Reply, State
from gateway.errors import BackendGone, BackendTimeout

MAX_IDLE_CONNECTIONS = 256  # there are never more than were in use at once; llama-server closes them soon


class Backend:
    """A llama-server's address and its pool of connections. Time-outs are in seconds."""

    def __init__(self, url: str, *, key: str | None = None, connect_timeout: float = 10, silence: float = 600) -> None:
        parts = urllib.parse.urlsplit(url)
        self.url = url.rstrip("/")
        self._tls = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._fixed = f"Host: {host}:{self._port}\r\n" + (f"Authorization: Bearer {key}\r\n" if key else "")
        self._connect_timeout, self._silence = connect_timeout, silence
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"Backend({self._host}:{self._port})"

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        content_type: str = "application/json",
        headers: Iterable[tuple[str, str]] = (),
    ) -> Reply:
        """Send a request and return when the response's head is here.

        Raises BackendGone, BackendTimeout, BackendError. A pooled connection that llama-server closed at the moment
        of reuse is replaced silently: no byte of an answer had come, so it had not taken the request.
        """
        extra = "".join([f"{name}: {value}\r\n" for name, value in headers])
        about = f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n" if method != "GET" else ""
        message = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._fixed}{about}{extra}\r\n".encode("latin-1")
        while True:
            connection, reused = await self._connection()
            head = connection.send(method, message, body)
            try:
                return await head
            except BackendGone:
                if not (reused and connection.untouched):
                    raise
            except asyncio.CancelledError:
                connection.abort()
                raise

    async def get(self, path: str, within: float) -> tuple[int, bytes]:
        """Status and body of a small GET that may take `within` seconds."""
        try:
            async with asyncio.timeout(within):
                reply = await self.request("GET", path)
                return reply.status, await reply.read(8 * 1024 * 1024)
        except TimeoutError:
            raise BackendTimeout(f"llama-server did not answer {path} within {within:g} s") from None

    def sweep(self, now: float) -> None:
        """Call it every second or so: ends requests whose backend has been silent for too long.

        One pass over the connections in use is cheaper than a timer for each request or token.
        """
        for connection in tuple(self._all):
            if connection.state not in (State.HEAD, State.BODY) or connection.paused or connection.heard:
                connection.heard = False
                connection.silent_since = now
            elif now - connection.silent_since > self._silence:
                connection.abort(BackendTimeout(f"llama-server sent nothing for {self._silence:g} s"))

    def close(self) -> None:
        """Close all connections for good; requests under way, and all that come, end with BackendGone."""
        self._closed = True
        for connection in tuple(self._all):
            connection.abort()

    @property
    def in_use(self) -> int:
        return len(self._all) - len(self._idle)

    # --- the connections' side

    def give_back(self, connection: Connection, reusable: bool) -> None:
        transport = connection.transport
        assert transport is not None
        unsent = transport.get_write_buffer_size() > 0  # it answered without having read the whole request
        if reusable and not unsent and not transport.is_closing() and len(self._idle) < MAX_IDLE_CONNECTIONS:
            self._idle.append(connection)
        else:
            connection.state = State.CLOSED
            self._all.discard(connection)
            transport.abort()  # close() would wait for ever for one who does not read

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    async def _connection(self) -> tuple[Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.state is State.IDLE and connection.transport is not None:
                if not connection.transport.is_closing():
                    return connection, True
        if self._closed:
            raise BackendGone("the connections to llama-server are closed")
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=True if self._tls else None
                )
        except TimeoutError:
            raise BackendTimeout(f"no connection to llama-server within {self._connect_timeout:g} s") from None
        except OSError as error:
            raise BackendGone(f"no connection to llama-server: {error.strerror or error}") from None
        self._all.add(connection)
        if self._closed:  # meanwhile
            connection.abort()
            raise BackendGone("the connections to llama-server are closed")
        return connection, False
