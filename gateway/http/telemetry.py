"""`/v1/telemetry/summary|requests|errors`: what the records add up to; for administrators."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from aiohttp import web

from gateway.errors import BadRequest
from gateway.http.context import RUNTIME
from gateway.http.logs import UNITS, moment
from gateway.stores.records import telemetry
from gateway.stores.records.telemetry import Asked

DEFAULT_SECONDS = 86_400
MOST_BUCKETS = 1500
USUAL_BUCKETS = 100  # at most so many, where nobody says how long one is
_STEPS = (1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 86_400)
_BUCKET = re.compile(r"(\d{1,6})([smhdw]?)", re.ASCII)
_PARAMETERS = ("since", "until", "key", "model")


async def summary(request: web.Request) -> web.Response:
    asked = questions(request.query, time.time())
    return await _answered(request, asked, lambda connection: telemetry.summary(connection, asked))


async def requests(request: web.Request) -> web.Response:
    now = time.time()
    asked = questions(request.query, now, "bucket")
    if asked.until is None:
        asked = replace(asked, until=now)
    bucket = bucket_seconds(request.query.get("bucket"), asked)
    return await _answered(request, asked, lambda connection: telemetry.requests(connection, asked, bucket))


async def errors(request: web.Request) -> web.Response:
    asked = questions(request.query, time.time())
    return await _answered(request, asked, lambda connection: telemetry.errors(connection, asked))


async def _answered(
    request: web.Request, asked: Asked, ask: Callable[[sqlite3.Connection], dict[str, Any]]
) -> web.Response:
    found = await request.app[RUNTIME].books.database.query(ask)
    body = {"since": asked.since, "until": asked.until} | found
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def questions(query: Mapping[str, str], now: float, *more: str) -> Asked:
    """Without `since`, the 24 hours up to `until`, or up to now. Raises BadRequest."""
    known = (*_PARAMETERS, *more)
    for name in query:
        if name not in known:
            raise BadRequest(f"{name[:40]!r} is no parameter; there are: {', '.join(known)}", param=name[:40])
    until = moment(query["until"], now, "until") if query.get("until") else None
    since = moment(query["since"], now) if query.get("since") else (until or now) - DEFAULT_SECONDS
    if until is not None and since > until:
        raise BadRequest("since is after until", param="since")
    return Asked(since=since, until=until, key=query.get("key") or None, model=query.get("model") or None)


def bucket_seconds(text: str | None, asked: Asked) -> int:
    """Of one bucket: what is asked for, or what makes a handsome number of them. Raises BadRequest."""
    assert asked.since is not None and asked.until is not None
    length = asked.until - asked.since
    if not text:
        return next((step for step in _STEPS if length / step <= USUAL_BUCKETS), _whole_days(length))
    given = _BUCKET.fullmatch(text)
    seconds = int(given[1]) * UNITS[given[2] or "s"] if given else 0
    if seconds < 1:
        raise BadRequest(f"bucket is {text[:40]!r}: must be such as 60s, 5m or 1h", param="bucket")
    if length / seconds > MOST_BUCKETS:
        raise BadRequest(f"that makes more than {MOST_BUCKETS} buckets: make them longer", param="bucket")
    return seconds


def _whole_days(length: float) -> int:
    day = _STEPS[-1]
    return -int(-length // (USUAL_BUCKETS * day)) * day
