"""How requests to a llama-server end before their time: silence, cancellation, the client's own end; nothing leaks."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from gateway.backend import Backend
from gateway.errors import BackendError, BackendGone, BackendTimeout
from tests.backend_kit import Gathering, Turn, ask, chunked, connected, deaf_port, http, served, talking
from tests.clock_loop import settle
from tests.fake_llama import FakeLlama
from tests.house import soon

LOOPS = ("asyncio", "uvloop")


# --- silence: the clock is handed in


async def test_silence_before_the_head_and_in_the_body_ends_the_request() -> None:
    async def answer(turn: Turn) -> None:
        if turn.path == "/body":
            await turn.say(chunked(b"some", end=b""))
        await turn.gone()

    async with talking(answer, silence=600) as (server, backend):
        for path in ("/head", "/body"):
            task = asyncio.create_task(backend.get(path, 60))
            turns = len(server.turns)
            await soon(lambda turns=turns: len(server.turns) > turns)  # type: ignore[misc]
            if path == "/body":
                await soon(lambda: next(iter(backend._all)).state.name == "BODY")
            backend.sweep(1000.0)  # has been heard since
            backend.sweep(1600.0)
            await settle()
            assert not task.done()
            backend.sweep(1600.1)
            with pytest.raises(BackendTimeout, match="600 s"):
                await task


async def test_each_byte_begins_the_silence_anew() -> None:
    more = asyncio.Event()

    async def answer(turn: Turn) -> None:
        await turn.say(http(b"hello")[:-1])
        await more.wait()
        await turn.say(b"o")

    async with talking(answer, silence=600) as (_, backend):
        reply = await backend.request("POST", "/x")
        task = asyncio.create_task(reply.read())
        backend.sweep(0.0)
        next(iter(backend._all)).heard = False
        backend.sweep(599.0)
        more.set()
        await soon(lambda: next(iter(backend._all)).heard)
        backend.sweep(1198.0)
        assert await task == b"hello"


async def test_a_paused_answer_and_an_idle_connection_are_not_silent() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http(b"hello")[: -1 if turn.number else None])
        if turn.number:
            await turn.gone()

    async with talking(answer, silence=600) as (_, backend):
        await ask(backend)
        for now in (0.0, 10_000.0, 20_000.0):
            backend.sweep(now)
        assert len(backend._idle) == 1
        reply = await backend.request("POST", "/x")
        task = asyncio.create_task(reply.relay(Gathering()))
        await asyncio.sleep(0)
        reply.pause()
        for now in (30_000.0, 40_000.0, 50_000.0):
            backend.sweep(now)
        await settle()
        assert not task.done()
        reply.resume()
        backend.sweep(50_001.0)  # a client that reads again gives its server all the time anew
        backend.sweep(50_600.0)
        await settle()
        assert not task.done()
        backend.sweep(50_602.0)
        with pytest.raises(BackendTimeout):
            await task


async def test_a_bounded_get_ends_in_time_and_closes_its_connection() -> None:
    async def answer(turn: Turn) -> None:
        await turn.gone()

    async with talking(answer) as (_, backend):
        with pytest.raises(BackendTimeout, match="/health"):
            await backend.get("/health", 0.02)
        assert not backend._all


# --- cancellation


@pytest.mark.parametrize("where", ["head", "body", "unread"])
async def test_cancelling_closes_the_connection_so_that_the_slot_is_freed(where: str) -> None:
    left = asyncio.Event()

    async def answer(turn: Turn) -> None:
        if where != "head":
            await turn.say(chunked(b"some", end=b""))
        await turn.gone()
        left.set()

    async def request() -> None:
        reply = await backend.request("POST", "/x")
        with contextlib.closing(reply):
            if where == "unread":
                await asyncio.Event().wait()
            await reply.read()

    async with talking(answer) as (server, backend):
        task = asyncio.create_task(request())
        await soon(lambda: server.turns and (where == "head" or next(iter(backend._all)).state.name == "BODY"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not backend._all
        await left.wait()


@pytest.mark.parametrize("first", ["head", "cancellation"])
async def test_cancelling_at_the_very_moment_of_the_head(first: str) -> None:
    async def answer(turn: Turn) -> None:
        await turn.gone()

    async with talking(answer) as (server, backend):
        task = asyncio.create_task(backend.request("POST", "/x"))
        await soon(lambda: server.turns)
        if first == "cancellation":
            task.cancel()
        next(iter(backend._all)).data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n")
        task.cancel()  # the head is there, and nobody has seen it yet
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not backend._all


async def test_cancelling_while_connecting() -> None:
    with deaf_port() as port:
        async with connected(port) as backend:
            task = asyncio.create_task(backend.request("POST", "/x"))
            for _ in range(3):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


# --- the end of the client itself


@pytest.mark.parametrize("again", [False, True], ids=["new", "reused"])
async def test_closing_ends_every_request_and_none_is_sent_again(again: bool) -> None:
    async def answer(turn: Turn) -> None:
        if turn.path == "/first":
            return await turn.say(http())
        if turn.path == "/body":
            await turn.say(chunked(b"some", end=b""))
        await turn.gone()

    async with served(answer) as server:
        backend = Backend(f"http://127.0.0.1:{server.port}")
        if again:
            replies = [await backend.request("GET", "/first") for _ in range(2)]
            await asyncio.gather(*(reply.read() for reply in replies))
        before = len(server.turns)
        tasks = [asyncio.create_task(backend.get(path, 60)) for path in ("/head", "/body")]
        await soon(lambda: len(server.turns) == before + 2)
        backend.close()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, BackendGone)
        with pytest.raises(BackendGone):
            await backend.request("GET", "/late")
        assert not backend._all and not backend._idle
        assert len(server.turns) == before + 2


async def test_closing_while_connecting_leaves_no_connection() -> None:
    async def answer(turn: Turn) -> None:
        await turn.say(http())

    async with served(answer) as server:
        backend = Backend(f"http://127.0.0.1:{server.port}")
        task = asyncio.create_task(backend.request("POST", "/x"))
        await asyncio.sleep(0)
        assert not backend._all
        backend.close()
        with pytest.raises(BackendGone):
            await task
        assert not backend._all and not server.turns


# --- all together


async def test_in_a_storm_every_request_gets_its_own_answer_and_nothing_leaks() -> None:
    orders = [
        "", "", "", "split=50", "close", "close_idle", "one_chunk", "trailers", "info=103", "huge=80000",
        "die=1", "cut=1", "bad_head", "garbage", "early=400", "status=500", "hang=2", "wedge",
    ]  # fmt: skip
    rng = random.Random(4)
    jobs = [(rng.choice(orders), rng.random() < 0.5, rng.random() < 0.15) for _ in range(250)]
    gate = asyncio.Semaphore(10)
    told: dict[str, int] = {}

    async def one(number: int, order: str, stream: bool, hurried: bool) -> None:
        text = f'{{"stream": %s, "max_tokens": 4, "prompt": "{{{{fake: say=w{number}w {order}}}}}"}}'
        body = (text % str(stream).lower()).encode()
        async with gate:
            try:
                bound = 0.02 if order in ("hang=2", "wedge") else rng.random() * 0.02 if hurried else 5
                async with asyncio.timeout(bound):
                    reply = await backend.request("POST", "/v1/completions", body)
                    answer = await reply.read()
                mine = b"x" * 80_000 if order == "huge=80000" else b"w%dw" % number
                assert reply.status != 200 or (mine in answer and answer.count(b"w ") in (0, 4))
                told[order] = told.get(order, 0) + 1
            except TimeoutError:
                assert hurried or order in ("hang=2", "wedge")
            except BackendError:
                assert order in ("die=1", "cut=1", "bad_head", "garbage")

    async with FakeLlama(argv=["-np", "64"]) as fake, connected(fake.port) as backend:
        await asyncio.gather(*(one(number, *job) for number, job in enumerate(jobs)))
        assert backend.in_use == 0
        assert {"", "close", "split=50", "status=500"} <= told.keys()
