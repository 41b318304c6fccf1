"""The proxy that one writes first: an aiohttp server, an aiohttp client, and a loop over the chunks.

Usage: plain_aiohttp.py PORT UPSTREAM
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy

_HOP = ("Connection", "Keep-Alive", "Transfer-Encoding", "Content-Length", "Host")
_SESSION = web.AppKey("session", aiohttp.ClientSession)
_UPSTREAM = web.AppKey("upstream", str)


async def relay(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    url = request.app[_UPSTREAM] + request.path_qs
    async with request.app[_SESSION].request(
        request.method, url, headers=_passed_on(request.headers), data=body or None
    ) as reply:
        if "Content-Length" in reply.headers:
            return web.Response(status=reply.status, headers=_passed_on(reply.headers), body=await reply.read())
        response = web.StreamResponse(status=reply.status, headers=_passed_on(reply.headers))
        await response.prepare(request)
        async for chunk in reply.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


def _passed_on(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    kept = CIMultiDict(headers)
    for name in _HOP:
        kept.popall(name, None)
    return kept


async def _session(app: web.Application) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
        app[_SESSION] = session
        yield


def main() -> None:
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app[_UPSTREAM] = sys.argv[2]
    app.cleanup_ctx.append(_session)
    app.router.add_route("*", "/{path:.*}", relay)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), access_log=None, handler_cancellation=True, print=None)


if __name__ == "__main__":
    main()
