"""Answers that were given before, in a file of their own and, the last ones, in memory.

One thread owns the file. A file that is broken is begun anew, for nothing in it is lost that cannot be had again; a
disk that refuses or hangs makes every look a miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from gateway.stores.cache.file import CacheFile, Strange, close_in, version_of
from gateway.stores.records.db import Place

MOST_ENTRY = 1 << 20  # bytes of one answer
MOST_BYTES = 256 << 20  # of all
MOST_ENTRIES = 100_000
MOST_AT_HAND = 32 << 20  # bytes of those that are in memory too
MOST_WAITING = 32 << 20  # bytes on their way to the disk
LOOK_SECONDS = 0.5  # a slower disk is a miss
TIDY_SECONDS = 60.0
OVERHEAD = 200  # bytes of an entry beside its body
VERSION = 1

SCHEMA = f"""
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, content_type TEXT NOT NULL, made_at REAL NOT NULL, until REAL NOT NULL, used REAL NOT NULL,
    size INTEGER NOT NULL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used, size);
CREATE INDEX IF NOT EXISTS answers_until ON answers (until, size);
PRAGMA user_version = {VERSION};
"""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """An answer's payload as llama-server sent it; `made_at` is unix seconds."""

    body: bytes
    content_type: str
    made_at: float

    @property
    def size(self) -> int:
        return len(self.body) + OVERHEAD


class Answers(Protocol):
    """Where answers are kept. None of its methods raises for a store that is away."""

    kind: str

    def at_hand(self, key: str) -> Stored | None:
        """What can be had without waiting."""

    async def get(self, key: str) -> Stored | None: ...

    def put(self, key: str, stored: Stored) -> None:
        """Returns at once."""

    async def clear(self) -> int:
        """Forgets all; returns how many there were, as far as that is known."""

    def facts(self) -> dict[str, int | None]:
        """`entries`, `bytes`, `evicted`; None where that is not known here."""

    async def close(self) -> None: ...


class AtHand:
    """The last answers, in memory; oldest use first."""

    def __init__(self, seconds: float, most: int = MOST_AT_HAND) -> None:
        self._seconds, self._most = seconds, most
        self._held: OrderedDict[str, Stored] = OrderedDict()
        self.bytes = 0

    def get(self, key: str, now: float) -> Stored | None:
        found = self._held.get(key)
        if found is None:
            return None
        if not 0 <= now - found.made_at < self._seconds:
            self.drop(key)
            return None
        self._held.move_to_end(key)
        return found

    def put(self, key: str, stored: Stored) -> None:
        self.drop(key)
        self._held[key] = stored
        self.bytes += stored.size
        while self.bytes > self._most:
            self.drop(next(iter(self._held)))

    def drop(self, key: str) -> None:
        found = self._held.pop(key, None)
        if found is not None:
            self.bytes -= found.size

    def clear(self) -> None:
        self._held.clear()
        self.bytes = 0


class FileAnswers:
    """`seconds` is how long an answer lives. Opened by its first use."""

    kind = "sqlite"

    def __init__(
        self, place: Place, seconds: float, most: int = MOST_BYTES, clock: Callable[[], float] = time.time
    ) -> None:
        self._place, self._seconds, self._most, self._clock = place, seconds, most, clock
        self._memory = AtHand(seconds)
        self._waiting = self._epoch = 0
        self._closed = False
        self._file = _File(place, seconds, most, clock)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cached answers")

    def at_hand(self, key: str) -> Stored | None:
        found = self._memory.get(key, self._clock())
        if found is not None:
            self._file.touched.add(key)
        return found

    async def get(self, key: str) -> Stored | None:
        found = self.at_hand(key)
        if found is not None:
            return found
        epoch = self._epoch
        found = await self._ask(lambda: self._file.get(key))
        if found is not None and epoch == self._epoch:
            self._memory.put(key, found)
            return found
        return None

    def put(self, key: str, stored: Stored) -> None:
        self._memory.put(key, stored)
        if self._closed or self._waiting + stored.size > MOST_WAITING:
            return
        self._waiting += stored.size
        job = self._thread.submit(self._file.put, key, stored)
        loop = asyncio.get_running_loop()

        def written(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._written, stored.size)

        job.add_done_callback(written)

    def _written(self, size: int) -> None:
        self._waiting -= size

    async def clear(self) -> int:
        self._epoch += 1
        self._memory.clear()
        return 0 if self._closed else await asyncio.wrap_future(self._thread.submit(self._file.clear))

    def facts(self) -> dict[str, int | None]:
        file = self._file
        return {"entries": file.entries, "bytes": file.bytes, "evicted": file.evicted}

    async def close(self, seconds: float = 2.0) -> None:
        """Writes what is on its way, unless the disk hangs."""
        self._closed = True
        await close_in(self._thread, self._file, seconds)

    async def _ask(self, look: Callable[[], T]) -> T | None:
        if self._closed:
            return None
        asked = asyncio.wrap_future(self._thread.submit(look))
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await asked
        except TimeoutError:
            return None


class _File(CacheFile):
    """`touched` and the counts may be seen by other threads."""

    def __init__(self, place: Place, seconds: float, most: int, clock: Callable[[], float]) -> None:
        super().__init__(place)
        self._seconds, self._most, self._clock = seconds, most, clock
        self.entries = self.bytes = self.evicted = 0
        self.touched: set[str] = set()  # used since the last write, in memory
        self._tidy_at = 0.0

    def opened(self, db: sqlite3.Connection) -> None:
        if version_of(db) not in (0, VERSION):
            raise Strange("it was written by another version")
        db.executescript(SCHEMA)
        now = self._clock()
        db.execute("DELETE FROM answers WHERE until < ? OR made_at > ?", (now, now))
        self.entries, self.bytes = db.execute("SELECT count(*), coalesce(sum(size), 0) FROM answers").fetchone()

    def get(self, key: str) -> Stored | None:
        found = self.guarded(lambda db: self._get(db, key))
        if found is not None:
            self.touched.add(key)
        return found

    def put(self, key: str, stored: Stored) -> None:
        self.guarded(lambda db: self._put(db, key, stored))

    def clear(self) -> int:
        return self.guarded(self._clear) or 0

    def _get(self, db: sqlite3.Connection, key: str) -> Stored | None:
        now = self._clock()
        row = db.execute("SELECT body, content_type, made_at FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None or not 0 <= now - row[2] < self._seconds:
            return None
        return Stored(*row)

    def _put(self, db: sqlite3.Connection, key: str, stored: Stored) -> None:
        now = self._clock()
        touched, self.touched = self.touched, set()
        db.execute("BEGIN IMMEDIATE")
        db.executemany("UPDATE answers SET used = ? WHERE key = ?", [(now, one) for one in touched])
        self._remove(db, "key = ?", key)
        made_at = stored.made_at  # it is used when it is made
        row = (key, stored.content_type, made_at, made_at + self._seconds, made_at, stored.size, stored.body)
        db.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self.entries, self.bytes = self.entries + 1, self.bytes + stored.size
        if now >= self._tidy_at:
            self._remove(db, "until < ?", now)
            self._tidy_at = now + TIDY_SECONDS
        while self.bytes > self._most or self.entries > MOST_ENTRIES:
            oldest = "key IN (SELECT key FROM answers WHERE key <> ? ORDER BY used LIMIT 16)"
            if not (gone := self._remove(db, oldest, key)):
                break
            self.evicted += gone
        db.execute("COMMIT")

    def _clear(self, db: sqlite3.Connection) -> int:
        cleared = self.entries
        db.execute("DELETE FROM answers")
        db.execute("VACUUM")
        self.entries = self.bytes = 0
        return cleared

    def _remove(self, db: sqlite3.Connection, which: str, value: object) -> int:
        gone = db.execute(f"DELETE FROM answers WHERE {which} RETURNING size", (value,)).fetchall()
        self.entries -= len(gone)
        self.bytes -= sum(size for (size,) in gone)
        return len(gone)
