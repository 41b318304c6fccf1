"""The audit: every request and every event, in the tables `requests` and `events`.

Adding costs the event loop an append; rows are made of it by the writer's thread. A writer that falls behind loses
detail first (prompts and answers), then rows, each counted; it never holds a request up.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Literal, Protocol, TypeVar

from gateway.stores.records.rows import BATCH_ROWS, Bell, Row, Rows

MOST_WAITING = 20_000  # rows; about 15 MB
MOST_CONTENT = 32 * 1024 * 1024  # bytes of prompts and answers that wait
MOST_TEXT = 256 * 1024  # bytes of a prompt or an answer
MOST_SECRET = 4096  # bytes of one that is to be masked
MOST_DATA = 65_536  # characters of an event's data
TIDY_ROWS = 5000

SCHEMA = """
CREATE TABLE requests (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, request_id TEXT NOT NULL, trace_id TEXT NOT NULL,
    key_id TEXT NOT NULL, model TEXT NOT NULL, route TEXT NOT NULL, transport TEXT NOT NULL, status INTEGER NOT NULL,
    error TEXT, queue_ms REAL, load_ms REAL, ttft_ms REAL, duration_ms REAL, tokens_in INTEGER, tokens_out INTEGER,
    tokens_cached INTEGER, stream INTEGER, cache TEXT, prompt TEXT, response TEXT
);
CREATE INDEX requests_ts ON requests (ts);
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, ts REAL NOT NULL, level TEXT NOT NULL, code TEXT NOT NULL, message TEXT,
    data TEXT
);
CREATE INDEX events_ts ON events (ts);
"""
_RECORDED = {
    name: name
    for name in (
        "ts request_id trace_id key_id model route transport status error queue_ms load_ms ttft_ms duration_ms"
    ).split()
} | {"tokens_in": "usage.prompt", "tokens_out": "usage.completion", "tokens_cached": "usage.cached", "stream": "stream"}
_FIELDS = attrgetter(*_RECORDED.values())
COLUMNS = (*_RECORDED, "cache", "prompt", "response")

_REQUESTS = f"INSERT INTO requests ({', '.join(COLUMNS)})"
_BRIEF_REQUESTS = f"INSERT INTO requests ({', '.join(_RECORDED)})"  # a third cheaper
_EVENTS = "INSERT INTO events (ts, level, code, message, data)"

Content = Literal["off", "hash", "full"]
T = TypeVar("T")


class Tokens(Protocol):
    @property
    def prompt(self) -> int: ...
    @property
    def completion(self) -> int: ...
    @property
    def cached(self) -> int: ...


class Request(Protocol):
    """What is written of a request: times in milliseconds, `ts` in unix seconds."""

    @property
    def ts(self) -> float: ...
    @property
    def request_id(self) -> str: ...
    @property
    def trace_id(self) -> str: ...
    @property
    def key_id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def route(self) -> str: ...
    @property
    def transport(self) -> str: ...
    @property
    def stream(self) -> bool: ...
    @property
    def status(self) -> int: ...
    @property
    def error(self) -> str | None: ...
    @property
    def queue_ms(self) -> float: ...
    @property
    def load_ms(self) -> float: ...
    @property
    def ttft_ms(self) -> float | None: ...
    @property
    def duration_ms(self) -> float: ...
    @property
    def model_ms(self) -> float: ...
    @property
    def usage(self) -> Tokens: ...


class Text(Protocol):
    """What was said, put together by the writer's thread."""

    @property
    def size(self) -> int:
        """Bytes that it holds until then."""

    def said(self) -> bytes | None:
        """In UTF-8; half a pair of surrogates, which JSON can bring, as if it were a character."""


class Happening(Protocol):
    """What is written of an event; `level` is a number of `logging`."""

    @property
    def ts(self) -> float: ...
    @property
    def level(self) -> int: ...
    @property
    def code(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def data(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Detail:
    """What only some requests have: how the response cache answered, and the texts, if AUDIT_CONTENT keeps them."""

    cache: str | None = None
    prompt: Text | None = None
    response: Text | None = None

    @property
    def size(self) -> int:
        return (self.prompt.size if self.prompt else 0) + (self.response.size if self.response else 0)


_NO_DETAIL = (None, None, None)  # cache, prompt, response


class Backlog(Generic[T]):
    """Rows on their way to the writer: the event loop adds, the writer takes; neither waits for the other."""

    def __init__(self, bell: Bell) -> None:
        self.dropped = 0
        self.taken: list[Row] = []  # the writer's
        self._waiting: deque[T] = deque()
        self._bell = bell

    def add(self, item: T) -> bool:
        """False where there is no room."""
        waiting, bell = self._waiting, self._bell
        count = len(waiting)
        if count >= MOST_WAITING:
            self.dropped += 1
            return False
        waiting.append(item)
        if not bell.awake:
            bell.ring()
        elif count == BATCH_ROWS:
            bell.hurry()
        return True

    def take(self, row: Callable[[T], Row]) -> list[Row]:
        """The same again until `done`: they are not written yet."""
        if not self.taken:
            waiting = self._waiting
            self.taken = [row(waiting.popleft()) for _ in range(min(len(waiting), BATCH_ROWS))]
        return self.taken

    def done(self) -> None:
        self.taken = []

    def __len__(self) -> int:
        return len(self._waiting) + len(self.taken)


@dataclass(frozen=True, slots=True)
class Keeping:
    """What is kept of it: 0 days are for ever; `mask` takes secrets out of what events say."""

    retention_days: int
    content: Content = "off"
    mask: Callable[[str], str] = str


class Audit:
    """A store (see db.Store)."""

    def __init__(self, bell: Bell, keeping: Keeping, counted: Callable[[Request], None] = lambda record: None) -> None:
        """`counted` is called by the writer's thread, with each request that it takes."""
        self._keeping, self._counted = keeping, counted
        self.requests: Backlog[tuple[Request, Detail] | Request] = Backlog(bell)
        self._events: Backlog[Happening] = Backlog(bell)
        self._content_in = self._content_out = 0  # each is counted by one thread alone
        self._detailed = False  # some of those that are being written have more than a record
        self.trimmed = 0  # prompts and answers that were left out

    def add_request(self, record: Request, detail: Detail | None = None) -> bool:
        """On the event loop; `record` does not change any more. False where there is no room."""
        if detail is None:
            return self.requests.add(record)
        if self._content_in - self._content_out + detail.size > MOST_CONTENT:
            detail = Detail(detail.cache)
            self.trimmed += 1
        if not self.requests.add((record, detail)):
            return False
        self._content_in += detail.size
        return True

    def add_event(self, event: Happening) -> None:
        self._events.add(event)

    @property
    def dropped(self) -> int:
        """Rows that found no room."""
        return self.requests.dropped + self._events.dropped

    @property
    def waiting(self) -> int:
        return len(self.requests) + len(self._events)

    # The writer's thread

    def opened(self, connection: sqlite3.Connection) -> None:
        """There is nothing to read."""

    def pending(self) -> list[Rows]:
        rows = self.requests.take(self._request_row)
        if self._detailed:
            rows = [row if len(row) == len(COLUMNS) else (*row, *_NO_DETAIL) for row in rows]
        return [
            Rows(_REQUESTS if self._detailed else _BRIEF_REQUESTS, rows),
            Rows(_EVENTS, self._events.take(self._event_row)),
        ]

    def written(self) -> None:
        self.requests.done()
        self._events.done()
        self._detailed = False

    def tidy(self, connection: sqlite3.Connection, now: float) -> bool:
        if not self._keeping.retention_days:
            return False
        gone, until = 0, now - self._keeping.retention_days * 86_400
        for table in ("requests", "events"):
            old = f"SELECT id FROM {table} WHERE ts < ? ORDER BY ts LIMIT {TIDY_ROWS}"
            gone += connection.execute(f"DELETE FROM {table} WHERE id IN ({old})", (until,)).rowcount
        return gone >= TIDY_ROWS

    def _request_row(self, entry: tuple[Request, Detail] | Request) -> Row:
        if not isinstance(entry, tuple):
            self._counted(entry)
            return _FIELDS(entry)
        self._detailed = True
        record, detail = entry
        self._content_out += detail.size
        self._counted(record)
        texts = kept(detail.prompt, self._keeping), kept(detail.response, self._keeping)
        return (*_FIELDS(record), detail.cache, *texts)

    def _event_row(self, event: Happening) -> Row:
        data = self._keeping.mask(json.dumps(event.data, default=str, skipkeys=True)) if event.data else None
        if data is not None and len(data) > MOST_DATA:
            data = json.dumps({"left_out_characters": len(data)})
        level = logging.getLevelName(event.level).lower()
        return event.ts, level, event.code, _writable(self._keeping.mask(event.message)), data


def kept(said: Text | None, keeping: Keeping) -> str | None:
    """What is written of a prompt or an answer: the SHA-256 of the whole, or the text without secrets."""
    if said is None or keeping.content == "off":
        return None
    data = said.said()
    if data is None:
        return None
    if keeping.content == "hash":
        return hashlib.sha256(data).hexdigest()
    # A secret that is cut in two would not be known for one: the cut that stays comes behind the masking.
    return _writable(keeping.mask(data[: MOST_TEXT + MOST_SECRET].decode(errors="replace")), len(data))


def _writable(text: str, size: int = 0) -> str:
    """Half a pair of surrogates is no text for SQLite; what is too long is cut, and marked. `size` is that of all of
    it, in bytes, where `text` is only its beginning."""
    data = text.encode(errors="replace")
    if max(size, len(data)) <= MOST_TEXT:
        return data.decode()
    return f"{data[:MOST_TEXT].decode(errors='ignore')}… [cut: it has {max(size, len(data))} bytes]"
