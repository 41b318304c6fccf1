"""What goes wrong at a llama-server, each as its own error; only what was never begun is sent again."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.errors import BackendError, BackendGone, BackendTimeout
from gateway.pipeline.forward import MAX_ERROR_BYTES
from gateway.refusals import MAX_MESSAGE, translate_error, translate_event
from tests.backend_kit import Turn, ask, chunked, connected, deaf_port, http, talking
from tests.fake_llama import FakeLlama
from tests.house import free_port, soon

LOOPS = ("asyncio", "uvloop")


# --- a connection that was closed at the moment of reuse


@pytest.mark.parametrize("how", ["fin", "reset"])
async def test_a_connection_closed_at_the_moment_of_reuse_is_replaced_unnoticed(how: str) -> None:
    async def answer(turn: Turn) -> None:
        if turn.number == 0:
            return await turn.say(http())
        turn.hang_up() if how == "fin" else turn.reset()

    async with talking(answer) as (server, backend):
        assert [await ask(backend) for _ in range(4)] == [(200, b"hello")] * 4
        assert [(turn.connection, turn.number) for turn in server.turns] == [
            (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
        ]  # fmt: skip


async def test_several_stale_connections_are_all_replaced() -> None:
    all_here = asyncio.Event()

    async def answer(turn: Turn) -> None:
        if len(server.turns) == 3:
            all_here.set()
        await all_here.wait()
        turn.hang_up() if turn.number else await turn.say(http())

    async with talking(answer) as (server, backend):
        await asyncio.gather(*(ask(backend) for _ in range(3)))
        assert len(backend._idle) == 3
        assert await ask(backend) == (200, b"hello")
        assert server.connections == 4


async def test_a_new_connection_that_is_closed_without_an_answer_is_not_tried_again() -> None:
    async def answer(turn: Turn) -> None:
        turn.hang_up()

    async with talking(answer) as (server, backend):
        with pytest.raises(BackendGone):
            await ask(backend)
        assert len(server.turns) == 1


async def test_a_request_that_was_being_answered_is_not_sent_again() -> None:
    async def answer(turn: Turn) -> None:
        if turn.number == 0:
            return await turn.say(http())
        await turn.say(b"HTTP/1.1 2")
        turn.hang_up()

    async with talking(answer) as (server, backend):
        await ask(backend)
        with pytest.raises(BackendGone):
            await ask(backend)
        assert len(server.turns) == 2


async def test_an_idle_connection_that_was_closed_is_never_handed_out() -> None:
    async with FakeLlama("close_idle") as fake, connected(fake.port) as backend:
        for _ in range(20):
            assert (await ask(backend, "GET"))[0] == 404
            await soon(lambda: not backend._idle)
        assert len(fake.seen) == 20


# --- nonsense

LONG = b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000
NONSENSE = {
    "garbage": bytes(range(256)) * 8 + b"\r\n\r\n",
    "bad status": b"HTTP/1.1 2OO banana\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "endless head": LONG,
    "no colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "compressed": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "bad chunk": chunked(b"fine", end=b"zz\r\n"),
    "too long a chunk": chunked(b"fine", end=b"1\r\nab\r\n"),
}


@pytest.mark.parametrize("again", [False, True], ids=["new", "reused"])
@pytest.mark.parametrize("says", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_a_backend_error_and_not_tried_again(says: bytes, again: bool) -> None:
    async def answer(turn: Turn) -> None:
        if again and turn.number == 0:
            return await turn.say(http())
        await turn.say(says)
        await turn.gone()

    async with talking(answer) as (server, backend):
        if again:
            await ask(backend)
        with pytest.raises(BackendError) as raised:
            await ask(backend)
        assert type(raised.value) is BackendError and raised.value.status == 502
        assert len(server.turns) == 1 + again


async def test_the_fakes_nonsense_and_deaths_end_as_errors() -> None:
    async with FakeLlama() as fake, connected(fake.port) as backend:
        for order in ("garbage", "bad_head", "die=1", "cut=1"):
            body = b'{"stream": true, "prompt": "{{fake: tokens=3 %b}}"}' % order.encode()
            with pytest.raises(BackendError):
                await (await backend.request("POST", "/v1/completions", body)).read()


async def test_nobody_listens() -> None:
    async with connected(free_port()) as backend:
        with pytest.raises(BackendGone):
            await ask(backend)


async def test_no_connection_in_time() -> None:
    with deaf_port() as port:
        async with connected(port, connect_timeout=0.05) as backend:
            with pytest.raises(BackendTimeout) as raised:
                await ask(backend)
            assert raised.value.status == 504


async def test_an_answer_longer_than_the_bound_is_refused_and_its_connection_closed() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http(b"x" * 1001))

    async with talking(answer) as (_, backend):
        assert len(await (await backend.request("POST", "/x")).read(1001)) == 1001
        with pytest.raises(BackendError):
            await (await backend.request("POST", "/x")).read(1000)
        assert not backend._all


async def test_of_an_error_that_is_too_long_its_beginning_is_read() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http(b"y" * 1000 + b"x"))

    async with talking(answer) as (_, backend):
        assert await (await backend.request("POST", "/x")).beginning(1001) == b"y" * 1000 + b"x"
        assert backend._all
        assert await (await backend.request("POST", "/x")).beginning(1000) == b"y" * 1000
        assert not backend._all


# --- errors that llama-server itself reports


def said(message: str, kind: str = "server_error", code: int = 500) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "type": kind}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "becomes", "code", "message"),
    [
        (400, said("n must be 1", "invalid_request_error"), 400, "invalid_request", "n must be 1"),
        (400, said("too long", "exceed_context_size_error"), 400, "context_length_exceeded", "too long"),
        (500, said("too long", "exceed_context_size_error"), 400, "context_length_exceeded", "too long"),
        (413, said("large", "invalid_request_error"), 413, "invalid_request", "large"),
        (401, said("Invalid API Key", "authentication_error"), 502, "backend_error", "gateway's own key"),
        (403, said("no", "permission_error"), 502, "backend_error", "gateway's own key"),
        (404, said("File Not Found", "not_found_error"), 501, "not_supported", "File Not Found"),
        (501, said("no embeddings", "not_supported_error"), 501, "not_supported", "no embeddings"),
        (503, said("Loading model", "unavailable_error"), 503, "model_loading", "Loading model"),
        (500, said("Missing 'role' in message"), 400, "invalid_request", "Missing 'role' in message"),
        (500, said("image input is not supported - hint: mmproj"), 400, "invalid_request", "mmproj"),
        (500, said("failed to parse grammar"), 400, "invalid_request", "failed to parse grammar"),
        (500, said("[json.exception.out_of_range.403]"), 400, "invalid_request", "json.exception"),
        (500, said("Compute error."), 502, "backend_error", "Compute error."),
        (502, said("invalid"), 502, "backend_error", "invalid"),
        (302, said("moved", "invalid_request_error"), 400, "invalid_request", "moved"),
        (400, b'{"error": {"message": 7}}', 400, "invalid_request", "7"),
        (500, b"", 502, "backend_error", "answered 500"),
        (401, b"<html>", 502, "backend_error", "answered 401"),
        (400, b"<html>", 400, "invalid_request", "could not read"),
        (400, b"\xff\xfe", 400, "invalid_request", "could not read"),
        (400, b"[" * 100_000, 400, "invalid_request", "could not read"),
        (400, b"[]", 400, "invalid_request", "could not read"),
        (400, b"null", 400, "invalid_request", "could not read"),
        (400, b'{"error": "flat"}', 400, "invalid_request", "could not read"),
        (400, b'{"error": {}}', 400, "invalid_request", "could not read"),
        (400, b'{"detail": "x"}', 400, "invalid_request", "could not read"),
    ],
)
def test_llama_servers_errors_become_ours(status: int, body: bytes, becomes: int, code: str, message: str) -> None:
    error = translate_error(status, body)
    shown = error.body()["error"]
    assert (error.status, error.code, shown["code"]) == (becomes, code, code)
    assert message in shown["message"]
    assert (shown["type"] == "invalid_request_error") is (400 <= becomes < 500)
    assert ("Retry-After" in error.headers()) is (becomes == 503)


QUOTED = "[json.exception.out_of_range.406] number overflow parsing "


@pytest.mark.parametrize("text", ["1" * 70_000, 'é"\\漢' * 9_000, "\0" * 20_000], ids=["digits", "escapes", "zeros"])
@pytest.mark.parametrize("status", [400, 500])
def test_what_llama_server_quotes_is_cut(status: int, text: str) -> None:
    body = said(QUOTED + text)
    for cut in (MAX_ERROR_BYTES, *range(3000, 3030), len(body)):
        error = translate_error(status, body[:cut])
        assert (error.status, error.code) == (400, "invalid_request")
        if cut < 3000 + 30 and len(error.message) < MAX_MESSAGE:
            assert error.message == (QUOTED + text)[: len(error.message)]
        else:
            assert len(error.message) == MAX_MESSAGE
            assert error.message == (QUOTED + text)[: MAX_MESSAGE - 1] + "…"


def test_a_failure_of_its_own_stays_one_if_it_is_long() -> None:
    assert translate_error(500, said("Compute error: " + "x" * 100_000)[:MAX_ERROR_BYTES]).status == 502


@pytest.mark.parametrize(
    ("told", "becomes"),
    [(None, "1"), ("7", "7"), ("0", "1"), ("3600", "60"), ("Wed, 21 Oct 2015 07:28:00 GMT", "1"), ("9" * 5000, "1")],
)
@pytest.mark.parametrize("body", [said("slow down", "rate_limit_error", 429), b"<html>"])
def test_a_backend_that_limits(body: bytes, told: str | None, becomes: str) -> None:
    error = translate_error(429, body, told)
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    assert error.headers()["Retry-After"] == becomes


@pytest.mark.parametrize(
    ("event", "becomes", "code"),
    [
        ({"code": 500, "message": "Unexpected empty grammar stack", "type": "server_error"}, 400, "invalid_request"),
        ({"code": 400, "message": "long", "type": "exceed_context_size_error"}, 400, "context_length_exceeded"),
        ({"code": 500, "message": "Context size has been exceeded.", "type": "server_error"}, 502, "backend_error"),
        ({"message": "as commanded"}, 502, "backend_error"),
        ({"code": "x"}, 502, "backend_error"),
        ({}, 502, "backend_error"),
    ],
)
def test_what_it_says_in_a_stream_too(event: dict[str, object], becomes: int, code: str) -> None:
    error = translate_event(event)
    assert (error.status, error.code) == (becomes, code)
