"""What a request and a token cost, in calls; what a slow reader may hold; how large bodies leave the loop free."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from gateway.pipeline.turns import Turns
from tests.hot_path_kit import EVENT, FINAL, SMALL, Client, chunk, client, counting, house, request, streaming
from tests.house import soon

REQUESTS = 20
# A little above what they take today. Whoever needs more should know why, and say so here.
CALLS_PER_REQUEST = 275
CALLS_PER_TOKEN = 16


async def answered(one: Client, message: bytes, times: int) -> None:
    for _ in range(times):
        one.got = b""
        one.transport.write(message)
        await one.until(b"total_tokens")
        assert one.got.startswith(b"HTTP/1.1 200")


async def test_calls_per_request(tmp_path: Path) -> None:
    async with house(tmp_path) as (_, port):
        one = await client(port)
        await answered(one, request(SMALL), 3)
        rounds = []  # on a busy machine a round takes so long that the house's own ticks come in between
        for _ in range(3):
            with counting() as found:
                await answered(one, request(SMALL), REQUESTS)
            rounds.append(found)
        one.transport.close()
    least = min(rounds, key=Counter.total)
    assert least["inference.py:infer"] >= REQUESTS, "the calls are not seen"
    assert least.total() / REQUESTS < CALLS_PER_REQUEST, least.most_common(40)


async def test_calls_per_token(tmp_path: Path) -> None:
    async with house(tmp_path) as (_, port):
        one, upstream = await streaming(port)
        upstream.write(chunk(EVENT) * 60)  # the head is full, and the tail
        await one.until(b" token", 60)
        with counting() as found:
            for number in range(61, 61 + REQUESTS):
                upstream.write(chunk(EVENT))
                await one.until(b" token", number)
        upstream.write(chunk(FINAL) + b"0\r\n\r\n")
        await one.until(b"data: [DONE]")
        one.transport.close()
    assert found["splice.py:Splice._through"] == REQUESTS, "one chunk each"
    assert found.total() / REQUESTS < CALLS_PER_TOKEN, found.most_common(40)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions?x=1"], ids=["short way", "aiohttp's"])
async def test_both_ways_answer_alike(tmp_path: Path, path: str) -> None:
    """Ids and times apart."""
    async with house(tmp_path) as (runtime, port):
        one = await client(port)
        for message in (request(SMALL, path=path), request(b"{", path=path), request(SMALL, "Origin: x", path=path)):
            one.transport.write(message)
        await one.until(b"HTTP/1.1 ", 3)
        await one.until(b"}}", 3)
        heads = [part.partition(b"\r\n\r\n")[0] for part in one.got.split(b"HTTP/1.1 ")[1:]]
        assert [head[:3] for head in heads] == [b"200", b"400", b"200"]
        assert all(b"x-request-id: req_" in head for head in heads)
        assert all(b"\r\nContent-Length: " in head for head in heads)
        series = {name: count.value for name, count in runtime.metrics.requests._series.items()}
        assert series == {
            ("/v1/chat/completions", "POST", "200", "default"): 2,
            ("/v1/chat/completions", "POST", "400", ""): 1,
        }
        one.transport.close()


async def test_a_slow_reader_holds_little(tmp_path: Path) -> None:
    """256 KB: one reading of llama-server's socket. The kernel's own buffers come on top of it."""
    async with house(tmp_path) as (runtime, port):
        one, upstream = await streaming(port)
        one.transport.pause_reading()
        piece = chunk(b"data: " + b"x" * 4086 + b"\n\n")
        upstream.write(piece * 6000)
        (splice,) = runtime.pinger._streams
        await soon(lambda: splice._behind)
        assert splice._reply is not None
        assert splice._reply._connection.paused, "what the kernel does not take, llama-server has to keep"
        held = splice._transport.get_write_buffer_size()
        assert 0 < held <= 256 * 1024
        one.transport.resume_reading()
        await one.until(b"x" * 4086, 6000)
        one.transport.abort()
        await soon(lambda: not runtime.accounts.active)


async def test_large_bodies_take_turns() -> None:
    """No two steps in one turn of the loop, however many wait."""
    turn, running, steps = 0, True, []
    loop = asyncio.get_running_loop()

    def count() -> None:
        nonlocal turn
        turn += 1
        if running:
            loop.call_soon(count)

    async def job(turns: Turns) -> None:
        for _ in range(4):
            await turns.take()
            steps.append(turn)

    count()
    turns = Turns()
    await asyncio.gather(*(job(turns) for _ in range(5)))
    running = False
    assert len(steps) == 20
    assert len(set(steps)) == 20, steps
