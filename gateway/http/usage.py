"""`GET /v1/usage`: what a key has used, by day and model; of all keys for administrators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

import msgspec
from aiohttp import web

from gateway.errors import BadRequest, InsufficientScope
from gateway.http.context import KEY, RUNTIME
from gateway.stores.keys.file import Key
from gateway.stores.records.usage import COUNTS, Line

DEFAULT_DAYS = 30
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_PARAMETERS = ("since", "until", "key", "model")


async def usage(request: web.Request) -> web.Response:
    """Days are those of UTC, both included; without `since`, 30 days up to `until`, which is today."""
    query = request.query
    for name in query:
        if name not in _PARAMETERS:
            raise BadRequest(f"{name[:40]!r} is no parameter; there are: {', '.join(_PARAMETERS)}", param=name[:40])
    since, until = days(query.get("since"), query.get("until"), datetime.now(UTC).date())
    key_id = whose(request[KEY], query.get("key") or None)
    model = query.get("model") or None
    runtime = request.app[RUNTIME]
    asked = (key_id, since.isoformat(), until.isoformat(), model)
    lines = await runtime.books.used(*asked)
    body: dict[str, Any] = {"object": "usage"}
    if runtime.shared_usage is not None:
        shared = await runtime.shared_usage.used(lines, *asked)
        lines = lines if shared is None else shared
        body["gateways"] = "this one" if shared is None else "all"
    body |= {"data": lines, "total": total(lines)}
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


def days(since: str | None, until: str | None, today: date) -> tuple[date, date]:
    """Raises BadRequest."""
    last = _day("until", until) if until else today
    first = _day("since", since) if since else date.fromordinal(max(1, last.toordinal() - DEFAULT_DAYS + 1))
    if first > last:
        raise BadRequest(f"since, {first}, is after until, {last}", param="since")
    return first, last


def whose(key: Key, asked: str | None) -> str | None:
    """The key id whose usage is told; None: of all keys. Raises InsufficientScope."""
    if key.has("admin"):
        return asked
    if asked is not None and asked != key.id:
        raise InsufficientScope(f"the key {key.id} sees its own usage only; that of others needs the scope admin")
    return key.id


def total(lines: Sequence[Line]) -> dict[str, Any]:
    return {name: sum(getattr(line, name) for line in lines) for name in COUNTS}


def _day(name: str, text: str) -> date:
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise BadRequest(f"{name} is {text[:40]!r}: must be a day, YYYY-MM-DD", param=name)
