"""What the tests of fetching share: names, servers on loopback, and a fetcher that may go there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.errors import BadRequest
from gateway.pipeline.media.fetch import Fetched, MediaFetcher, MediaLimits
from gateway.pipeline.media.find import Reference

PNG = b"\x89PNG" + bytes(range(256)) * 400
HOST = "media.example.org"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def reference(url: str, param: str = "messages[0].content[0].image_url") -> Reference:
    return Reference(url, param, {}, "url", bare=False)


class Names:
    """A name server: the answers of each name, one after the other, the last one again and again."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self.answers.get(host, [["127.0.0.1"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_get("/{path:.*}", handler)
    async with TestServer(app, host="127.0.0.1") as server:
        assert server.port is not None
        yield server.port


@asynccontextmanager
async def talking(talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[int]:
    """A server that says what it likes."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def image(request: web.Request) -> web.StreamResponse:
    return web.Response(body=PNG, content_type="image/png")


def fetcher(limits: MediaLimits | None = None, names: Names | None = None) -> MediaFetcher:
    return MediaFetcher(limits, resolve=names or Names(), allowed=lambda address: address == "127.0.0.1")


async def fetched(url: str, limits: MediaLimits | None = None, names: Names | None = None) -> Fetched:
    return (await fetcher(limits, names).fetch([reference(url)]))[0]


async def refusal(url: str, limits: MediaLimits | None = None, names: Names | None = None) -> str:
    with pytest.raises(BadRequest) as refused:
        await fetched(url, limits, names)
    assert refused.value.param == "messages[0].content[0].image_url"
    return refused.value.message
