"""A client that leaves gives back its place at once, and llama-server's slot soon after; seen on the real /slots."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.house import ADMIN, USER, Gateway, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

STREAMING_SECONDS = 1.0
WHOLE_SECONDS = 2.0
BATCH_SECONDS = 1.5  # what 256 tokens of prompt may take on a busy machine: llama-server ends its running batch


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("slow"), MODEL_PATH=str(slow_model), CTX="16384", PARALLEL="2", EXTRA_ARGS="-b 256"
    ) as gateway:
        yield gateway


@contextlib.asynccontextmanager
async def long_request(
    gateway: Gateway, *, stream: bool, path: str = "/v1/chat/completions"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request for 10,000 tokens on a connection of its own, which is cut when the block ends."""
    prompt = {"prompt": "tell me"} if "chat" not in path else {"messages": [{"role": "user", "content": "tell me"}]}
    body = json.dumps(prompt | {"max_tokens": 10_000, "stream": stream}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def look(gateway: Gateway, path: str) -> object:
    return await asyncio.to_thread(lambda: gateway.get(path, key=ADMIN).json())


async def busy_slots(gateway: Gateway) -> int:
    return await asyncio.to_thread(gateway.slots_busy)


async def places(gateway: Gateway) -> tuple[int, int]:
    """(taken, waiting)"""
    summary = (await asyncio.to_thread(lambda: gateway.get("/v1/queue/stats").json()))["summary"]
    return summary["total_processing"], summary["total_queued"]


async def until(wanted: object, ask: object, seconds: float) -> float:
    """Seconds until `await ask()` is `wanted`."""
    begun = time.monotonic()
    while (seen := await ask()) != wanted:  # type: ignore[operator]
        assert time.monotonic() - begun < seconds, f"still {seen} after {seconds} s, not {wanted}"
        await asyncio.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/completion"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_in_the_middle_of_the_answer(slow: Gateway, stream: bool, path: str) -> None:
    async with long_request(slow, stream=stream, path=path) as (reader, _):
        if stream:
            await reader.readuntil(b"data: ")
        await until(1, lambda: busy_slots(slow), 5)
        assert await places(slow) == (1, 0)
    await until((0, 0), lambda: places(slow), 0.5)
    await until(0, lambda: busy_slots(slow), (STREAMING_SECONDS if stream else WHOLE_SECONDS) + BATCH_SECONDS)


async def test_a_whole_answer_beside_a_running_stream(slow: Gateway) -> None:
    """llama-server itself would not notice this one before its natural end, 40 s later."""
    async with long_request(slow, stream=True) as (other, _):
        await other.readuntil(b"data: ")
        async with long_request(slow, stream=False):
            await until(2, lambda: busy_slots(slow), 5)
        await until((1, 0), lambda: places(slow), 0.5)
        await until(1, lambda: busy_slots(slow), WHOLE_SECONDS + BATCH_SECONDS)


async def test_while_queued(slow: Gateway) -> None:
    async with long_request(slow, stream=True), long_request(slow, stream=False):
        await until((2, 0), lambda: places(slow), 5)
        async with long_request(slow, stream=True), long_request(slow, stream=False):
            await until((2, 2), lambda: places(slow), 5)
        await until((2, 0), lambda: places(slow), 0.5)
    await until((0, 0), lambda: places(slow), 0.5)
    await until(0, lambda: busy_slots(slow), WHOLE_SECONDS + BATCH_SECONDS)


async def test_before_the_first_token(slow: Gateway) -> None:
    """It leaves while its prompt is processed; the slot is free after the batch that runs."""
    text = "word " * 2500
    body = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 100, "stream": True}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", slow.port)
    writer.write(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await until(1, lambda: busy_slots(slow), 5)
    writer.transport.abort()
    await until((0, 0), lambda: places(slow), 0.5)
    await until(0, lambda: busy_slots(slow), STREAMING_SECONDS + BATCH_SECONDS)


async def test_the_next_request_takes_the_place(slow: Gateway) -> None:
    async with long_request(slow, stream=True) as (first, _), long_request(slow, stream=True) as (second, _):
        await first.readuntil(b"data: ")
        await second.readuntil(b"data: ")
        answer = asyncio.create_task(asyncio.to_thread(slow.chat, "hi", max_tokens=4))
        await until((2, 1), lambda: places(slow), 5)
    assert (await answer).status == 200
    assert b"499" in slow.get("/metrics", key=None).body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_what_was_made_until_then_is_counted(slow: Gateway, stream: bool, path: str) -> None:
    """Who leaves before the end has had these tokens all the same: on limits, in records and metrics."""
    wanted = 20

    async def made() -> bool:
        slots = await asyncio.to_thread(lambda: slow.get("/upstream/slow/slots", key=ADMIN).json())
        return any(slot["is_processing"] and slot["next_token"][0]["n_decoded"] > wanted + 5 for slot in slots)

    async with long_request(slow, stream=stream, path=path):
        await until(True, made, 10)

    async def told() -> bool:
        newest = await asyncio.to_thread(lambda: slow.get("/logs?limit=1", key=ADMIN).json()["logs"])
        mine = [one for one in newest if (one["status"], one["route"], one["stream"]) == (499, path, stream)]
        return any(one["tokens_out"] >= wanted and 4 <= one["tokens_in"] < 40 for one in mine)

    await until(True, told, 5)
    await until(0, lambda: busy_slots(slow), WHOLE_SECONDS + BATCH_SECONDS)


async def test_who_has_read_it_to_its_end_has_not_left(gateway: Gateway) -> None:
    """Only the connection's own end came after the client had gone."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True}).encode()
    for number in range(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
            f"x-request-id: read-{number}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await reader.readuntil(b"data: [DONE]\n\n")
        writer.transport.abort()

    async def statuses() -> list[int]:
        rows = await asyncio.to_thread(lambda: gateway.get("/logs?limit=30", key=ADMIN).json()["logs"])
        return [row["status"] for row in rows if row["request_id"].startswith("read-")]

    await until([200] * 30, statuses, 5)
