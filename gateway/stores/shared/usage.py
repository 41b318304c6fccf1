"""Usage of several gateways, added up over Redis: each tells its own counts, and whoever asks adds them all up.

What is told is cumulative, under a name that is new at each start. So what is told twice counts once, what Redis has
lost is told again, and nobody waits for it but who asks for the sum.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC, date, datetime
from os import urandom
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError

from gateway.stores.records.audit import Request
from gateway.stores.records.usage import COUNTS, DAY, KEEP_DAYS, Line, iso_day
from gateway.stores.shared.calls import connect

log = logging.getLogger("corral.redis")

PREFIX = "corral:usage:1:"  # and the day: a hash of (instance, key, model) → COUNTS
TELL_SECONDS = 2.0
TELL_ALL_EVERY = 30  # times: what a Redis has lost that was started anew
WITHIN_SECONDS = 1.0
KEPT_SECONDS = 400 * DAY
MOST_DAYS = 400

Name = tuple[str, str]  # key id, model
Counts = list[float]

_decoder = msgspec.json.Decoder(list[float])
_names = msgspec.json.Decoder(tuple[str, str, str])


class SharedUsage:
    """`add` is for the event loop, with each record that is closed."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._instance = urandom(8).hex()
        self._days: dict[int, dict[Name, Counts]] = {}
        self._untold: set[tuple[int, Name]] = set()
        self._told = 0  # times
        self._failing = False
        self._turn = asyncio.Lock()

    def add(self, record: Request) -> None:
        if not record.key_id:
            return
        day, name = int(record.ts // DAY), (record.key_id, record.model)
        counts = self._days.setdefault(day, {}).setdefault(name, [0.0] * len(COUNTS))
        usage = record.usage
        for at, more in enumerate((1, usage.prompt, usage.completion, usage.cached, record.model_ms / 1000)):
            counts[at] += more
        self._untold.add((day, name))

    async def used(
        self, own: Iterable[Line], key_id: str | None, since: str, until: str, model: str | None
    ) -> list[Line] | None:
        """What all gateways have used, both days included; None where Redis does not answer. `own`: what this one's
        books say of it, from before the last start too.
        """
        days = days_of(since, until, datetime.now(UTC).date())
        answers = await self._tell([("HGETALL", PREFIX + day) for day in days])
        return None if answers is None else added_up(dict(zip(days, answers, strict=True)), own, key_id, model)

    async def tell(self) -> None:
        """Redis hears what has changed."""
        self._told += 1
        if self._told % TELL_ALL_EVERY == 0:
            self._forget()
            self._untold.update((day, name) for day, names in self._days.items() for name in names)
        if self._untold:
            await self._tell([])

    async def _tell(self, asked: list[tuple[str | int, ...]]) -> list[Any] | None:
        """One after the other, so that no older count comes behind a newer one. The answers to what is asked."""
        async with self._turn:
            told = self._news()
            answers = await self._run([*_writes(told), *asked])
            if answers is None:
                self._untold.update(told)
                return None
            return answers[len(answers) - len(asked) :]

    def _news(self) -> dict[tuple[int, Name], tuple[str, str]]:
        """Field and value of each that has changed, by its day and name."""
        untold, self._untold = self._untold, set()
        return {
            (day, name): (
                msgspec.json.encode((self._instance, *name)).decode(),
                msgspec.json.encode(self._days[day][name]).decode(),
            )
            for day, name in untold
        }

    def _forget(self) -> None:
        newest = max(self._days, default=0)
        for day in [day for day in self._days if day <= newest - KEEP_DAYS]:
            if not any(untold[0] == day for untold in self._untold):
                del self._days[day]

    async def _run(self, commands: list[tuple[str | int, ...]]) -> list[Any] | None:
        if not commands:
            return []
        try:
            async with asyncio.timeout(WITHIN_SECONDS), self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                answers: list[Any] = await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            if not self._failing:
                log.warning("usage cannot be shared over Redis for now: %s", str(error) or type(error).__name__)
            self._failing = True
            return None
        self._failing = False
        return answers


def days_of(since: str, until: str, today: date) -> list[str]:
    """Both included; those to come hold nothing, nor do those of long ago."""
    last = min(date.fromisoformat(until).toordinal(), today.toordinal() + 1)
    first = max(date.fromisoformat(since).toordinal(), last - MOST_DAYS + 1, 1)
    return [date.fromordinal(number).isoformat() for number in range(first, last + 1)]


def _writes(told: Mapping[tuple[int, Name], tuple[str, str]]) -> list[tuple[str | int, ...]]:
    commands: list[tuple[str | int, ...]] = []
    for (day, _), (field, value) in told.items():
        commands.append(("HSET", PREFIX + iso_day(day), field, value))
    commands += [("EXPIRE", PREFIX + iso_day(day), KEPT_SECONDS) for day in {day for day, _ in told}]
    return commands


def added_up(
    hashes: Mapping[str, Mapping[bytes, bytes]], own: Iterable[Line], key_id: str | None, model: str | None
) -> list[Line]:
    """The lines of all days, keys and models that were asked for; never less than this gateway itself knows."""
    sums: dict[tuple[str, str, str], Counts] = {}
    for day, fields in hashes.items():
        for field, value in fields.items():
            try:
                (_, key, used), counts = _names.decode(field), _decoder.decode(value)
            except msgspec.DecodeError:
                continue  # not ours
            if len(counts) == len(COUNTS) and key_id in (None, key) and model in (None, used):
                total = sums.setdefault((day, key, used), [0.0] * len(COUNTS))
                total[:] = (one + more for one, more in zip(total, counts, strict=True))
    for line in own:
        known = [float(getattr(line, name)) for name in COUNTS]
        total = sums.setdefault((line.date, line.key, line.model), known)
        total[:] = (max(one, other) for one, other in zip(total, known, strict=True))
    return [_line(*name, counts) for name, counts in sorted(sums.items())]


def _line(day: str, key: str, model: str, counts: Counts) -> Line:
    requests, prompt, completion, cached = map(int, counts[:4])
    return Line(day, key, model, requests, prompt, completion, cached, counts[4])


@contextlib.asynccontextmanager
async def sharing_usage(url: str) -> AsyncIterator[SharedUsage]:
    """For as long as the block runs; a Redis that is away stops nothing. Raises ConfigError for a wrong address."""
    client = connect(url, WITHIN_SECONDS)
    shared = SharedUsage(client)

    async def tell() -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            await shared.tell()

    telling = asyncio.create_task(tell(), name="usage to redis")
    try:
        yield shared
    finally:
        telling.cancel()
        await asyncio.wait([telling])
        await shared.tell()
        await client.aclose()
