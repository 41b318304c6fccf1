"""`/openapi.json`, and `/docs`, which shows it; both are made when they are first asked for."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from functools import lru_cache
from pathlib import Path

from aiohttp import web

from gateway.errors import NotFound
from gateway.http.pages import Part, answer, made

FOLDER = Path(__file__).parent / "page"


async def specification(request: web.Request) -> web.Response:
    """`GET /openapi.json`. Browsers of other origins may read it, where `CORS_ORIGINS` lets them."""
    return answer(request, await asyncio.to_thread(_specification))


async def page(request: web.Request) -> web.Response:
    """`GET /docs`."""
    found = await asyncio.to_thread(_files)
    below = request.path.count("/") > 1  # /swagger/index.html: what the page names lies one folder above
    return answer(request, found["below" if below else "docs.html"])


async def part(request: web.Request) -> web.Response:
    """`GET /docs/{file}`. Raises NotFound."""
    name = request.match_info["file"]
    if name not in ("docs.css", "docs.js"):
        raise NotFound("the reference has no such file")
    return answer(request, (await asyncio.to_thread(_files))[name])


@lru_cache(maxsize=1)
def _specification() -> Part:
    from gateway.http.openapi import document  # brings YAML along

    body = document.encoded()
    return Part("application/json", body, gzip.compress(body, 9, mtime=0), hashlib.sha256(body).hexdigest()[:24])


@lru_cache(maxsize=1)
def _files() -> dict[str, Part]:
    found = {path.name: made(path, path.read_bytes()) for path in FOLDER.iterdir()}
    html = found["docs.html"].plain
    for here, above in ((b'data-root=""', b'data-root="../"'), (b'href="', b'href="../'), (b'src="', b'src="../')):
        html = html.replace(here, above)
    html = html.replace(b'href="../#', b'href="#').replace(b'href=".././', b'href="../')
    return found | {"below": made(FOLDER / "docs.html", html)}
