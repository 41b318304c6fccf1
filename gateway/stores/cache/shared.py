"""Answers that several gateways share over Redis. One that is slow or away makes every look a miss.

`SET … PX`, so Redis itself forgets them; how many there may be is for its own `maxmemory` to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any, cast

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.stores.cache.answers import MOST_WAITING, Stored
from gateway.stores.shared.breaker import Breaker
from gateway.stores.shared.calls import connect

log = logging.getLogger("corral.redis")

WITHIN_SECONDS = 0.05  # the longest round trip
MOST_SECONDS = 2 * WITHIN_SECONDS  # the longest wait of a request: one may be under way when it comes
PUT_SECONDS = 1.0  # of an answer on its way there, for which nobody waits
CLEAR_SECONDS = 10.0
PREFIX = "corral:cache:1:"
MOST_AT_ONCE = 16  # looks in one round trip
_SCANNED = 1000
_decoder = msgspec.msgpack.Decoder(tuple[bytes, str, float])


class RedisAnswers:
    """`seconds` is how long an answer lives."""

    kind = "redis"

    def __init__(self, asked: Redis, told: Redis, seconds: int) -> None:
        """`asked` is a client for requests that wait, `told` one for what takes its time."""
        self._asked, self._told, self._seconds = asked, told, seconds
        self._breaker = Breaker()
        self._looks: deque[tuple[str, asyncio.Future[bytes | None]]] = deque()
        self._looking = False
        self._tasks: set[asyncio.Task[object]] = set()
        self._waiting = 0

    @classmethod
    def at(cls, url: str, seconds: int) -> RedisAnswers:
        """Raises ConfigError; the server is not called."""
        return cls(connect(url, WITHIN_SECONDS), connect(url, PUT_SECONDS), seconds)

    def at_hand(self, key: str) -> Stored | None:
        return None

    async def get(self, key: str) -> Stored | None:
        now = time.monotonic()
        if not self._breaker.closed:
            if self._breaker.due(now):
                self._breaker = self._breaker.probing()
                self._spawn(self._probe())
            return None
        found: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
        self._looks.append((PREFIX + key, found))
        if not self._looking:
            self._looking = True
            self._spawn(self._look())
        await asyncio.wait((found,), timeout=MOST_SECONDS)
        data = found.result() if found.done() else None
        if data is None:
            found.cancel()
            return None
        try:
            stored = Stored(*_decoder.decode(data))
        except msgspec.DecodeError:
            return None
        return stored if 0 <= time.time() - stored.made_at < self._seconds else None

    def put(self, key: str, stored: Stored) -> None:
        if self._breaker.closed and self._waiting + stored.size <= MOST_WAITING:
            self._waiting += stored.size
            self._spawn(self._put(key, stored))

    async def clear(self) -> int:
        cleared = 0
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(CLEAR_SECONDS):
                batch: list[bytes] = []
                async for name in self._told.scan_iter(match=f"{PREFIX}*", count=_SCANNED):
                    batch.append(name)
                    if len(batch) == _SCANNED:
                        cleared += await self._told.unlink(*batch)
                        batch.clear()
                if batch:
                    cleared += await self._told.unlink(*batch)
        return cleared

    def facts(self) -> dict[str, int | None]:
        return {"entries": None, "bytes": None, "evicted": None}

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._asked.aclose()
        await self._told.aclose()

    async def _put(self, key: str, stored: Stored) -> None:
        value = msgspec.msgpack.encode((stored.body, stored.content_type, stored.made_at))
        try:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(PUT_SECONDS):
                    await self._told.set(PREFIX + key, value, px=self._seconds * 1000)
        finally:
            self._waiting -= stored.size

    async def _look(self) -> None:
        """Those that come together go in one round trip. Where one fails, those that wait behind have waited enough."""
        looks: list[tuple[str, asyncio.Future[bytes | None]]] = []
        try:
            while self._looks:
                looks = [self._looks.popleft() for _ in range(min(MOST_AT_ONCE, len(self._looks)))]
                values = await self._within([key for key, _ in looks])
                for (_, found), value in zip(looks, values or [None] * len(looks), strict=True):
                    if not found.done():
                        found.set_result(value)
                if values is None:
                    break
        finally:
            self._looking = False
            for _, found in (*looks, *self._looks):
                if not found.done():
                    found.set_result(None)
            self._looks.clear()

    async def _within(self, keys: list[str]) -> list[bytes | None] | None:
        found: list[bytes | None] | None = None
        try:
            async with asyncio.timeout(WITHIN_SECONDS):
                found = await cast(Awaitable[list[bytes | None]], self._asked.mget(keys))
        except (RedisError, OSError, TimeoutError) as error:
            log.debug("the cache in Redis does not answer: %s", error)
        before, self._breaker = self._breaker, self._breaker.called(found is not None, time.monotonic())
        if before.closed and not self._breaker.closed:
            log.warning("Redis is away or slow: no answers are taken from there for a while")
        return found

    async def _probe(self) -> None:
        good = False
        try:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(WITHIN_SECONDS):
                    good = bool(await cast(Awaitable[Any], self._asked.ping()))
        finally:
            self._breaker = self._breaker.probed(good, time.monotonic())
        if good:
            log.info("Redis is there again: answers are taken from there")

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work, name="cache in redis")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
