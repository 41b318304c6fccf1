"""Reading the audit: which requests are wanted, and a page of them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from gateway.stores.records.audit import COLUMNS
from gateway.stores.records.db import Database

MOST_LISTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which requests are asked for. `since` (included) and `until` (not) are unix seconds; `status` is a number, or a
    class such as `5xx`.

    Newest first, and `before` the id that a page ended with; or with `after`, oldest first from behind that id.
    """

    limit: int = 100
    since: float | None = None
    until: float | None = None
    key: str | None = None
    model: str | None = None
    status: str | None = None
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """`next` is what to continue with, as `before` or `after`; None where that was all."""

    rows: list[dict[str, Any]]
    next: int | None


async def requests(database: Database, wanted: Wanted) -> Page:
    """Raises Unavailable."""
    return await database.query(lambda connection: listed(connection, wanted))


def listed(connection: sqlite3.Connection, wanted: Wanted) -> Page:
    conditions, values = conditions_of(wanted)
    ascending = wanted.after is not None
    limit = min(wanted.limit, MOST_LISTED)
    sql = (
        f"SELECT id, {', '.join(COLUMNS)} FROM requests WHERE {' AND '.join(conditions)} "
        f"ORDER BY id {'ASC' if ascending else 'DESC'} LIMIT ?"
    )
    names = ["id", *COLUMNS]
    rows = [dict(zip(names, row, strict=True)) for row in connection.execute(sql, (*values, limit))]
    for row in rows:
        row["stream"] = bool(row["stream"])
    return Page(rows, rows[-1]["id"] if len(rows) == limit else None)


def conditions_of(wanted: Wanted) -> tuple[list[str], list[object]]:
    """In SQL, with their values. A condition with `+` uses no index: the rows are walked in the order of their ids."""
    conditions, values = ["TRUE"], list[object]()

    def add(condition: str, *given: object) -> None:
        conditions.append(condition)
        values.extend(given)

    if wanted.before is not None:
        add("id < ?", wanted.before)
    if wanted.after is not None:
        add("id > ?", wanted.after)
    if wanted.since is not None:  # ids are in the order of the ends, so one that began then may stand anywhere behind
        first = "SELECT min(+id) FROM requests INDEXED BY requests_ts WHERE ts >= ?"
        add(f"+ts >= ? AND id >= ({first})", wanted.since, wanted.since)
    if wanted.until is not None:
        add("+ts < ?", wanted.until)
    for column, value in (("key_id", wanted.key), ("model", wanted.model)):
        if value is not None:
            add(f"{column} = ?", value)
    if wanted.status is not None:
        if wanted.status.endswith("xx"):
            add("status BETWEEN ? AND ?", int(wanted.status[0]) * 100, int(wanted.status[0]) * 100 + 99)
        else:
            add("status = ?", int(wanted.status))
    return conditions, values
