"""Books on a real disk, and records to fill them with."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.pipeline.account import Record
from gateway.pipeline.usage import Usage
from gateway.stores.records.audit import Keeping
from gateway.stores.records.books import Books
from gateway.stores.records.db import Place


def record(number: int = 0, **fields: Any) -> Record:
    about: dict[str, Any] = {
        "ts": time.time(),
        "request_id": f"req_{number}",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "key_id": "ada",
        "route": "/v1/chat/completions",
        "method": "POST",
        "transport": "http",
        "stream": False,
        "model": "qwen",
        "queue_ms": 2.0,
        "load_ms": 1.0,
        "ttft_ms": 12.5,
        "duration_ms": 103.0,
        "model_ms": 100.0,
        "usage": Usage(12, 34, 5),
    }
    return Record(**about | fields)


@dataclass(frozen=True)
class Said:
    """A prompt or an answer."""

    words: str

    @property
    def size(self) -> int:
        return len(self.words)

    def said(self) -> bytes:
        return self.words.encode(errors="surrogatepass")


def books_at(path: Path, told: list[str | None] | None = None, *, instance: str = "pod", **how: Any) -> Books:
    """Not started."""
    said: list[str | None] = [] if told is None else told
    return Books(Place(path, path.parent / "local", instance), said.append, Keeping(**{"retention_days": 30} | how))


@contextlib.contextmanager
def opened(path: Path, told: list[str | None] | None = None, **how: Any) -> Iterator[Books]:
    books = books_at(path, told, **how)
    books.database.start()
    assert books.database.opened.wait(5)
    try:
        yield books
    finally:
        books.database.close()


def rows(path: Path, sql: str = "SELECT * FROM requests ORDER BY id") -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def count(path: Path, table: str = "requests") -> int:
    return int(rows(path, f"SELECT count(*) FROM {table}")[0][0])
