"""Which answers were given to prompts that mean the same: their vectors, compared by sqlite-vec.

Vectors are compared only within a group: those whose requests agree in all but the wording of the last message, and in
its gist (`wording`). So there are few to compare, and nobody's prompt is written down.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import ctypes
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gateway.errors import ConfigError
from gateway.stores.cache.file import CacheFile, Strange, close_in, version_of
from gateway.stores.records.db import Place

DEFAULT_SIMILARITY = 0.8  # of the measurements in docs/CACHE.md
MOST_VECTORS = 20_000
LOOK_SECONDS = 0.25
VERSION = 1
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meanings (
    key TEXT PRIMARY KEY, kin TEXT NOT NULL, vector BLOB NOT NULL, until REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS meanings_kin ON meanings (kin);
CREATE INDEX IF NOT EXISTS meanings_until ON meanings (until);
PRAGMA user_version = {VERSION};
"""
_NEAREST = (
    "SELECT key, 1 - vec_distance_cosine(vector, ?) AS near FROM meanings "
    "WHERE kin = ? AND until > ? AND length(vector) = ? ORDER BY near DESC LIMIT 1"
)


@dataclass(frozen=True, slots=True)
class Near:
    """The key of an answer, and how near its prompt is: a cosine."""

    key: str
    similarity: float


class Meanings:
    """`seconds` is how long an answer lives. Raises ConfigError where sqlite-vec cannot be had."""

    def __init__(self, place: Place, seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._file = _File(place, seconds, clock)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="meanings")
        self._closed = False

    @property
    def entries(self) -> int:
        return self._file.entries

    async def nearest(self, kin: str, vector: Sequence[float]) -> Near | None:
        """A slow disk finds nothing."""
        if self._closed:
            return None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_SECONDS):
                return await asyncio.wrap_future(self._thread.submit(self._file.nearest, kin, _packed(vector)))
        return None

    def keep(self, kin: str, vector: Sequence[float], key: str) -> None:
        """Returns at once."""
        if not self._closed:
            self._thread.submit(self._file.keep, kin, _packed(vector), key)

    async def clear(self) -> None:
        if not self._closed:
            await asyncio.wrap_future(self._thread.submit(self._file.clear))

    async def close(self, seconds: float = 2.0) -> None:
        self._closed = True
        await close_in(self._thread, self._file, seconds)


class _File(CacheFile):
    def __init__(self, place: Place, seconds: float, clock: Callable[[], float]) -> None:
        super().__init__(place)
        self._seconds, self._clock = seconds, clock
        self._extension = Extension()
        self.entries = 0

    def connect(self, path: str) -> sqlite3.Connection:
        return self._extension.connect(path)

    def opened(self, db: sqlite3.Connection) -> None:
        if version_of(db) not in (0, VERSION):
            raise Strange("it was written by another version")
        db.executescript(SCHEMA)
        db.execute("DELETE FROM meanings WHERE until < ?", (self._clock(),))
        self.entries = db.execute("SELECT count(*) FROM meanings").fetchone()[0]

    def nearest(self, kin: str, vector: bytes) -> Near | None:
        row = self.guarded(
            lambda db: db.execute(_NEAREST, (vector, kin, self._clock(), len(vector))).fetchone() or (None, 0.0)
        )
        return Near(row[0], row[1]) if row is not None and row[0] is not None and row[1] is not None else None

    def keep(self, kin: str, vector: bytes, key: str) -> None:
        self.guarded(lambda db: self._keep(db, kin, vector, key))

    def clear(self) -> None:
        self.guarded(lambda db: db.execute("DELETE FROM meanings"))
        self.entries = 0

    def _keep(self, db: sqlite3.Connection, kin: str, vector: bytes, key: str) -> None:
        now = self._clock()
        db.execute("BEGIN IMMEDIATE")
        row = (key, kin, vector, now + self._seconds)
        db.execute("INSERT OR REPLACE INTO meanings (key, kin, vector, until) VALUES (?, ?, ?, ?)", row)
        self.entries = db.execute("SELECT count(*) FROM meanings").fetchone()[0]
        if self.entries > MOST_VECTORS:
            oldest = f"SELECT key FROM meanings ORDER BY until LIMIT {MOST_VECTORS // 20}"
            self.entries -= db.execute(f"DELETE FROM meanings WHERE key IN ({oldest})").rowcount
        db.execute("COMMIT")


class Extension:
    """sqlite-vec, loaded into the connections that need it. Raises ConfigError where that cannot be done.

    Some builds of Python (pyenv's among them) leave out `enable_load_extension`; there SQLite itself is asked to begin
    each new connection with it, for as long as ours is being opened.
    """

    def __init__(self) -> None:
        try:
            import sqlite_vec
        except ImportError:
            raise ConfigError(
                ["CACHE_EMBEDDING_MODEL: the semantic cache needs sqlite-vec: pip install 'corral[semantic]'"]
            ) from None
        self._path: str = sqlite_vec.loadable_path()
        try:
            self.connect(":memory:").close()
        except (sqlite3.Error, OSError, AttributeError) as error:
            raise ConfigError([f"CACHE_EMBEDDING_MODEL: sqlite-vec cannot be loaded: {error}"]) from None

    def connect(self, path: str) -> sqlite3.Connection:
        if hasattr(sqlite3.Connection, "enable_load_extension"):
            db = _connected(path)
            db.enable_load_extension(True)
            db.load_extension(self._path)
            db.enable_load_extension(False)
        else:
            db = self._begun_with_it(path)
        db.execute("SELECT vec_version()").fetchone()
        return db

    def _begun_with_it(self, path: str) -> sqlite3.Connection:
        import _sqlite3

        sqlite = ctypes.CDLL(_sqlite3.__file__)  # its symbols are those of the SQLite that Python uses
        entry = ctypes.cast(ctypes.CDLL(f"{self._path}.so").sqlite3_vec_init, ctypes.c_void_p)
        sqlite.sqlite3_auto_extension(entry)
        try:
            return _connected(path)
        finally:
            sqlite.sqlite3_cancel_auto_extension(entry)


def _connected(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=1.0, isolation_level=None, check_same_thread=False)


def _packed(vector: Sequence[float]) -> bytes:
    return array.array("f", vector).tobytes()
