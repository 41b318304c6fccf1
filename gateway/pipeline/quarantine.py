"""Requests under which llama-server died: after a second time they are refused for a while.

A crash ends every request that runs, so all of them are suspects, and only one did it. Suspects are therefore tried
again one at a time: a second crash then names its cause, and nobody else is punished for it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable

from gateway.errors import BackendError, QueueTimeout

REMEMBERED_SECONDS = 600.0
MAX_REMEMBERED = 1024


class Trial:
    """A try, alone where there is a lock."""

    __slots__ = ("_deadline", "_lock")

    def __init__(self, lock: asyncio.Lock | None, deadline: float) -> None:
        self._lock, self._deadline = lock, deadline

    async def __aenter__(self) -> bool:
        if self._lock is None:
            return False
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._lock.acquire()
        except TimeoutError:
            raise QueueTimeout("llama-server has died, and others are tried again first", retry_after=5) from None
        return True

    async def __aexit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()


_FREE = Trial(None, 0.0)  # nearly all


class Quarantine:
    """By a digest of what is sent to llama-server, so that a request is known again whoever sends it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._crashes: OrderedDict[bytes, tuple[int, float]] = OrderedDict()  # how many, and when the last one was
        self._alone: dict[str, asyncio.Lock] = {}

    def crashed(self, model_id: str, body: bytes, *, alone: bool) -> None:
        """llama-server died under this request; `alone`: no other suspect ran."""
        digest = _digest(model_id, body)
        count, _ = self._crashes.pop(digest, (0, 0.0))
        self._crashes[digest] = (count + 1 if alone or not count else count, self._clock())
        while len(self._crashes) > MAX_REMEMBERED:
            self._crashes.popitem(last=False)

    def tried(self, model_id: str, body: bytes, deadline: float, *, suspect: bool = False) -> Trial:
        """Run a request in the block; gives whether it runs as a suspect, which means with no other suspect beside it.

        Raises BackendError for one that has been found guilty, and in the block's beginning QueueTimeout where another
        suspect runs until `deadline` (on the loop's clock).
        """
        count = self._count(model_id, body) if self._crashes else 0
        if count >= 2:
            raise guilty()
        if not count and not suspect:
            return _FREE
        return Trial(self._alone.setdefault(model_id, asyncio.Lock()), deadline)

    def _count(self, model_id: str, body: bytes) -> int:
        count, at = self._crashes.get(_digest(model_id, body), (0, 0.0))
        return count if self._clock() - at < REMEMBERED_SECONDS else 0


def guilty() -> BackendError:
    return BackendError(
        "llama-server died twice under this very request; it is refused for some minutes",
        headers={"x-should-retry": "false"},
    )


def _digest(model_id: str, body: bytes) -> bytes:
    return hashlib.blake2b(model_id.encode() + b"\0" + body, digest_size=16).digest()
