"""The client of a llama-server: answers of every form, connections that are used again, back-pressure."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib

import pytest

from gateway.backend import MAX_IDLE_CONNECTIONS, Backend
from gateway.connection import MAX_AHEAD_BYTES
from gateway.errors import BackendError, BackendGone
from gateway.framing import Framing
from tests.backend_kit import Gathering, Turn, ask, chunked, connected, http, served, talking, whole
from tests.fake_llama import FakeLlama
from tests.house import soon

LOOPS = ("asyncio", "uvloop")
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nhello"
INFORMATION = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Length: 3\r\n\r\n"

# method, what the server says, whether it then closes, status and body, whether the connection may be used again
ANSWERS = {
    "length": ("POST", http(), False, 200, b"hello", True),
    "no body": ("POST", http(b""), False, 200, b"", True),
    "chunked": ("POST", chunked(b"hel", b"lo"), False, 200, b"hello", True),
    "no chunks": ("POST", chunked(), False, 200, b"", True),
    "trailers": ("POST", chunked(b"hello", end=b"0\r\nA: b\r\nC: d\r\n\r\n"), False, 200, b"hello", True),
    "HEAD with length": ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", False, 200, b"", True),
    "HEAD chunked": ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", False, 200, b"", True),
    "204": ("POST", b"HTTP/1.1 204 No Content\r\n\r\n", False, 204, b"", True),
    "304": ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", False, 304, b"", True),
    "1xx first": ("POST", INFORMATION + http(), False, 200, b"hello", True),
    "HTTP/1.0 kept": (
        "POST",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
        False,
        200,
        b"hello",
        True,
    ),
    "an error": ("POST", http(b"no", status="500 Oh"), False, 500, b"no", True),
    "connection: close": ("POST", http(b"hello", "Connection: close"), True, 200, b"hello", False),
    "announced close, not done": ("POST", http(b"hello", "Connection: close"), False, 200, b"hello", False),
    "unannounced close": ("POST", http(), True, 200, b"hello", False),
    "chunked, then close": ("POST", chunked(b"hello"), True, 200, b"hello", False),
    "HTTP/1.0": ("POST", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello", False, 200, b"hello", False),
    "until close": ("POST", UNTIL_CLOSE, True, 200, b"hello", False),
    "until close, empty": ("POST", b"HTTP/1.1 200 OK\r\n\r\n", True, 200, b"", False),
}


@pytest.mark.parametrize("bytewise", [False, True], ids=["at once", "byte by byte"])
@pytest.mark.parametrize(("method", "says", "closes", "status", "body", "reused"), ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_and_whether_its_connection_is_used_again(
    method: str, says: bytes, closes: bool, status: int, body: bytes, reused: bool, bytewise: bool
) -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(*([bytes([byte]) for byte in says] if bytewise else [says]))
        if closes:
            turn.hang_up()

    async with talking(answer) as (server, backend):
        for _ in range(3):
            assert await ask(backend, method) == (status, body)
            if closes:
                await soon(lambda: not backend._idle)
        assert server.connections == (1 if reused else 3)


@pytest.mark.parametrize(
    ("says", "body"),
    [(http() + b"more", b"hello"), (chunked(b"hello") + b"more", b"hello"), (http(b"", status="204 x") + b"more", b"")],
    ids=["length", "chunked", "204"],
)
@pytest.mark.parametrize("together", [True, False])
async def test_bytes_behind_an_answer_cost_the_connection(says: bytes, body: bytes, together: bool) -> None:
    parted = asyncio.Event()

    async def answer(turn: Turn) -> None:
        if together:
            return await turn.say(says)
        await turn.say(says[:-4])
        await parted.wait()
        await turn.say(says[-4:])

    async with talking(answer) as (server, backend):
        assert (await ask(backend))[1] == body
        parted.set()
        await soon(lambda: not backend._all)
        assert (await ask(backend))[1] == body
        assert server.connections == 2


async def test_what_is_sent() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http())

    async with served(answer) as server:
        backend = Backend(f"http://127.0.0.1:{server.port}/base/", key="sk-1")
        large = b"x" * 300_000
        for method, body in (("POST", b"{}"), ("POST", large), ("GET", b""), ("DELETE", b"")):
            reply = await backend.request(method, "/v1/x?y=1", body, content_type="a/b", headers=[("X-A", "é")])
            await reply.read()
        for turn, body in zip(server.turns, (b"{}", large, b"", b""), strict=True):
            assert (turn.path, turn.body) == ("/base/v1/x?y=1", body)
            assert f"\r\nHost: 127.0.0.1:{server.port}\r\n" in turn.head
            assert "\r\nAuthorization: Bearer sk-1\r\n" in turn.head
            assert turn.head.endswith("\r\nX-A: é\r\n\r\n")
            assert (f"\r\nContent-Type: a/b\r\nContent-Length: {len(body)}\r\n" in turn.head) is (turn.method != "GET")
        assert "sk-1" not in repr(backend)
        backend.close()


@pytest.mark.parametrize(
    ("url", "host"),
    [("http://[::1]:81", "[::1]:81"), ("https://x.test", "x.test:443"), ("http://x.test/a", "x.test:80")],
)
def test_the_host_header(url: str, host: str) -> None:
    assert f"Host: {host}\r\n" in Backend(url)._fixed


async def test_raw_chunks_and_payload_reach_the_sink() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(chunked(b"one", b"two;", end=b"0\r\nX: y\r\n\r\n"))

    async with talking(answer) as (_, backend):
        sink = await whole(await backend.request("POST", "/x"))
        assert (b"".join(sink.raw), sink.payload, sink.ended) == (b"3\r\none\r\n4\r\ntwo;\r\n", b"onetwo;", True)
        reply = await backend.request("POST", "/x")
        assert reply.framing is Framing.CHUNKED and reply.headers["transfer-encoding"] == "chunked"
        await reply.read()


CLOSED_AFTER = {
    "length": http(),
    "chunked": chunked(b"hel", b"lo"),
    "until close": UNTIL_CLOSE,
}


@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("says", CLOSED_AFTER.values(), ids=CLOSED_AFTER)
async def test_a_complete_answer_counts_though_the_connection_was_gone_before_it_was_read(
    says: bytes, how: str
) -> None:
    read = asyncio.Event()

    async def answer(turn: Turn) -> None:
        await turn.say(says)
        await read.wait()
        turn.hang_up() if how == "fin" else turn.reset()

    async with talking(answer) as (_, backend):
        reply = await backend.request("POST", "/x")
        await soon(lambda: next(iter(backend._all))._buffer.endswith((b"lo\r\n0\r\n\r\n", b"hello")))
        read.set()
        await soon(lambda: not backend._all)
        if reply.framing is Framing.UNTIL_CLOSE and how == "reset":
            with pytest.raises(BackendGone):  # a reset is no end
                await reply.read()
        else:
            assert await reply.read() == b"hello"


@pytest.mark.parametrize("says", [http(b"hello")[:-1], chunked(b"hello")[:-1], chunked(b"hello", end=b"")])
@pytest.mark.parametrize("late", [True, False])
async def test_a_cut_answer_is_never_taken_for_a_whole_one(says: bytes, late: bool) -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(says)
        turn.hang_up()

    async with talking(answer) as (_, backend):
        reply = await backend.request("POST", "/x")
        if late:
            await soon(lambda: not backend._all)
        with pytest.raises(BackendGone):
            await reply.read()


async def test_an_answer_before_the_body_is_sent() -> None:
    async with FakeLlama("early=413") as fake, connected(fake.port) as backend:
        status, body = await ask(backend, body=b"x" * 8_000_000)
        assert status == 413 and b"answered before the body was read" in body


async def test_a_server_that_does_not_read_is_not_used_again_and_not_waited_for() -> None:
    size = 16_000_000
    held: list[Turn] = []
    looked = asyncio.Event()

    async def answer(turn: Turn) -> None:
        await turn.say(http())
        held.append(turn)
        await looked.wait()

    async with served(answer, reads_bodies=False) as server, connected(server.port) as backend:
        assert await ask(backend, body=b"x" * size) == (200, b"hello")
        assert not backend._all
        got = 0
        with contextlib.suppress(ConnectionError):
            while part := await held[0].reader.read(1 << 20):
                got += len(part)
        assert got < size, "it was closed only when all had been sent"
        looked.set()


async def test_a_slow_reader_stops_the_server_and_gets_everything() -> None:
    chunks = [bytes([number]) * 65_000 for number in range(200)]

    async def answer(turn: Turn) -> None:
        await turn.say(chunked(*chunks))

    class Slow(Gathering):
        def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
            super().feed(raw, payload, last)
            reply.pause()
            self.seen_at_pause = len(self.payload)

    async with talking(answer) as (server, backend):
        reply = await backend.request("POST", "/x")
        sink, rounds = Slow(), 0
        relaying = asyncio.create_task(reply.relay(sink))
        while not sink.ended:
            before = len(sink.payload)
            await soon(lambda before=before: len(sink.payload) > before)  # type: ignore[misc]
            if rounds == 0:
                await soon(lambda: server.turns[0].writer.transport.get_write_buffer_size() > 0)
            assert len(sink.payload) == sink.seen_at_pause, "it was read on"
            reply.resume()
            rounds += 1
        await relaying
        assert rounds > 20
        assert hashlib.sha256(sink.payload).digest() == hashlib.sha256(b"".join(chunks)).digest()


async def test_what_comes_ahead_of_its_reader_is_bounded() -> None:
    size = 20_000_000

    async def answer(turn: Turn) -> None:
        await turn.say(http(b"x" * size))

    async with talking(answer) as (_, backend):
        reply = await backend.request("POST", "/x")
        connection = next(iter(backend._all))
        await soon(lambda: connection.paused)
        assert len(connection._buffer) <= MAX_AHEAD_BYTES + 256 * 1024  # and one read
        assert len(await reply.read()) == size


async def test_pausing_an_answer_that_has_ended_does_not_touch_the_next_one() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http())

    async with talking(answer) as (server, backend):
        first = await backend.request("POST", "/x")
        await first.read()
        second = await backend.request("POST", "/x")
        first.pause()
        first.close(BackendError("late"))
        assert await second.read() == b"hello"
        assert await ask(backend) == (200, b"hello")
        assert server.connections == 1


async def test_a_connection_that_is_paused_at_its_end_is_not_used_again() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http())

    class Pausing(Gathering):
        def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
            super().feed(raw, payload, last)
            reply.pause()

    async with talking(answer) as (server, backend):
        reply = await backend.request("POST", "/x")
        await reply.relay(Pausing())
        assert await ask(backend) == (200, b"hello")
        assert server.connections == 2


async def test_the_pool_is_bounded_and_used() -> None:
    count = MAX_IDLE_CONNECTIONS + 6
    all_here = asyncio.Event()

    async def answer(turn: Turn) -> None:
        if len(server.turns) == count:
            all_here.set()
        await all_here.wait()
        await turn.say(http())

    async with talking(answer) as (server, backend):
        await asyncio.gather(*(ask(backend) for _ in range(count)))
        assert server.connections == count
        assert len(backend._idle) == len(backend._all) == MAX_IDLE_CONNECTIONS
        await soon(lambda: server.open == MAX_IDLE_CONNECTIONS)
        await asyncio.gather(*(ask(backend) for _ in range(10)))
        assert server.connections == count
