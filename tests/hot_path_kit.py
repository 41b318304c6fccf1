"""A gateway in this process, a llama-server that answers by rote, and a count of the calls that a request costs.

Calls are counted instead of microseconds: they are the same on every machine and on a busy one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar, cast

from gateway.app import listening
from gateway.environment import load_settings
from gateway.logs import logging_to
from gateway.runtime import Runtime, open_runtime
from tests.house import ADMIN, USER, free_port, soon

COUNTED = ("/gateway/", "/aiohttp/", "/multidict/", "/yarl/", "/prometheus_client/", "contextlib.py")
EVENT = b'data: {"choices":[{"finish_reason":null,"index":0,"delta":{"content":" token"}}],"created":1,"model":"m"}\n\n'
FINAL = (
    b'data: {"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"usage":{"completion_tokens":9,'
    b'"prompt_tokens":10,"total_tokens":19}}\n\ndata: [DONE]\n\n'
)
WHOLE = (
    b'{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant","content":"Hello."}}],'
    b'"model":"m","usage":{"completion_tokens":20,"prompt_tokens":10,"total_tokens":30}}'
)
SMALL = (
    b'{"model":"default","max_tokens":20,"messages":[{"role":"system","content":"You are a helpful assistant."},'
    b'{"role":"user","content":"Tell me about llamas."}]}'
)
STREAM = SMALL.replace(b'"max', b'"stream":true,"max')
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Rote(asyncio.Protocol):
    """A llama-server: `{}` to a GET, WHOLE to a POST, and to one that streams only the head; the test says the rest."""

    streaming: asyncio.Transport | None = None  # the last one
    bodies: ClassVar[list[bytes]] = []  # of all POSTs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.got = b""

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, end, body = self.got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not end or len(body) < int(length or 0):
            return
        self.got = b""
        if head.startswith(b"POST"):
            Rote.bodies.append(body)
        if b'"stream":true' in body:
            Rote.streaming = self.transport
            self.transport.write(STREAM_HEAD)
        else:
            answer = WHOLE if head.startswith(b"POST") else b"{}"
            kind = b"Content-Type: application/json\r\n"
            self.transport.write(b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (kind, len(answer), answer))


class Client(asyncio.Protocol):
    """One connection of a client; `got` is all that has come on it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.got = b""

    def data_received(self, data: bytes) -> None:
        self.got += data

    async def until(self, end: bytes, times: int = 1) -> None:
        await soon(lambda: self.got.count(end) >= times)


def request(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: gateway",
        f"Authorization: Bearer {USER}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


@contextlib.asynccontextmanager
async def house(folder: Path) -> AsyncIterator[tuple[Runtime, int]]:
    """A running gateway with everything switched on, and its port."""
    loop = asyncio.get_running_loop()
    upstream = await loop.create_server(Rote, "127.0.0.1", 0)
    keys = folder / "keys"
    keys.write_text(f"user:{USER}\nadmin:{ADMIN} scope=infer,admin\n")
    keys.chmod(0o600)
    environment = {
        "DATA_DIR": str(folder),
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "PORT_HEALTH": str(free_port()),
        "LLAMA_URL": f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}",
        "AUTH_KEYS_FILE": str(keys),
        "MAX_REQUESTS_PER_MINUTE": "100000",
    }
    settings = load_settings(environment, dotenv=None)
    with logging_to(folder, "test", level="INFO", as_json=False, secrets=[USER]) as logs:
        async with open_runtime(settings, logs) as runtime, listening(runtime) as port:
            runtime.accept()
            await soon(lambda: runtime.manager.loaded())
            yield runtime, port
    upstream.close()


async def client(port: int) -> Client:
    _, protocol = await asyncio.get_running_loop().create_connection(Client, "127.0.0.1", port)
    return protocol


async def streaming(port: int) -> tuple[Client, asyncio.Transport]:
    """A client whose stream has begun, and llama-server's side of it."""
    Rote.streaming = None
    one = await client(port)
    one.transport.write(request(STREAM))
    await soon(lambda: Rote.streaming is not None)
    assert Rote.streaming is not None
    return one, Rote.streaming


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts calls of functions, Python's and C's, that are made in the gateway or in what it stands on."""
    found: Counter[str] = Counter()
    ours: dict[CodeType, bool] = {}

    def counted(code: CodeType) -> bool:
        if code not in ours:
            ours[code] = any(part in code.co_filename for part in COUNTED) and "/tests/" not in code.co_filename
        return ours[code]

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and counted(code):
            found[f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname}"] += 1
        elif event == "c_call" and counted(code):
            found[f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname} → {argument.__qualname__}"] += 1

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(None)
