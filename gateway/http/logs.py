"""`GET /logs`: the records of requests, newest first, in pages; for administrators."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import msgspec
from aiohttp import web

from gateway.errors import BadRequest
from gateway.http.context import RUNTIME
from gateway.stores.records.reading import MOST_LISTED, Wanted

DEFAULT_LIMIT = 100
_AGO = re.compile(r"(\d{1,9})([smhdw])", re.ASCII)
_LOST_PLUS = re.compile(r"(:\d\d(?:\.\d+)?) (\d\d:?\d\d)$")  # of a zone; in a query a + is a space
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_STATUS = re.compile(r"[1-5](\d\d|xx)")
_PARAMETERS = ("limit", "since", "until", "key", "model", "status", "before", "after")


async def logs(request: web.Request) -> web.Response:
    """`next` is the `before` (with `after`: the `after`) of the page that follows, null where there is none."""
    page = await request.app[RUNTIME].books.requests(wanted(request.query, time.time()))
    body = msgspec.json.encode({"logs": page.rows, "next": page.next})
    return web.Response(body=body, content_type="application/json")


def wanted(query: Mapping[str, str], now: float) -> Wanted:
    """Raises BadRequest."""
    for name in query:
        if name not in _PARAMETERS:
            raise BadRequest(f"{name[:40]!r} is no parameter; there are: {', '.join(_PARAMETERS)}", param=name[:40])
    before, after = (_number(query, name, 0, 2**63 - 1) for name in ("before", "after"))
    if before is not None and after is not None:
        raise BadRequest("before and after exclude each other", param="after")
    status = query.get("status") or None
    if status is not None and not _STATUS.fullmatch(status):
        raise BadRequest(f"status is {status[:40]!r}: must be such as 429 or 5xx", param="status")
    limit = _number(query, "limit", 1, MOST_LISTED)
    return Wanted(
        limit=DEFAULT_LIMIT if limit is None else limit,
        since=moment(query["since"], now) if query.get("since") else None,
        until=moment(query["until"], now, "until") if query.get("until") else None,
        key=query.get("key") or None,
        model=query.get("model") or None,
        status=status,
        before=before,
        after=after,
    )


def moment(text: str, now: float, name: str = "since") -> float:
    """Unix seconds of `1h`, `30m` (ago), of an ISO time (naive: UTC) or of unix seconds. Raises BadRequest."""
    ago = _AGO.fullmatch(text)
    if ago:
        return now - int(ago[1]) * UNITS[ago[2]]
    try:
        if re.fullmatch(r"0|\d{9,11}(\.\d+)?", text, re.ASCII):
            return float(text)
        at = datetime.fromisoformat(_LOST_PLUS.sub(r"\1+\2", text))
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise BadRequest(f"{name} is {text[:40]!r}: must be such as 1h, 30m or an ISO time", param=name) from None


def _number(query: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = query.get(name)
    if not text:
        return None
    number = int(text) if re.fullmatch(r"\d{1,19}", text, re.ASCII) else -1
    if not low <= number <= high:
        raise BadRequest(f"{name} is {text[:40]!r}: must be a whole number, {low} to {high}", param=name)
    return number
