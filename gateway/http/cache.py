"""The response cache, for administrators: what it did and holds, and how to empty it."""

from __future__ import annotations

import msgspec
from aiohttp import web

from gateway.http.context import RUNTIME

_OFF = {"enabled": False, "store": None, "ttl_seconds": None, "embedding": None} | dict.fromkeys(
    ("hits", "misses", "semantic", "shared", "stored", "entries", "bytes", "evicted"), 0
)


async def stats(request: web.Request) -> web.Response:
    """Counts are since the start; `entries`, `bytes` and `evicted` are null where Redis holds the answers."""
    cache = request.app[RUNTIME].spine.cache
    return _json(_OFF if cache is None else cache.stats())


async def clear(request: web.Request) -> web.Response:
    """Also what is being made right now is not kept."""
    cache = request.app[RUNTIME].spine.cache
    return _json({"cleared": 0 if cache is None else await cache.clear()})


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")
