"""One connection to a llama-server: a response's head, its body in whole chunks, its end; no sockets are opened here.

A body is not parsed: whole chunks are handed to a `Sink` as they come, as raw bytes (chunk framing included) and as
payload.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Protocol, cast

from gateway.errors import BackendError, BackendGone, CorralError
from gateway.framing import ChunkReader, Framing, read_head

MAX_HEAD_BYTES = 64 * 1024
MAX_JOINED_BYTES = 64 * 1024  # a larger body is not copied to stand in one piece with its head
MAX_AHEAD_BYTES = 256 * 1024  # held for a sink that is not attached yet


class Pool(Protocol):
    """Where a connection belongs."""

    def give_back(self, connection: Connection, reusable: bool) -> None:
        """Its request has ended."""

    def forget(self, connection: Connection) -> None:
        """It is closed."""


class Sink(Protocol):
    """Where a body goes. Called from the loop's read callback, so it must neither block nor raise."""

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        """`raw` is whole chunks with their framing (or plain bytes where the body is not chunked), `payload` what is
        in them. `last` comes once, with the body's end; a chunked body's terminator is never in `raw`."""


# Takes what has come if it is one whole chunk; False where it has to go the long way, through `Sink.feed`.
Straight = Callable[[bytes], bool]


class State(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    CLOSED = auto()


class Connection(asyncio.Protocol):
    """One connection to a llama-server and the one request that it may be serving."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.state = State.IDLE
        self.heard = True  # since the last sweep
        self.silent_since = 0.0
        self.paused = False
        self.head: asyncio.Future[Reply] | None = None
        self.done: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._straight: Straight | None = None
        self._through: Straight | None = None  # the same, while a chunk begins with what comes next
        self._buffer = b""
        self._method = "GET"
        self._got_bytes = False
        self._framing = Framing.NONE
        self._keep_alive = False
        self._left = 0  # bytes of a body of known length still to come
        self._chunked = ChunkReader()
        self._lost = False  # closed by the other side before anyone wanted the body, and how
        self._lost_by: Exception | None = None

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.heard = True
        through = self._through
        if through is not None and through(data):
            return
        if self.state is State.BODY:
            if self._sink is None:
                self._hold(data)
            elif self._framing is Framing.CHUNKED:
                self._chunks(data)
            else:
                self._body(data)
        elif self.state is State.HEAD:
            self._got_bytes = True
            self._head(data)
        else:  # bytes that nobody asked for: the connection cannot be trusted any more
            self.abort()

    def eof_received(self) -> None:
        return None  # the transport closes; connection_lost decides what that means

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        if self.state is State.BODY and self._sink is None:
            self._lost, self._lost_by = True, exc  # the whole body may have come already: attach() will see
            return
        state, self.state = self.state, State.CLOSED
        if state is State.HEAD:
            self._fail(BackendGone("llama-server closed the connection before it answered"))
        elif state is State.BODY:
            self._cut(exc)

    # --- the request's side

    def send(self, method: str, message: bytes, body: bytes) -> asyncio.Future[Reply]:
        assert self.transport is not None
        assert self.state is State.IDLE
        self.state, self._method, self._got_bytes = State.HEAD, method, False
        self._buffer, self._sink = b"", None
        self.heard = True
        self.head = self._loop.create_future()
        self.done = self._loop.create_future()
        if len(body) < MAX_JOINED_BYTES:
            self.transport.write(message + body)
        else:
            self.transport.writelines((message, body))
        return self.head

    def attach(self, sink: Sink) -> None:
        if self.state is not State.BODY:
            return  # it has failed already, and `done` says how
        self._sink = sink
        held, self._buffer = self._buffer, b""
        if self.paused:
            self.resume()
        if held or (self._left == 0 and self._framing in (Framing.LENGTH, Framing.NONE)):
            self._body(held)
        if self._lost and self.state is State.BODY:
            self.state = State.CLOSED
            self._cut(self._lost_by)

    def go_straight(self, sink: Sink, straight: Straight | None) -> None:
        """Whole chunks go to `straight` from now on; the sink asks for that while it is fed, or takes it back."""
        if sink is self._sink:
            self._straight, self._through = straight, None

    def pause(self) -> None:
        if not self.paused and self.transport is not None and not self.transport.is_closing():
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused and self.transport is not None:
            self.paused = False
            self.heard = True
            if not self.transport.is_closing():
                self.transport.resume_reading()

    def abort(self, error: CorralError | None = None) -> None:
        """Close at once; llama-server takes that as a cancellation."""
        state, self.state = self.state, State.CLOSED
        self._pool.forget(self)
        if state in (State.HEAD, State.BODY):
            self._fail(error or BackendGone("the connection to llama-server was closed"))
        if self.transport is not None:
            self.transport.abort()

    @property
    def untouched(self) -> bool:
        """No byte of an answer came: on a reused connection the request may safely be sent again."""
        return not self._got_bytes

    # --- parsing

    def _head(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        while True:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._buffer = data
                if len(data) > MAX_HEAD_BYTES:
                    self.abort(BackendError("llama-server sent a response head of more than 64 KiB"))
                return
            head, data = data[:end], data[end + 4 :]
            try:
                told = read_head(self._method, head)
            except ValueError as error:
                self.abort(BackendError(f"llama-server sent a response head that is not HTTP: {error}"))
                return
            if told.status >= 200:
                break
        framing = self._framing = told.framing
        self._left, self._lost = told.length, False
        if framing is Framing.CHUNKED:
            self._chunked = ChunkReader()
        self._keep_alive = told.keep_alive and framing is not Framing.UNTIL_CLOSE
        self._buffer = data
        self.state = State.BODY
        waiting, self.head = self.head, None  # it will hold the reply, which refers to this connection
        assert waiting is not None
        if waiting.cancelled():
            self.abort()
        else:
            waiting.set_result(Reply(self, told.status, told.headers, framing))

    def _hold(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) > MAX_AHEAD_BYTES:
            self.pause()

    def _body(self, data: bytes) -> None:
        assert self._sink is not None
        if self._framing is Framing.CHUNKED:
            self._chunks(data)
        elif self._framing is Framing.UNTIL_CLOSE:
            self._sink.feed(data, data, False)
        else:
            if len(data) > self._left:  # more than was announced
                data, self._keep_alive = data[: self._left], False
            self._left -= len(data)
            self._sink.feed(data, data, self._left == 0)
            if self._left == 0:
                self._end()

    def _chunks(self, data: bytes) -> None:
        assert self._sink is not None
        try:
            raw, payload, last = self._chunked.feed(data)
        except ValueError as error:
            self.abort(BackendError(f"llama-server sent a bad chunk: {error}"))
            return
        if raw or last:
            self._sink.feed(raw, payload, last)
        self._through = self._straight if self._straight is not None and self._chunked.between else None
        if last:
            self._keep_alive = self._keep_alive and not self._chunked.excess
            self._end()

    # --- ends

    def _end(self) -> None:
        self._straight = self._through = None
        if self.state is State.BODY:
            self.state = State.IDLE
            self._pool.give_back(self, self._keep_alive and not self.paused)
        self._sink = None
        if self.done is not None and not self.done.done():
            self.done.set_result(None)

    def _cut(self, exc: Exception | None) -> None:
        """The other side has closed the connection while a body was on its way."""
        if self._framing is Framing.UNTIL_CLOSE and exc is None and self._sink is not None:
            self._sink.feed(b"", b"", True)
            self._end()
        else:
            self._fail(BackendGone("llama-server closed the connection in the middle of its answer"))

    def _fail(self, error: CorralError) -> None:
        self._sink = self._straight = self._through = None
        for future in (self.head, self.done):
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # it may be that nobody waits for this one
                if future is self.head:
                    break


class Reply:
    """A response whose head has come. Whoever holds it must read, relay or close it."""

    __slots__ = ("_connection", "_done", "framing", "headers", "status")

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str], framing: Framing) -> None:
        assert connection.done is not None
        self._connection = connection
        self._done = connection.done  # this request's own: the connection itself goes on to others
        self.status = status
        self.headers = headers
        self.framing = framing

    async def relay(self, sink: Sink) -> None:
        """Hand the body to `sink` until its end.

        Raises BackendGone if it is cut, BackendTimeout if the backend falls silent. On cancellation the connection
        is closed, which frees llama-server's slot.
        """
        if not self._done.done():
            self._connection.attach(sink)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise

    async def read(self, limit: int = 64 * 1024 * 1024) -> bytes:
        """The whole body; raises BackendError if it is longer than `limit` bytes."""
        collector = _Collector(self, limit)
        await self.relay(collector)
        return b"".join(collector.parts)

    async def beginning(self, most: int) -> bytes:
        """The body, or its first `most` bytes: of a longer one the rest is not read, and the connection is closed."""
        collector = _Collector(self, most)
        with contextlib.suppress(_TooLong):
            await self.relay(collector)
        return b"".join(collector.parts)

    def close(self, error: CorralError | None = None) -> None:
        """Close the connection if the body has not ended; whoever relays it gets `error`."""
        if self._connection.done is self._done and (self._done.cancelled() or not self._done.done()):
            self._connection.abort(error)  # still this request's; a cancelled waiter cancels the future it waits for

    def go_straight(self, sink: Sink, straight: Straight | None) -> None:
        """See Connection.go_straight."""
        if not self._done.done():
            self._connection.go_straight(sink, straight)

    def pause(self) -> None:
        if not self._done.done():
            self._connection.pause()

    def resume(self) -> None:
        if not self._done.done():
            self._connection.resume()


class _TooLong(BackendError):
    pass


class _Collector:
    def __init__(self, reply: Reply, limit: int) -> None:
        self._reply, self._left = reply, limit
        self.parts: list[bytes] = []

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        self.parts.append(payload[: self._left])
        if len(payload) > self._left:
            self._reply.close(_TooLong("llama-server's answer is larger than the gateway accepts"))
        self._left -= min(len(payload), self._left)
