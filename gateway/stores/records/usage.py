"""Who has used what: per UTC day, key and model; and what each key has taken of its daily budget.

Both are tallied in memory, cumulatively and without a lock. The writer's thread adds to the file what a tally has grown
by since it was last written, so nothing is lost while the disk refuses.
"""

from __future__ import annotations

import sqlite3
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from gateway.stores.records.audit import Request
from gateway.stores.records.db import Database
from gateway.stores.records.rows import BATCH_ROWS, Bell, Rows

DAY = 86_400
KEEP_DAYS = 3  # a tally in memory, and a budget in the file

SCHEMA = """
CREATE TABLE usage (
    day TEXT NOT NULL, key_id TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL, tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL, tokens_cached INTEGER NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (day, key_id, model)
) WITHOUT ROWID;
CREATE INDEX usage_key ON usage (key_id, day);
CREATE TABLE budgets (
    key_id TEXT NOT NULL, day TEXT NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (key_id, day)
) WITHOUT ROWID;
"""
COUNTS = ("requests", "tokens_in", "tokens_out", "tokens_cached", "seconds")

_USAGE = f"INSERT INTO usage (day, key_id, model, {', '.join(COUNTS)})"
_MORE_USAGE = "ON CONFLICT DO UPDATE SET " + ", ".join(f"{name} = {name} + excluded.{name}" for name in COUNTS)
_BUDGETS = "INSERT INTO budgets (key_id, day, tokens)"
_MORE_BUDGET = "ON CONFLICT DO UPDATE SET tokens = tokens + excluded.tokens"


class Tally:
    """Counts since the start of the process, by one thread; `written` and what leads there is the writer's."""

    __slots__ = ("counts", "dirty", "name", "written")

    def __init__(self, name: tuple[Any, ...], width: int) -> None:
        self.name = name
        self.counts: list[float] = [0] * width
        self.written: Sequence[float] = (0,) * width
        self.dirty = False


class Changed:
    """The tallies that have grown. The order makes it exact without a lock: who counts counts first and marks then, the
    writer clears the mark first and reads then. What it reads half counted is marked again behind it."""

    def __init__(self, bell: Bell) -> None:
        self._bell = bell
        self._dirty: deque[Tally] = deque()
        self._taken: list[tuple[Tally, list[float]]] = []

    def mark(self, tally: Tally) -> None:
        if not tally.dirty:
            tally.dirty = True
            self._dirty.append(tally)
            if not self._bell.awake:
                self._bell.ring()

    def growth(self) -> list[tuple[Tally, list[float]]]:
        """By how much each has grown; the same again until `done`."""
        if not self._taken:
            for _ in range(min(len(self._dirty), BATCH_ROWS)):
                tally = self._dirty.popleft()
                tally.dirty = False
                self._taken.append((tally, list(tally.counts)))
        return [
            (tally, [now - then for now, then in zip(counts, tally.written, strict=True)])
            for tally, counts in self._taken
        ]

    def done(self) -> None:
        for tally, counts in self._taken:
            tally.written = counts
        self._taken = []


class Usage:
    """A store (see db.Store). One thread counts: the event loop, or the writer itself."""

    def __init__(self, bell: Bell) -> None:
        self._tallies: dict[tuple[int, str, str], Tally] = {}
        self._changed = Changed(bell)
        self._newest = 0

    def add_request(self, record: Request) -> None:
        """Counts on the day on which the request came. What is refused without a key is nobody's."""
        if not record.key_id:
            return
        day = int(record.ts // DAY)
        name = (day, record.key_id, record.model)
        tally = self._tallies.get(name)
        if tally is None:
            tally = self._begin(name)
        counts, usage = tally.counts, record.usage
        counts[0] += 1
        counts[1] += usage.prompt
        counts[2] += usage.completion
        counts[3] += usage.cached
        counts[4] += record.model_ms / 1000
        if not tally.dirty:
            self._changed.mark(tally)

    def _begin(self, name: tuple[int, str, str]) -> Tally:
        day = name[0]
        if day > self._newest:
            self._newest = day
            self._tallies = {other: tally for other, tally in self._tallies.items() if other[0] > day - KEEP_DAYS}
        tally = self._tallies[name] = Tally(name, len(COUNTS))
        return tally

    # The writer's thread

    def opened(self, connection: sqlite3.Connection) -> None:
        """There is nothing to read."""

    def pending(self) -> list[Rows]:
        rows = [
            (iso_day(tally.name[0]), *tally.name[1:], *map(int, grown[:4]), grown[4])
            for tally, grown in self._changed.growth()
        ]
        return [Rows(_USAGE, rows, _MORE_USAGE)]

    def written(self) -> None:
        self._changed.done()

    def tidy(self, connection: sqlite3.Connection, now: float) -> bool:
        """A row for each key, model and day is little: it is kept for ever."""
        return False


class Budgets:
    """A store (see db.Store): tokens that a key has used on a day, kept over restarts. `day` counts from 1970-01-01."""

    def __init__(self, bell: Bell) -> None:
        self._stored: dict[tuple[str, str], int] = {}  # as they were when the file was first opened
        self._opened = False
        self._tallies: dict[tuple[str, int], Tally] = {}
        self._changed = Changed(bell)
        self._newest = 0

    def load(self, key: str, day: int) -> int:
        tally = self._tallies.get((key, day))
        return self._stored.get((key, iso_day(day)), 0) + (int(tally.counts[0]) if tally else 0)

    def add(self, key: str, day: int, tokens: int) -> None:
        tally = self._tallies.get((key, day))
        if tally is None:
            if day > self._newest:
                self._newest = day
                self._forget()
            tally = self._tallies[key, day] = Tally((key, day), 1)
        tally.counts[0] += tokens
        self._changed.mark(tally)

    def _forget(self) -> None:
        oldest = self._newest - KEEP_DAYS
        self._tallies = {name: tally for name, tally in self._tallies.items() if name[1] > oldest}

    # The writer's thread

    def opened(self, connection: sqlite3.Connection) -> None:
        if not self._opened:
            rows = connection.execute("SELECT key_id, day, tokens FROM budgets")
            self._stored = {(key, day): tokens for key, day, tokens in rows}
            self._opened = True

    def pending(self) -> list[Rows]:
        rows = [(tally.name[0], iso_day(tally.name[1]), int(grown[0])) for tally, grown in self._changed.growth()]
        return [Rows(_BUDGETS, rows, _MORE_BUDGET)]

    def written(self) -> None:
        self._changed.done()

    def tidy(self, connection: sqlite3.Connection, now: float) -> bool:
        connection.execute("DELETE FROM budgets WHERE day < ?", (iso_day(int(now // DAY) - KEEP_DAYS),))
        return False


def iso_day(day: int) -> str:
    """`day` counts from 1970-01-01."""
    return date.fromordinal(day + 719_163).isoformat()


@dataclass(frozen=True, slots=True)
class Line:
    """What a key used of a model on a day; `seconds` are those of the model's time."""

    date: str
    key: str
    model: str
    requests: int
    tokens_in: int
    tokens_out: int
    tokens_cached: int
    seconds: float


async def usage(
    database: Database, key_id: str | None, since_day: str, until_day: str, model: str | None = None
) -> list[Line]:
    """By day, key and model, both days included; `key_id` None: of all keys. Raises Unavailable."""
    return await database.query(lambda connection: used(connection, key_id, since_day, until_day, model))


def used(
    connection: sqlite3.Connection, key_id: str | None, since_day: str, until_day: str, model: str | None = None
) -> list[Line]:
    conditions, values = ["day BETWEEN ? AND ?"], [since_day, until_day]
    for column, value in (("key_id", key_id), ("model", model)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    sql = (
        f"SELECT day, key_id, model, {', '.join(COUNTS)} FROM usage WHERE {' AND '.join(conditions)} "
        "ORDER BY day, key_id, model"
    )
    return [Line(*row) for row in connection.execute(sql, values)]
