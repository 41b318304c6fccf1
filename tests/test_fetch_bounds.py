"""Fetching media within bounds of size, time and number, and nothing left behind when it ends early."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from gateway.errors import BadRequest, QueueFull
from gateway.pipeline.media.fetch import Lookups, MediaLimits
from tests.fetch_kit import HOST, PNG, fetched, fetcher, image, reference, refusal, serving, talking

LOOPS = ("asyncio", "uvloop")


@pytest.mark.parametrize("told", [True, False])
async def test_the_size_of_all_is_bounded(told: bool) -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        if told:
            response.content_length = 100_000
        await response.prepare(request)
        for _ in range(100):
            await response.write(bytes(1000))
            sent += 1000
        return response

    async with serving(handler) as port:
        url = f"http://{HOST}:{port}/"
        assert len((await fetched(url, MediaLimits(request_bytes=100_000)))[1]) == 100_000
        assert "more than 99999 bytes" in await refusal(url, MediaLimits(request_bytes=99_999))
        one = fetcher(MediaLimits(request_bytes=250_000))
        with pytest.raises(BadRequest, match="more than 250000 bytes"):
            await one.fetch([reference(url)] * 3)
        assert len(await one.fetch([reference(url)] * 2)) == 2  # it starts anew with each request


async def test_what_all_requests_hold_together_is_bounded() -> None:
    async with serving(image) as port:
        one = fetcher(MediaLimits(held_bytes=len(PNG) - 1))
        with pytest.raises(QueueFull):
            await one.fetch([reference(f"http://{HOST}:{port}/")])
        one.limits = MediaLimits()
        for _ in range(3):  # what failed has given it back
            await one.fetch([reference(f"http://{HOST}:{port}/")])
        assert one._held == 0


async def test_so_many_requests_at_once() -> None:
    entered, release = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        entered.set()
        await release.wait()
        return await image(request)

    async with serving(handler) as port:
        one = fetcher(MediaLimits(requests=1))
        url = f"http://{HOST}:{port}/"
        first = asyncio.create_task(one.fetch([reference(url)]))
        await entered.wait()
        with pytest.raises(QueueFull):
            await one.fetch([reference(url)])
        release.set()
        await first
        await one.fetch([reference(url)])


async def head_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X: y\r\n")
        await asyncio.sleep(0.05)


async def body_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.05)


async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    await asyncio.sleep(30)


@pytest.mark.parametrize("talk", [head_for_ever, body_for_ever, silence])
async def test_the_time_of_all_is_bounded(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> None:
    talks: list[asyncio.Task[None]] = []

    async def noted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.append(task)
        await talk(reader, writer)

    async with talking(noted) as port:
        message = await refusal(f"http://{HOST}:{port}/", MediaLimits(seconds=0.3))
        assert message == "the request's media was not fetched within 0.3 s"
        for task in talks:
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
    ],
)
async def test_what_is_no_proper_answer(answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()

    async with talking(talk) as port:
        assert f"{HOST} did not answer properly" in await refusal(f"http://{HOST}:{port}/")


async def test_nobody_there_and_no_tls() -> None:
    async with serving(image) as port:
        assert f"{HOST} cannot be reached" in await refusal(f"https://{HOST}:{port}/")
    assert f"{HOST} cannot be reached" in await refusal(f"http://{HOST}:{port}/")


async def test_one_that_fails_ends_the_others() -> None:
    left = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.path == "/bad":
            return web.Response(status=404)
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with serving(handler) as port:
        with pytest.raises(BadRequest) as refused:
            base = f"http://{HOST}:{port}"
            await fetcher().fetch([reference(f"{base}/slow", "first"), reference(f"{base}/bad", "second")])
        assert refused.value.param == "second"
        await left.wait()


async def test_a_client_that_leaves_ends_it_all() -> None:
    entered, left = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        entered.set()
        try:
            while True:
                await response.write(b"x" * 1000)
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with serving(handler) as port:
        one = fetcher()
        task = asyncio.create_task(one.fetch([reference(f"http://{HOST}:{port}/")]))
        await entered.wait()
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await left.wait()
        assert (one._held, one._requests) == (0, 0)


async def test_lookups_are_absolute_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    release = threading.Event()

    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        asked.append((host, port))
        if host.startswith("slow"):
            release.wait(5)
        if host.startswith("none"):
            raise socket.gaierror(-2, "Name or service not known")
        return [(2, 1, 6, "", ("8.8.8.8", port)), (10, 1, 6, "", ("2606:4700::1111", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    look_up = Lookups(2)
    assert await look_up("a.org", 443) == ["8.8.8.8", "2606:4700::1111"]
    assert await look_up("none.org", 80) == []
    assert asked == [("a.org.", 443), ("none.org.", 80)]
    for _ in range(2):  # nobody waits for them any more, but they are under way
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02):
                await look_up("slow.org", 80)
    with pytest.raises(QueueFull):
        await look_up("a.org", 443)
    release.set()
    while look_up._free < 2:  # noqa: ASYNC110 – threads end when they do
        await asyncio.sleep(0.01)
    assert await look_up("a.org", 443)
