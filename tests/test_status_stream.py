"""The stream of states on a real socket, before a board that the test moves: nothing is missed, nothing piles up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.http import sse, status
from gateway.http.context import KEY, RUNTIME
from gateway.runtime import Runtime
from gateway.state import Board, ModelState, ServiceState
from gateway.stores.keys.file import Key
from tests.house import soon

STREAM = "/v1/models/status/stream"
SECRET = "sk-reader"


@dataclass
class House:
    """The board, the keys by their secrets, and where they can be watched."""

    board: Board = field(default_factory=Board)
    keys: dict[str, Key] = field(default_factory=lambda: {SECRET: Key("reader")})
    port: int = 0
    transports: list[asyncio.Transport] = field(default_factory=list)

    @property
    def readers(self) -> int:
        return len(self.board._listeners)


@contextlib.asynccontextmanager
async def house(*models: str) -> AsyncIterator[House]:
    made = House()
    for model in models:
        made.board.add_model(model, required=False)
    made.board.set_service(ServiceState.LOADING, "loading")
    made.board.refresh()

    @web.middleware
    async def auth(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[KEY] = made.keys[SECRET]
        assert request.transport is not None
        made.transports.append(request.transport)
        return await handler(request)

    app = web.Application(middlewares=[auth])
    settings = SimpleNamespace(auth_enabled=True)
    keys = SimpleNamespace(lookup=made.keys.get)
    app[RUNTIME] = cast(Runtime, SimpleNamespace(board=made.board, settings=settings, keys=keys))
    app.router.add_get(STREAM, status.stream)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.port = runner.addresses[0][1]
    try:
        yield made
    finally:
        await runner.cleanup()
    assert not made.readers


@dataclass
class Reader:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def event(self) -> tuple[str, Any]:
        """The next one; ("", None) at a clean end."""
        lines = (await self._chunk()).decode().splitlines()
        if not lines:
            return "", None
        assert len(lines) == 3 and not lines[2], lines
        name, data = lines[0].removeprefix("event: "), lines[1].removeprefix("data: ")
        assert (f"event: {name}", f"data: {data}") == tuple(lines[:2])
        return name, json.loads(data)

    async def _chunk(self) -> bytes:
        """What the gateway wrote at once; the tests make one change at a time, so that it is one event."""
        size = int(await self.reader.readline(), 16)
        return (await self.reader.readexactly(size + 2))[:size]


@contextlib.asynccontextmanager
async def reading(where: House) -> AsyncIterator[Reader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", where.port)
    writer.write(f"GET {STREAM} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {SECRET}\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert head.startswith(b"http/1.1 200")
    assert b"\r\ncontent-type: text/event-stream\r\n" in head
    assert b"\r\ncache-control: no-cache\r\n" in head
    try:
        yield Reader(reader, writer)
    finally:
        writer.close()


async def sleeping_reader(there: House) -> socket.socket:
    """It has asked for the stream, and reads nothing."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", there.port))
    about = f"Host: x\r\nAuthorization: Bearer {SECRET}"
    await loop.sock_sendall(sock, f"GET {STREAM} HTTP/1.1\r\n{about}\r\n\r\n".encode())
    await soon(lambda: there.readers)
    return sock


async def test_the_whole_state_then_each_change() -> None:
    async with house("a", "b") as there, reading(there) as stream:
        name, told = await stream.event()
        assert name == "full_status"
        assert told["models"].keys() == {"a", "b"}
        assert told["server"].keys() == {"status", "started_at", "updated_at"}
        assert told["summary"] == {"total": 2, "by_status": {"off": 2}}
        there.board.set_model("b", ModelState.LOADING, load_progress=0.5, detail="waits for a")
        name, told = await stream.event()
        assert name == "model_update"
        expected = {"id": "b", "alias": "b", "status": "loading", "load_progress": 0.5, "detail": "waits for a"}
        assert told.items() >= expected.items()
        there.board.set_service(ServiceState.FAILED, "a: no such file")
        name, told = await stream.event()
        assert (name, told["status"]) == ("server_update", "failed")


async def test_a_heartbeat_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sse.HEARTBEAT_SECONDS == 15
    monkeypatch.setattr(sse, "HEARTBEAT_SECONDS", 0.02)
    async with house("a") as there, reading(there) as stream:
        assert (await stream.event())[0] == "full_status"
        for _ in range(3):
            name, told = await stream.event()
            assert (name, told["server_status"]) == ("heartbeat", "ready")
            assert told["timestamp"].endswith("+00:00")
        there.board.set_model("a", ModelState.STARTING)
        seen = [await stream.event() for _ in range(2)]
        assert "model_update" in {name for name, _ in seen}


async def test_a_heartbeat_while_much_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes put it off for no one: neither those that are told nor those of models that the key may not see."""
    monkeypatch.setattr(sse, "HEARTBEAT_SECONDS", 0.2)
    async with house("a", "b") as there:
        there.keys[SECRET] = Key("reader", models=("a",))
        async with reading(there) as stream:
            assert (await stream.event())[0] == "full_status"
            heard: list[str] = []

            async def listen() -> None:
                while "heartbeat" not in heard:
                    heard.append((await stream.event())[0])

            listening = asyncio.create_task(listen())
            async with asyncio.timeout(3):
                for state in itertools.cycle((ModelState.LOADING, ModelState.READY)):
                    there.board.set_model("a", state)
                    there.board.set_model("b", state)
                    if (await asyncio.wait([listening], timeout=0.05))[0]:
                        break
            assert "model_update" in heard


async def test_only_the_models_of_the_key() -> None:
    async with house("a", "b") as there:
        there.keys[SECRET] = Key("reader", models=("a",))
        async with reading(there) as stream:
            assert (await stream.event())[1]["models"].keys() == {"a"}
            there.board.set_model("b", ModelState.LOADING)
            there.board.set_model("a", ModelState.LOADING)
            assert (await stream.event())[1]["id"] == "a"
            there.keys[SECRET] = Key("reader", models=("b",))
            there.board.set_model("b", ModelState.READY)
            name, told = await stream.event()
            assert (name, list(told["models"])) == ("full_status", ["b"])
            there.keys[SECRET] = Key("reader", models=("none",))
            there.board.set_model("b", ModelState.OFF)
            name, told = await stream.event()
            assert (name, told["models"]) == ("full_status", {})


@pytest.mark.parametrize("left", [None, Key("reader", scopes=frozenset({"metrics"}))])
async def test_a_key_that_is_taken_back_ends_the_stream(left: Key | None) -> None:
    async with house("a") as there, reading(there) as stream:
        await stream.event()
        if left is None:
            del there.keys[SECRET]
        else:
            there.keys[SECRET] = left
        there.board.set_model("a", ModelState.LOADING)
        assert await stream.event() == ("", None)


async def test_models_that_come_and_go() -> None:
    async with house("a") as there, reading(there) as stream:
        await stream.event()
        there.board.add_model("b", required=False)
        there.board.set_model("b", ModelState.OFF)
        name, told = await stream.event()
        assert (name, told["models"].keys()) == ("full_status", {"a", "b"})
        there.board.remove_model("a")
        name, told = await stream.event()
        assert (name, list(told["models"])) == ("full_status", ["b"])


async def test_it_ends_with_the_news_that_the_service_drains() -> None:
    async with house("a") as there:
        async with reading(there) as stream:
            await stream.event()
            there.board.set_model("a", ModelState.STOPPING)
            there.board.set_service(ServiceState.DRAINING, "3 requests are running")
            rest = await stream.reader.readuntil(b"0\r\n\r\n")
            assert rest.count(b"event: model_update\n") == rest.count(b"event: server_update\n") == 1
            assert b'{"status":"draining"' in rest
        async with reading(there) as late:
            name, told = await late.event()
            assert (name, told["server"]["status"]) == ("full_status", "draining")
            assert await late.event() == ("", None)


async def test_head() -> None:
    async with house("a") as there:
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(f"HEAD {STREAM} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1


async def test_a_reader_who_leaves_is_forgotten() -> None:
    async with house("a") as there:
        async with reading(there) as stream:
            await stream.event()
            assert there.readers == 1
        await soon(lambda: not there.readers)


async def test_a_reader_who_sleeps_gets_the_newest_state_and_holds_little() -> None:
    """20 MB of changes; what the kernel and the transport hold of them is old, and then comes the last one."""
    async with house("a") as there:
        loop, sock = asyncio.get_running_loop(), await sleeping_reader(there)
        most = 0
        for number in range(20_000):
            there.board.set_model("a", ModelState.CRASHED, error_message=f"{number} {'x' * 1000}")
            await asyncio.sleep(0)
            most = max(most, there.transports[0].get_write_buffer_size())
        there.board.set_model("a", ModelState.READY, error_message="the last word")
        there.board.set_service(ServiceState.DRAINING, "")
        assert 0 < most < 256 * 1024
        got = bytearray()
        while not got.endswith(b"\r\n0\r\n\r\n"):
            got += await loop.sock_recv(sock, 1 << 16)
        sock.close()
        assert len(got) < 10_000_000
        last = bytes(got).rpartition(b"event: model_update\n")[2]
        assert b'"status":"ready"' in last and b"the last word" in last


async def test_a_reader_who_sleeps_does_not_hold_up_the_end() -> None:
    loop = asyncio.get_running_loop()
    async with contextlib.AsyncExitStack() as stack:
        there = await stack.enter_async_context(house("a"))
        sock = await sleeping_reader(there)
        for number in range(5_000):
            there.board.set_model("a", ModelState.CRASHED, error_message=f"{number} {'x' * 1000}")
            await asyncio.sleep(0)
        assert there.transports[0].get_write_buffer_size() > 0
        begun = loop.time()
        await stack.aclose()
        assert loop.time() - begun < 2
        sock.close()


async def test_changes_are_names_and_none_is_lost() -> None:
    board = Board()
    board.add_model("a", required=False)
    with sse.Changes(board) as changes:
        assert await changes.take(0.01) == set()
        for progress in range(100):
            board.set_model("a", load_progress=progress / 100)
        board.set_service(ServiceState.STARTING, "x")
        assert await changes.take(1) == {"a", None}
        assert await changes.take(0.01) == set()
        waiting = asyncio.ensure_future(changes.take(5))
        await asyncio.sleep(0)
        board.set_model("a", load_progress=1.0)
        assert await waiting == {"a"}
    board.set_model("a", load_progress=0.0)
    assert await changes.take(0.01) == set()


def test_an_event_is_three_lines_without_an_id() -> None:
    assert sse.event("full_status", {"a": "1\n2", "b": None}) == (
        b'event: full_status\ndata: {"a":"1\\n2","b":null}\n\n'
    )
