"""The books: audit, usage and budgets in one SQLite file, opened and closed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from gateway.stores.records import audit, usage
from gateway.stores.records import reading as records
from gateway.stores.records.audit import Audit, Detail, Happening, Keeping, Request
from gateway.stores.records.db import Database, Place
from gateway.stores.records.reading import Page, Wanted
from gateway.stores.records.rows import Bell
from gateway.stores.records.usage import Budgets, Line, Usage

MIGRATIONS = (audit.SCHEMA + usage.SCHEMA,)  # each is applied once; what has been released is never changed
OPEN_SECONDS = 2.0


class Books:
    """`record` and `event` are for the event loop and cost a few appends; what is read comes from the file, 0.5 s old
    at most."""

    def __init__(self, place: Place, told: Callable[[str | None], None], keeping: Keeping) -> None:
        bell = Bell()
        # Usage is counted by the writer, as it takes the records, and on the event loop for those that find no room.
        self._usage, self._unheard, self.budgets = Usage(Bell()), Usage(bell), Budgets(bell)
        self.audit = Audit(bell, keeping, self._usage.add_request)
        self._add = self.audit.requests.add
        stores = (self.audit, self._usage, self._unheard, self.budgets)  # what is taken for the first one is counted
        self.database = Database(place, MIGRATIONS, stores, bell, told)

    def record(self, record: Request) -> None:
        """A request that is over."""
        if not self._add(record):
            self._unheard.add_request(record)

    def record_with(self, record: Request, detail: Detail) -> None:
        """The same, with what only some requests have."""
        if not self.audit.add_request(record, detail):
            self._unheard.add_request(record)

    def event(self, event: Happening) -> None:
        self.audit.add_event(event)

    @property
    def dropped(self) -> int:
        """Rows of the audit that are lost: the writer was too slow, or SQLite cannot take them."""
        return self.audit.dropped + self.database.refused

    async def requests(self, wanted: Wanted) -> Page:
        """Raises Unavailable."""
        return await records.requests(self.database, wanted)

    async def used(self, key_id: str | None, since_day: str, until_day: str, model: str | None = None) -> list[Line]:
        """Both days included, as YYYY-MM-DD; `key_id` None: of all keys. Raises Unavailable."""
        return await usage.usage(self.database, key_id, since_day, until_day, model)


@contextlib.asynccontextmanager
async def open_books(place: Place, told: Callable[[str | None], None], keeping: Keeping) -> AsyncIterator[Books]:
    """The books, for as long as the block runs; a file that cannot be had stops nothing, it is told.

    `told` is called on the event loop: with what is wrong, or None when all is well again.
    """
    loop = asyncio.get_running_loop()

    def tell(problem: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: this is the end
            loop.call_soon_threadsafe(told, problem)

    books = Books(place, tell, keeping)
    books.database.start()
    await asyncio.to_thread(books.database.opened.wait, OPEN_SECONDS)  # the budgets of today are read by then
    try:
        yield books
    finally:
        await asyncio.to_thread(books.database.close)
