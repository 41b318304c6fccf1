"""A splice between two transports that only record: one side is fed by hand, the other is read back."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from gateway.backend import Backend
from gateway.connection import Connection, Reply
from gateway.errors import CorralError
from gateway.pipeline.account import Meter
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.splice import Headers, Splice


class Wire(asyncio.Transport):
    """Keeps every write by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closing = self.aborted = self.paused = False

    @property
    def data(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: Any) -> None:
        assert not self.closing, "written to a closed transport"
        assert data, "an empty write"
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def get_write_buffer_size(self) -> int:
        return 0


def head(status: int, headers: Headers) -> bytes:
    return f"HTTP/1.1 {status} X\r\n".encode() + b"".join(f"{n}: {v}\r\n".encode() for n, v in headers) + b"\r\n"


class Rig:
    """One request on its way; `client` and `upstream` are the two wires."""

    def __init__(self, dialect: Dialect = Dialect.CHAT, *, stream: bool = True, chunked: bool = True) -> None:
        self.client, self.upstream = Wire(), Wire()
        meter = Meter(asyncio.get_running_loop().time)
        self.splice = Splice(self.client, head, dialect, meter, stream=stream, chunked=chunked)
        self.connection = Connection(Backend("http://127.0.0.1:1"))
        self.connection.connection_made(self.upstream)
        self.reply: asyncio.Future[Reply] = self.connection.send("POST", b"POST", b"{}")
        self.skip_progress = False
        self.relaying: asyncio.Task[CorralError | None] | None = None

    def say(self, *pieces: bytes) -> None:
        """What llama-server's socket gives; the answer's way begins when its head is whole."""
        for piece in pieces:
            if not self.upstream.closing:
                self.connection.data_received(piece)
            if self.relaying is None and self.reply.done():
                self.splice.begin(self.reply.result(), skip_progress=self.skip_progress)
                self.relaying = asyncio.ensure_future(self._relay(self.reply.result()))

    def hang_up(self) -> None:
        if not self.upstream.closing:
            self.upstream.closing = True
            self.connection.connection_lost(None)

    async def _relay(self, reply: Reply) -> CorralError | None:
        try:
            await reply.relay(self.splice)
        except CorralError as error:
            return error
        return self.splice.failure

    async def end(self) -> CorralError | None:
        """As a door does it: an error after the beginning is told inside the answer."""
        assert self.relaying is not None
        error = await self.relaying
        if error is not None and self.splice.begun:
            self.splice.fail(error)
        return error

    async def turn(self) -> None:
        """The relay has had time to begin."""
        for _ in range(3):
            await asyncio.sleep(0)


class Seen:
    """What an HTTP client makes of the bytes on its wire. Its decoder is naive, and strict."""

    def __init__(self, wire: Wire) -> None:
        raw_head, found, self.raw = wire.data.partition(b"\r\n\r\n")
        assert found, "no head"
        first, *lines = raw_head.decode().split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        self.body, self.ended, rest = b"", False, self.raw
        if "transfer-encoding" not in self.headers:
            self.body = rest
            self.ended = len(rest) == int(self.headers.get("content-length", -1)) or wire.closing
            return
        while rest:
            line, found, rest = rest.partition(b"\r\n")
            assert found and not self.ended
            size = int(line.partition(b";")[0], 16)
            assert rest[size : size + 2] == b"\r\n", "a chunk is not whole"
            self.body += rest[:size]
            self.ended = size == 0
            rest = rest[size + 2 :]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges) if end > begin]


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(*events: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return SSE + b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(chunks(event) for event in events) + end


def chunks(data: bytes, sizes: list[int] | None = None) -> bytes:
    out, at = b"", 0
    for size in [*(sizes or []), len(data)]:
        piece = data[at : at + size]
        if piece:
            out += b"%x\r\n%b\r\n" % (len(piece), piece)
        at += size
    return out


def lasting(*parts: bytes) -> bytes:
    """A body that ends with its connection."""
    return SSE + b"\r\n" + b"".join(parts)


def counted(*parts: bytes, kind: bytes = b"text/event-stream") -> bytes:
    body = b"".join(parts)
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)
