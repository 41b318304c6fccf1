"""A SQLite file that may be lost: opened when it is needed, begun anew when it is broken, owned by one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gateway.stores.records.db import Place
from gateway.stores.records.file import SIDES, Claim, claim, make_private

log = logging.getLogger("corral.cache")

RETRY_SECONDS = 30.0
T = TypeVar("T")


class CacheFile(ABC):
    """What is done in it is done in one thread. A disk that refuses is left alone for RETRY_SECONDS."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._claim: Claim | None = None
        self._connection: sqlite3.Connection | None = None
        self._not_before = 0.0

    @abstractmethod
    def opened(self, db: sqlite3.Connection) -> None:
        """See what is there, and make what is not. Raises Strange where it is not ours to read."""

    def guarded(self, act: Callable[[sqlite3.Connection], T]) -> T | None:
        """What `act` gives; None where that cannot be done."""
        if time.monotonic() < self._not_before:
            return None
        for last_try in (False, True):
            try:
                return act(self._connect())
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                if last_try or not isinstance(error, sqlite3.DatabaseError) or not self._begun_anew(error):
                    self._not_before = time.monotonic() + RETRY_SECONDS
                    log.warning("%s cannot be used: %s", self._place.path, error)
                    return None
        return None

    def close(self) -> None:
        self._disconnect()
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def connect(self, path: str) -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        if self._claim is None:
            self._claim = claim(self._place.path, self._place.local, self._place.instance)
        make_private(self._claim.path)
        db = self.connect(str(self._claim.path))
        try:
            db.execute("PRAGMA journal_mode=WAL").fetchall()
            db.execute("PRAGMA synchronous=OFF")  # what a power cut spoils is begun anew
            self.opened(db)
        except BaseException:
            db.close()
            raise
        self._connection = db
        return db

    def _begun_anew(self, error: sqlite3.DatabaseError) -> bool:
        """Whether a broken file was removed."""
        code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
        broken = isinstance(error, Strange) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        if not broken or self._claim is None:
            return False
        log.warning("%s: %s; it is begun anew", self._claim.path, error)
        with contextlib.suppress(OSError):
            for side in reversed(SIDES):
                self._claim.path.with_name(self._claim.path.name + side).unlink(missing_ok=True)
        return True

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None


async def close_in(thread: ThreadPoolExecutor, file: CacheFile, seconds: float) -> None:
    """Ends the one thread that uses `file`; what is on its way is written first, unless the disk hangs."""
    closing = asyncio.wrap_future(thread.submit(file.close))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await asyncio.shield(closing)
    thread.shutdown(wait=False, cancel_futures=True)


class Strange(sqlite3.DatabaseError):
    """Not a file of this version."""


def version_of(db: sqlite3.Connection) -> int:
    """Raises Strange for a file that somebody else has made."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if not version and db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise Strange("it has other tables")
    return version
