"""A server that answers as a test writes it, byte by byte, and a backend client before it that must leak nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.backend import Backend
from gateway.connection import Reply
from tests.house import soon


@dataclass
class Turn:
    """One request, as it came, and the way to answer it."""

    connection: int  # the first is 0
    number: int  # of the request on its connection
    method: str
    path: str
    head: str
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()
            await asyncio.sleep(0)

    async def gone(self) -> None:
        """Returns when the client has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def hang_up(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


Answer = Callable[[Turn], Awaitable[object]]


@dataclass
class Server:
    answer: Answer
    port: int = 0
    connections: int = 0
    open: int = 0
    turns: list[Turn] = field(default_factory=list)
    reads_bodies: bool = True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection, number = self.connections, 0
        self.connections += 1
        self.open += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, path, _ = head.partition("\r\n")[0].split(" ")
                length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
                body = await reader.readexactly(int(length or 0)) if self.reads_bodies else b""
                turn = Turn(connection, number, method, path, head, body, reader, writer)
                self.turns.append(turn)
                await self.answer(turn)
                number += 1
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            writer.close()


@contextlib.asynccontextmanager
async def served(answer: Answer, **how: Any) -> AsyncIterator[Server]:
    server = Server(answer, **how)
    listener = await asyncio.start_server(server._serve, "127.0.0.1", 0)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()
    await soon(lambda: server.open == 0)


@contextlib.asynccontextmanager
async def connected(port: int, **how: Any) -> AsyncIterator[Backend]:
    """A client that at its end has nothing in use, and after `close` nothing at all."""
    backend = Backend(f"http://127.0.0.1:{port}", **how)
    yield backend
    assert backend.in_use == 0, "a connection is still taken for in use"
    assert not [each for each in backend._idle if each not in backend._all]
    backend.close()
    assert not backend._all and not backend._idle


@contextlib.asynccontextmanager
async def talking(answer: Answer, **how: Any) -> AsyncIterator[tuple[Server, Backend]]:
    async with served(answer) as server, connected(server.port, **how) as backend:
        yield server, backend


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port whose queue of connections is full: whoever comes waits."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


class Gathering:
    """A Sink that keeps everything and insists on the order of things."""

    def __init__(self) -> None:
        self.raw: list[bytes] = []
        self.payload = b""
        self.ended = False

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        assert not self.ended, "something came after the end"
        self.raw.append(raw)
        self.payload += payload
        self.ended = last


async def ask(backend: Backend, method: str = "POST", body: bytes = b"{}") -> tuple[int, bytes]:
    reply = await backend.request(method, "/x", body)
    return reply.status, await reply.read()


async def whole(reply: Reply) -> Gathering:
    sink = Gathering()
    await reply.relay(sink)
    return sink


def http(body: bytes = b"hello", *headers: str, status: str = "200 OK") -> bytes:
    """A whole answer with a length."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + end
