"""One thread owns an SQLite file: it writes what the stores have gathered, in batches, and survives its disk.

A store appends to memory and rings the bell; nobody on the event loop waits for a disk. Within BATCH_SECONDS, or when a
batch is full, the thread asks each store for its rows and commits them together. Rows stay with their store until they
are committed: what a bad disk refused is tried again. A commit is synced (a power cut loses no more than a crash).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gateway.errors import Unavailable
from gateway.stores.records.file import Claim, claim, make_private, set_aside
from gateway.stores.records.rows import BATCH_ROWS, Bell, Rows, Store

log = logging.getLogger("corral.records")

BATCH_SECONDS = 0.4  # a commit costs 0.3 to 0.6 ms of CPU; what a crash loses is this and the commit's own time
RETRY_SECONDS = 5.0
TIDY_SECONDS = 3600.0
BUSY_SECONDS = 5.0  # someone else writes: a person with the sqlite3 shell
READ_SECONDS = 10.0
ASIDE_SECONDS = 60.0  # a disk that spoils each new file must not fill the folder with them

_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
# A row that SQLite cannot take will not get better.
_UNWRITABLE = (
    OverflowError,
    UnicodeError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """The file that is asked for; where to go instead (`local`), and under which name, where it cannot be had."""

    path: Path
    local: Path
    instance: str


class Database:
    """`told` is called by the writer's thread, once for each change: with what is wrong, or None when all is well."""

    def __init__(
        self,
        place: Place,
        migrations: Sequence[str],
        stores: Sequence[Store],
        bell: Bell,
        told: Callable[[str | None], None],
    ) -> None:
        self.problem: str | None = None
        self.set_aside: list[Path] = []
        self.refused = 0  # rows that SQLite cannot take
        self.opened = threading.Event()  # it has been tried once
        self._place, self._migrations, self._stores, self._bell, self._told = place, migrations, stores, bell, told
        self._claim: Claim | None = None
        self._connection: sqlite3.Connection | None = None
        self._inode = 0
        self._flushes: deque[threading.Event] = deque()
        self._suspected = self._closing = False
        self._tidy_at = time.monotonic()
        self._aside_at = -ASIDE_SECONDS
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reading records")

    @property
    def path(self) -> Path | None:
        """The file in use, which may be another one than was asked for; None while there is none."""
        return self._claim.path if self._claim else None

    def start(self) -> None:
        self._bell.hurry()
        self._thread.start()

    def close(self, seconds: float = 5.0) -> None:
        """Writes what is pending. Waits for the disk, but no longer than so many seconds."""
        self._closing = True
        self._bell.hurry()
        self._thread.join(seconds)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def flush(self, seconds: float = 5.0) -> bool:
        """Waits until what was added before has been written, or tried; False where that takes longer."""
        done = threading.Event()
        self._flushes.append(done)
        self._bell.hurry()
        return done.wait(seconds)

    async def query(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        """What `ask` finds, in a thread, on a connection of its own that can only read. Raises Unavailable."""
        reading = asyncio.get_running_loop().run_in_executor(self._readers, self.read, ask)
        try:
            async with asyncio.timeout(READ_SECONDS + 1):
                return await reading
        except TimeoutError:
            raise Unavailable("the records' disk does not answer", retry_after=30) from None

    def read(self, ask: Callable[[sqlite3.Connection], T]) -> T:
        """`query` for a thread that may wait. Raises Unavailable."""
        path, deadline = self.path, time.monotonic() + READ_SECONDS
        if path is None:
            raise Unavailable(f"there are no records: {self.problem or 'they are being opened'}", retry_after=5)
        try:
            with contextlib.closing(
                sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
            ) as connection:
                connection.set_progress_handler(lambda: time.monotonic() > deadline, 20_000)
                return ask(connection)
        except sqlite3.Error as error:
            if _primary(error) in _CORRUPT:
                self._suspected = True
                self._bell.ring()
            if _primary(error) == sqlite3.SQLITE_INTERRUPT:
                raise Unavailable(f"that takes longer than {READ_SECONDS:g} s: ask for less") from None
            raise Unavailable(f"the records cannot be read: {error}", retry_after=5) from None

    # The writer's thread

    def _run(self) -> None:
        while not self._closing:
            wait = RETRY_SECONDS if self.problem else max(0.0, self._tidy_at - time.monotonic())
            self._bell.wait(wait, RETRY_SECONDS if self.problem else BATCH_SECONDS)
            flushes = [self._flushes.popleft() for _ in range(len(self._flushes))]
            try:
                self._write()
            except Exception:  # a mistake of ours in one batch must not end the records of all others
                log.exception("a batch of records failed")
                self._disconnect()
            self.opened.set()
            for flush in flushes:
                flush.set()
        self._write()
        self._disconnect()
        if self._claim is not None:
            self._claim.release()

    def _write(self) -> None:
        """What was pending when it began, batch by batch; ends where the disk refuses.

        What comes meanwhile waits for the next time: under load, commits would follow each other with a few rows each.
        """
        if not self._guarded(self._connect):
            return
        if self._suspected:
            self._guarded(self._check)
        more = True
        while more and (most := max(len(rows.rows) for store in self._stores for rows in store.pending())):
            if not self._guarded(self._commit):
                return
            self._tell(None)  # not when it could be opened: on a full disk that works too
            more = most >= BATCH_ROWS or self._closing
        if time.monotonic() >= self._tidy_at and self._connection is not None and not self._closing:
            self._guarded(self._tidy)

    def _guarded(self, act: Callable[[], object]) -> bool:
        """Whether it could be done. A corrupt file is put aside, and it is tried once more with a new one."""
        for last_try in (False, True):
            try:
                act()
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                if last_try or not self._replaced(error):
                    self._tell(_words(error))
                    return False
            else:
                return True
        return False

    def _commit(self) -> None:
        connection = self._connect()
        batch = [rows for store in self._stores for rows in store.pending()]
        connection.execute("BEGIN IMMEDIATE")
        try:
            for rows in batch:
                rows.write(connection)
        except _UNWRITABLE:
            connection.execute("ROLLBACK")
            connection.execute("BEGIN IMMEDIATE")
            self._write_singly(connection, batch)
        connection.execute("COMMIT")
        for store in self._stores:
            store.written()

    def _write_singly(self, connection: sqlite3.Connection, batch: Sequence[Rows]) -> None:
        """All but the bad ones."""
        for rows in batch:
            for row in rows.rows:
                try:
                    Rows(rows.head, [row], rows.tail).write(connection)
                except _UNWRITABLE as error:
                    self.refused += 1
                    log.error("a record that cannot be written is left out: %s", error)

    def _connect(self) -> sqlite3.Connection:
        """Raises sqlite3.Error, OSError."""
        if self._connection is not None:
            if self._is_there():
                return self._connection
            self._disconnect()
        if self._claim is None:
            self._claim = claim(self._place.path, self._place.local, self._place.instance)
            if self._claim.moved:
                log.warning("%s cannot be used here: records go to %s", self._place.path, self._claim.path)
        path = self._claim.path
        path.parent.mkdir(parents=True, exist_ok=True)
        make_private(path)
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "journal_size_limit=67108864"):
                connection.execute(f"PRAGMA {pragma}").fetchall()
            self._migrate(connection)
            for store in self._stores:
                store.opened(connection)
            self._inode = path.stat().st_ino
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(self._migrations):
            raise Newer(f"it was written by a newer version ({version})")
        for number in range(version, len(self._migrations)):
            script = self._migrations[number]
            connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version={number + 1}; COMMIT;")

    def _is_there(self) -> bool:
        """Whether our file is still the one of that name: written to a removed one, records are lost."""
        assert self._claim is not None
        try:
            return self._claim.path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def _check(self) -> None:
        """A reader found the file corrupt. Raises Corrupt where it is."""
        self._suspected = False
        found = self._connect().execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise Corrupt(found)

    def _tidy(self) -> None:
        connection, now = self._connect(), time.time()
        more = [store.tidy(connection, now) for store in self._stores]
        self._tidy_at = time.monotonic() + (0.0 if any(more) else TIDY_SECONDS)

    def _replaced(self, error: Exception) -> bool:
        """Whether a file that is of no use was put aside."""
        newer = isinstance(error, Newer)
        if self._claim is None or not (newer or isinstance(error, Corrupt) or _primary(error) in _CORRUPT):
            return False
        now = time.monotonic()
        if now - self._aside_at < ASIDE_SECONDS:
            return False
        self._aside_at = now
        try:
            moved = set_aside(self._claim.path, "newer" if newer else "corrupt")
        except OSError as refused:
            log.error("%s: %s, and it cannot be put aside: %s", self._claim.path, error, refused.strerror)
            return False
        self.set_aside.append(moved)
        log.error("%s: %s; it lies in %s now, and a new one is begun", self._claim.path, error, moved.name)
        return True

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _tell(self, problem: str | None) -> None:
        if problem != self.problem:
            self.problem = problem
            self._told(problem)


class Corrupt(sqlite3.DatabaseError):
    """Found by a check."""


class Newer(sqlite3.DatabaseError):
    """Its tables are not ours to write."""


def _primary(error: Exception) -> int:
    """SQLite's code without its details; 0 where it has none."""
    return (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF


def _words(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return str(error)
