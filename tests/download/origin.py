"""An HTTP server that misbehaves on command."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from aiohttp.test_utils import BaseTestServer

MIB = 1 << 20
BODY = b"GGUF" + os.urandom(3 * MIB)
DIGEST = hashlib.sha256(BODY).hexdigest()
Twist = Callable[[web.Request, "Origin"], Awaitable[web.StreamResponse]]


class Origin:
    """Serves `body` with ranges and an ETag; `twists` answer the first requests instead, one each."""

    def __init__(self) -> None:
        self.body = BODY
        self.validators = {"ETag": '"v1"'}
        self.twists: list[Twist] = []
        self.requests: list[web.Request] = []
        self.release = asyncio.Event()
        self.server: BaseTestServer

    @property
    def starts(self) -> list[float]:
        """Where each request began, in megabytes; what was on its way when a connection dropped is lost."""
        ranges = (request.headers.get("Range", "bytes=0-") for request in self.requests)
        return [math.ceil(int(r[6:-1]) / MIB * 2) / 2 for r in ranges]

    def url(self, path: str = "/model.gguf") -> str:
        return str(self.server.make_url("/")).rstrip("/") + path

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("User-Agent") != "corral":  # another test that looks for its own server here
            return web.Response(status=404)
        self.requests.append(request)
        if self.twists:
            return await self.twists.pop(0)(request, self)
        return await self.answer(request)

    async def answer(self, request: web.Request, until: int | None = None, start: int = 0) -> web.StreamResponse:
        """The rest from the range's start, cut at byte `until`."""
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        valid = request.headers.get("If-Range", "") in ("", *self.validators.values())
        start = int(asked[1]) if asked and valid else 0
        if start > len(self.body):
            return web.Response(status=416)
        response = web.StreamResponse(status=206 if start else 200, headers=self.validators)
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        response.content_length = len(self.body) - start
        await response.prepare(request)
        await response.write(self.body[start:until])
        if until is not None:
            cut(request)
        await response.write_eof()
        return response


def cut(request: web.Request) -> None:
    """Drops the connection once what was written has gone out."""
    assert request.transport is not None
    request.transport.close()


def drops_at(until: int) -> Twist:
    return lambda request, origin: origin.answer(request, until)


def status(code: int, **headers: str) -> Twist:
    async def twist(request: web.Request, origin: Origin) -> web.StreamResponse:
        return web.Response(status=code, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return twist


def body(data: bytes, **headers: str) -> Twist:
    async def twist(request: web.Request, origin: Origin) -> web.StreamResponse:
        return web.Response(body=data, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return twist


async def hangs_after_a_megabyte(request: web.Request, origin: Origin) -> web.StreamResponse:
    response = web.StreamResponse(headers=origin.validators)
    response.content_length = len(origin.body)
    await response.prepare(request)
    await response.write(origin.body[:MIB])
    await origin.release.wait()
    return response


class Sleeps(list[float]):
    """Keeps what was to be slept, and only lets the others run."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
