"""What stands between a store and the writer's thread: its rows, and the bell that wakes the writer."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Protocol

BATCH_ROWS = 2500  # a commit costs 1 ms of CPU: at 4,000 rows a second, 5 µs more a row in batches of 200
ROWS_A_STATEMENT = 50  # more gain nothing; SQLite lets go of the GIL for as long as one statement runs

Row = Sequence[object]


@dataclass(frozen=True, slots=True)
class Rows:
    """For one table: `head` is such as `INSERT INTO t (a, b)`, `tail` an ON CONFLICT clause."""

    head: str
    rows: Sequence[Row]
    tail: str = ""

    def write(self, connection: sqlite3.Connection) -> None:
        for start in range(0, len(self.rows), ROWS_A_STATEMENT):
            part = self.rows[start : start + ROWS_A_STATEMENT]
            connection.execute(
                _statement(self.head, self.tail, len(part), len(part[0])), list(chain.from_iterable(part))
            )


class Store(Protocol):
    """What gathers rows. All but its own methods for adding are called by the writer's thread."""

    def opened(self, connection: sqlite3.Connection) -> None:
        """The file is open; it may be a new one."""

    def pending(self) -> list[Rows]:
        """What is to be written now, at most BATCH_ROWS; the same again until `written`."""

    def written(self) -> None:
        """What was pending is committed, save for rows that SQLite can never take."""

    def tidy(self, connection: sqlite3.Connection, now: float) -> bool:
        """Removes a slice of what is old; True where there is more."""


class Bell:
    """Wakes the writer. For the hot path: `if not bell.awake: bell.ring()`, after the row was put where it is found."""

    def __init__(self) -> None:
        self.awake = False
        self._rung, self._hurried = threading.Event(), threading.Event()

    def ring(self) -> None:
        self.awake = True
        self._rung.set()

    def hurry(self) -> None:
        """Does not wait for more rows."""
        self._hurried.set()
        self.ring()

    def wait(self, seconds: float, gather: float) -> None:
        """Until it rings, and from then on `gather` seconds for what else comes; `seconds` at most until it rings."""
        if self._rung.wait(seconds):
            self._hurried.wait(gather)
        self._hurried.clear()
        self._rung.clear()
        self.awake = False  # last: who adds a row before this is found by the look that follows


@lru_cache(maxsize=256)
def _statement(head: str, tail: str, rows: int, width: int) -> str:
    row = f"({', '.join('?' * width)})"
    return f"{head} VALUES {', '.join([row] * rows)} {tail}"
