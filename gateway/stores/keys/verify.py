"""First uses of chosen keys: slow hashes computed in threads, once for all who wait, for each address one at a time."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from gateway.errors import RateLimitExceeded
from gateway.stores.keys import hashes
from gateway.stores.keys.table import Table

THREADS = 2
MAX_ADDRESSES = 256  # that have something to verify at once
MAX_WAITING = 64  # secrets that one address may have in its line
REST_SECONDS = 1.0  # between two guesses of an address that is throttled


@dataclass(frozen=True, slots=True)
class _Asked:
    table: Table
    secret: str = field(repr=False)
    answer: asyncio.Future[str | None]


class Verifier:
    """Each address has a line of its own, so it never holds more than one thread, nor another address up. After a wrong
    secret of a throttled address its line rests: guessing goes on at that pace, and a right key behind it is found."""

    def __init__(self, throttled: Callable[[str], bool]) -> None:
        """`throttled` says whether an address has used up its failures."""
        self._throttled = throttled
        self._lines: dict[str, deque[_Asked]] = {}
        self._workers: set[asyncio.Task[None]] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._closed = threading.Event()

    async def verify(self, table: Table, digest: bytes, secret: str, address: str) -> str | None:
        """The table's hash that the secret fits, if any. Raises RateLimitExceeded where too many wait already."""
        answer = table.verifying.get(digest) or self._ask(table, digest, secret, address)
        return await asyncio.shield(answer)  # a client that leaves must not take it from the others

    def close(self) -> None:
        """No hash is begun any more."""
        self._closed.set()
        for worker in self._workers:
            worker.cancel()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, table: Table, digest: bytes, secret: str, address: str) -> asyncio.Future[str | None]:
        line = self._lines.get(address)
        if len(line) >= MAX_WAITING if line is not None else len(self._lines) >= MAX_ADDRESSES:
            raise RateLimitExceeded("too many API keys are being checked at this moment; try again", retry_after=1)
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda done: table.settle(digest, done))
        table.verifying[digest] = answer
        if line is None:
            line = self._lines[address] = deque()
            worker = asyncio.create_task(self._work(address, line), name="keys-verify")
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        line.append(_Asked(table, secret, answer))
        return answer

    async def _work(self, address: str, line: deque[_Asked]) -> None:
        """Until the line is empty; who is being served stands first in it."""
        loop = asyncio.get_running_loop()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="key-hash")
        try:
            while line:
                asked = line[0]
                hashed = asked.table.slow_in_order()
                found = None
                try:
                    found = await loop.run_in_executor(self._pool, _first_match, hashed, asked.secret, self._closed)
                    asked.answer.set_result(found)
                except Exception as error:  # theirs alone who asked; the line goes on
                    asked.answer.set_exception(error)
                line.popleft()
                rests = found is None and self._throttled(address)
                await asyncio.sleep(REST_SECONDS if rests else 0)  # 0 is enough for the table to settle it
        finally:
            del self._lines[address]
            for asked in line:
                asked.answer.cancel()


def _first_match(hashed: Sequence[str], secret: str, closed: threading.Event) -> str | None:
    return next((each for each in hashed if not closed.is_set() and hashes.matches(each, secret)), None)
