"""What the records add up to: how many requests, how they ended, how long they took; over all, by model and by key.

A percentile is the nearest rank: of n values in order, the p-th is the one at place ceil(p / 100 * n), counted from 1.
Times are milliseconds. A request belongs to the moment at which it came.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PERCENTILES = (50, 95, 99)
MOST_GROUPS = 1000  # rows of errors that are told, the most frequent first

_TIMES = {
    "response_time_stats": "duration_ms",
    "queue_ms": "queue_ms",
    "load_ms": "load_ms",
    "ttft_ms": "ttft_ms",
}
_STATS = ("avg", "min", "max", *(f"p{percent}" for percent in PERCENTILES))
_COLUMNS = f"model, key_id, status, tokens_in, tokens_out, tokens_cached, {', '.join(_TIMES.values())}"

_ENDS = "count(*), coalesce(sum(status < 400), 0), coalesce(sum(status >= 400), 0)"
_TOKENS = "coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0), coalesce(sum(tokens_cached), 0)"
# The model's own time of requests that it has answered: without the wait for a place and for a load.
_ANSWERED = "ttft_ms IS NOT NULL AND tokens_out > 0"
_SPEED = (
    f"sum(CASE WHEN {_ANSWERED} THEN tokens_out END) / "
    f"nullif(sum(CASE WHEN {_ANSWERED} THEN max(duration_ms - queue_ms - load_ms, 0) END) / 1000, 0)"
)
_NUMBERS = f"{_ENDS}, coalesce(sum(status BETWEEN 400 AND 498), 0), coalesce(sum(status = 499), 0), {_TOKENS}, {_SPEED}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which requests: `since` is included, `until` is not; unix seconds."""

    since: float | None = None
    until: float | None = None
    key: str | None = None
    model: str | None = None

    def where(self) -> tuple[str, list[object]]:
        """In SQL, with the values."""
        conditions, values = ["TRUE"], list[object]()
        for condition, value in (
            ("ts >= ?", self.since),
            ("ts < ?", self.until),
            ("key_id = ?", self.key),
            ("model = ?", self.model),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        return " AND ".join(conditions), values


def summary(connection: sqlite3.Connection, asked: Asked) -> dict[str, Any]:
    """Counts, times and tokens: of all, and under `per_model` and `per_key` of each."""
    condition, values = asked.where()
    connection.execute("PRAGMA temp_store = MEMORY")  # the file may be on a disk that is full
    connection.execute(f"CREATE TEMP TABLE chosen AS SELECT {_COLUMNS} FROM requests WHERE {condition}", values)
    whole = _numbers(connection, "''").get("") or _numbers_of((0,) * 8 + (None,))
    return whole | {"per_model": _numbers(connection, "model"), "per_key": _numbers(connection, "key_id")}


def _numbers(connection: sqlite3.Connection, by: str) -> dict[str, dict[str, Any]]:
    """By the value of the column `by`, or of a constant; nothing where there are no requests."""
    found = connection.execute(f"SELECT {by} AS g, {_NUMBERS} FROM chosen GROUP BY g ORDER BY g")
    groups = {name: _numbers_of(tuple(counts)) for name, *counts in found}
    for title, column in _TIMES.items():
        for name, stats in _stats(connection, by, column):
            groups[name][title] = stats
    return groups


def _stats(connection: sqlite3.Connection, by: str, column: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each group with such times. All are sorted at once, so that a group's values lie in a row of row ids; window
    functions take three times as long."""
    connection.execute(
        f"CREATE TEMP TABLE sorted AS SELECT {column} AS v FROM chosen WHERE v IS NOT NULL ORDER BY {by}, v"
    )
    before = 0
    for name, n, *plain in connection.execute(
        f"SELECT {by} AS g, count(*), avg({column}), min({column}), max({column}) FROM chosen "
        f"WHERE {column} IS NOT NULL GROUP BY g ORDER BY g"
    ).fetchall():
        places = [before + (n * percent + 99) // 100 for percent in PERCENTILES]
        ranked = [
            connection.execute("SELECT v FROM sorted WHERE rowid = ?", (place,)).fetchone()[0] for place in places
        ]
        yield name, dict(zip(_STATS, (*plain, *ranked), strict=True))
        before += n
    connection.execute("DROP TABLE sorted")


def _numbers_of(counts: tuple[Any, ...]) -> dict[str, Any]:
    total, successful, failed, rejected, cancelled, tokens_in, tokens_out, tokens_cached, speed = counts
    return {
        "total_requests": total,
        "successful": successful,
        "failed": failed,
        "rejected": rejected,
        "cancelled": cancelled,
        "success_rate": successful / total if total else None,
        **{title: dict.fromkeys(_STATS) for title in _TIMES},
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "tokens_cached": tokens_cached,
        "tokens_per_second": speed,
    }


def requests(connection: sqlite3.Connection, asked: Asked, bucket: int) -> dict[str, Any]:
    """How many came in each `bucket` of seconds, by route and by status; `asked` names both ends."""
    assert asked.since is not None and asked.until is not None
    connection.execute("BEGIN")
    condition, values = asked.where()
    begin = int(asked.since // bucket) * bucket
    found = connection.execute(
        f"SELECT CAST((ts - ?) / ? AS INTEGER) AS b, {_ENDS}, {_TOKENS}, avg(duration_ms), max(duration_ms) "
        f"FROM requests WHERE {condition} GROUP BY b",
        (begin, bucket, *values),
    )
    names = "total_requests successful failed tokens_in tokens_out tokens_cached avg_ms max_ms".split()
    filled = {number: dict(zip(names, counts, strict=True)) for number, *counts in found}
    empty = dict.fromkeys(names[:6], 0) | dict.fromkeys(names[6:])
    count = -int(-(asked.until - begin) // bucket)
    routes = connection.execute(
        f"SELECT route, {_ENDS} FROM requests WHERE {condition} GROUP BY route ORDER BY 2 DESC, 1", values
    )
    statuses = connection.execute(
        f"SELECT status, count(*) FROM requests WHERE {condition} GROUP BY status ORDER BY status", values
    )
    return {
        "bucket_seconds": bucket,
        "buckets": [{"ts": begin + number * bucket} | filled.get(number, empty) for number in range(count)],
        "per_route": [dict(zip(("route", *names[:3]), row, strict=True)) for row in routes],
        "per_status": [{"status": status, "count": number} for status, number in statuses],
    }


def errors(connection: sqlite3.Connection, asked: Asked) -> dict[str, Any]:
    """What went wrong, how often and when last, with the id of the last request that it happened to.

    `code` is null where the client left (499).
    """
    connection.execute("BEGIN")
    condition, values = asked.where()
    failed = f"FROM requests WHERE {condition} AND status >= 400"

    def told(*names: str) -> list[dict[str, Any]]:
        columns = ", ".join(_COLUMN[name] for name in names)
        # beside a lone max(), SQLite takes the other columns from the row that has it
        sql = (
            f"SELECT {columns}, count(*), max(ts), request_id {failed} GROUP BY {columns} "
            f"ORDER BY count(*) DESC, max(ts) DESC LIMIT {MOST_GROUPS}"
        )
        titles = (*names, "count", "last_seen", "request_id")
        return [dict(zip(titles, row, strict=True)) for row in connection.execute(sql, values)]

    (total,) = connection.execute(f"SELECT count(*) {failed}", values).fetchone()
    return {
        "total_errors": total,
        "errors": told("code", "status", "model", "key"),
        "per_code": told("code", "status"),
        "per_model": told("model"),
        "per_key": told("key"),
    }


_COLUMN = {"code": "error", "status": "status", "model": "model", "key": "key_id"}
