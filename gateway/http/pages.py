"""The dashboard: a page and its parts, which hold no data. Files are read once, when the first of them is asked for."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from aiohttp import web

from gateway.errors import NotFound
from gateway.http.context import RUNTIME

FOLDER = Path(__file__).parent / "dashboard"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # to be asked for each time, and answered with 304
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class Part:
    """A file as it is sent, plain or in gzip."""

    kind: str
    plain: bytes
    zipped: bytes
    etag: str


async def page(request: web.Request) -> web.Response:
    """`GET /`. It says whether the gateway asks for keys at all: without them there is nothing to sign in to."""
    name = "index.html" if request.app[RUNTIME].settings.auth_enabled else "index.html, open"
    return answer(request, (await asyncio.to_thread(parts))[name])


async def part(request: web.Request) -> web.Response:
    """`GET /dashboard/{file}`. Raises NotFound."""
    found = (await asyncio.to_thread(parts)).get(request.match_info["file"])
    if found is None:
        raise NotFound("the dashboard has no such file")
    return answer(request, found)


def answer(request: web.Request, found: Part) -> web.Response:
    zipped = "gzip" in request.headers.get("Accept-Encoding", "")
    tag = f"{found.etag}-gzip" if zipped else found.etag
    headers = HEADERS | {"ETag": f'"{tag}"'}
    known = request.if_none_match or ()
    if any(one.value in (tag, "*") for one in known):
        return web.Response(status=304, headers=headers)
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=found.zipped if zipped else found.plain, headers=headers | {"Content-Type": found.kind})


@lru_cache(maxsize=1)
def parts() -> dict[str, Part]:
    """By name. Blocking at its first call."""
    found = {path.name: made(path, path.read_bytes()) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    index = FOLDER / "index.html"
    opened = found["index.html"].plain.replace(b'data-keys="asked"', b'data-keys="none"', 1)
    return found | {"index.html, open": made(index, opened)}


def made(path: Path, body: bytes) -> Part:
    kind = f"{TYPES[path.suffix]}; charset=utf-8"
    return Part(kind, body, gzip.compress(body, 9, mtime=0), hashlib.sha256(body).hexdigest()[:24])
