"""The wire of the fake llama-server: reads requests and their commands, writes HTTP that may be wrong on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from typing import Any, NoReturn

Commands = dict[str, Any]
TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {501: "not_supported_error", 503: "unavailable_error"}
REASONS = {200: "OK", 204: "No Content", 304: "Not Modified"}


class Over(Exception):
    """This connection has ended."""


def parse_commands(text: str) -> Commands:
    if text.lstrip().startswith("{"):
        return dict(json.loads(text))
    found: Commands = {}
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        try:
            found[name] = json.loads(value) if equals else True
        except ValueError:
            found[name] = value
    return found


def error_body(status: int, message: str) -> dict[str, Any]:
    return {"error": {"code": status, "message": message, "type": TYPES.get(status, "server_error")}}


class Exchange:
    """One request, the commands that hold for it, and the wire under it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, commands: Commands) -> None:
        self.reader, self.writer, self.commands = reader, writer, commands
        self.method = self.path = ""
        self.headers: dict[str, str] = {}
        self.body: dict[str, Any] = {}
        self.held: list[bytes] = []  # events that are to leave as one chunk

    def number(self, name: str, default: float = 0) -> float:
        return float(self.commands.get(name, default))

    async def read_head(self) -> None:
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        self.method, self.path, _version = first.split(" ", 2)
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def read_body(self) -> None:
        raw = b""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                raw += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        else:
            raw = await self.reader.readexactly(int(self.headers.get("content-length", 0)))
        if magic := re.search(rb"\{\{fake:?([^{}]*)\}\}", raw):
            self.commands = self.commands | parse_commands(magic[1].decode())
        with contextlib.suppress(ValueError):
            self.body = json.loads(raw)

    async def raw(self, data: bytes) -> None:
        size = int(self.number("split")) or len(data) or 1
        for start in range(0, len(data), size):
            if self.writer.is_closing():
                raise Over
            self.writer.write(data[start : start + size])
            await self.writer.drain()
            if size < len(data):
                await asyncio.sleep(0.0005)  # long enough that the pieces arrive one by one

    async def head(self, status: int, kind: str, length: int | None) -> None:
        if "info" in self.commands:
            await self.raw(b"HTTP/1.1 %d Information\r\nLink: </x>\r\n\r\n" % self.commands["info"])
        framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}", "Server: llama.cpp", f"Content-Type: {kind}"]
        lines += ["Connection: close"] if "close" in self.commands else ["Keep-Alive: timeout=5, max=100", framing]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def reply(self, status: int, value: object, kind: str = "application/json; charset=utf-8") -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        await self.head(status, kind, len(data))
        await self.raw(b"" if status in (204, 304) else data)

    async def event(self, value: object) -> None:
        self.held.append(b"data: %b\n\n" % (value if isinstance(value, str) else json.dumps(value)).encode())
        if "one_chunk" not in self.commands:
            await self.flush()

    async def flush(self) -> None:
        data = b"".join(self.held)
        self.held.clear()
        if data:
            await self.raw(data if "close" in self.commands else b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.flush()
        if "close" not in self.commands:
            await self.raw(b"0\r\nX-Trailer: yes\r\n\r\n" if "trailers" in self.commands else b"0\r\n\r\n")

    def reset(self) -> NoReturn:
        linger = struct.pack("ii", 1, 0)  # makes the close a RST
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()
        raise Over
