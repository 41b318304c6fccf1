"""Usage of several gateways on a real Redis: added up once, whatever is lost or told twice on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from gateway.pipeline.usage import Usage
from gateway.stores.records.usage import DAY, Line, iso_day
from gateway.stores.shared.usage import TELL_ALL_EVERY, SharedUsage, added_up, days_of, sharing_usage
from tests.books_kit import record
from tests.redis_kit import RedisServer, running_redis

TODAY = iso_day(int(time.time() // DAY))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> RedisServer:
    redis_server.ask("FLUSHALL")
    return redis_server


async def everything(shared: SharedUsage, *own: Line) -> list[tuple[str, str, int, int]] | None:
    lines = await shared.used(own, None, TODAY, TODAY, None)
    return None if lines is None else [(line.key, line.model, line.requests, line.tokens_out) for line in lines]


async def test_it_is_the_sum_of_all(redis: RedisServer) -> None:
    async with sharing_usage(redis.url) as one, sharing_usage(redis.url) as other:
        for number in range(5):
            (one, other)[number % 2].add(record(key_id="ada", usage=Usage(1, 10, 0), model_ms=500.0))
        one.add(record(key_id="bob", model="phi"))
        one.add(record(key_id=""))
        await other.tell()
        lines = await one.used([], "ada", TODAY, TODAY, None)
        assert lines == [Line(TODAY, "ada", "qwen", 5, 5, 50, 0, 2.5)]
        assert await everything(other) == [("ada", "qwen", 5, 50), ("bob", "phi", 1, 34)]
        assert await one.used([], None, TODAY, TODAY, "phi") == await one.used([], "bob", TODAY, TODAY, None)
        assert await one.used([], None, "2020-01-01", "2020-01-31", None) == []


async def test_what_is_told_twice_counts_once(redis: RedisServer) -> None:
    async with sharing_usage(redis.url) as one:
        for _ in range(3):
            one.add(record())
            await one.tell()
            assert await everything(one) == await everything(one)
        assert await everything(one) == [("ada", "qwen", 3, 102)]


async def test_another_start_begins_a_count_of_its_own(redis: RedisServer) -> None:
    for _ in range(3):
        async with sharing_usage(redis.url) as one:
            one.add(record())
    async with sharing_usage(redis.url) as one:
        assert await everything(one) == [("ada", "qwen", 3, 102)]


async def test_a_redis_that_forgot_is_told_again(redis: RedisServer) -> None:
    async with sharing_usage(redis.url) as one, sharing_usage(redis.url) as other:
        one.add(record())
        await one.tell()
        redis.ask("FLUSHALL")
        for _ in range(TELL_ALL_EVERY):
            await one.tell()
        assert await everything(other) == [("ada", "qwen", 1, 34)]


async def test_a_redis_that_is_away_is_said_so_and_nothing_is_lost(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        async with sharing_usage(server.url) as one:
            one.add(record())
            server.kill()
            assert await everything(one) is None
            await one.tell()
            one.add(record())
            server.start()
            assert await everything(one) == [("ada", "qwen", 2, 68)]


def test_never_less_than_the_own_books_and_never_twice() -> None:
    mine = Line("2026-01-01", "ada", "qwen", 5, 50, 500, 0, 2.5)
    before = Line("2025-12-31", "ada", "qwen", 9, 1, 1, 1, 1.0)
    more = {b'["x","ada","qwen"]': b"[5,50,500,0,2.5]", b'["y","ada","qwen"]': b"[1,1,1,0,0.5]"}
    noise = {b"nonsense": b"[1]", b'["x","ada","qwen"]x': b"[1,1,1,1,1]", b'["x","bob","phi"]': b"[1]"}
    assert added_up({"2026-01-01": more | noise, "2025-12-31": {}}, [before, mine], None, None) == [
        before,
        Line("2026-01-01", "ada", "qwen", 6, 51, 501, 0, 3.0),
    ]


@pytest.mark.parametrize(
    ("since", "until", "first", "last", "count"),
    [
        ("2026-01-01", "2026-01-01", "2026-01-01", "2026-01-01", 1),
        ("2026-01-01", "9999-12-31", "2026-01-01", "2026-01-06", 6),
        ("0001-01-01", "2026-01-05", "2024-12-02", "2026-01-05", 400),
        ("0001-01-01", "0001-01-02", "0001-01-01", "0001-01-02", 2),
        ("2027-01-01", "2027-02-01", None, None, 0),
    ],
)
def test_days(since: str, until: str, first: str | None, last: str | None, count: int) -> None:
    days = days_of(since, until, date(2026, 1, 5))
    assert (days[0] if days else None, days[-1] if days else None, len(days)) == (first, last, count)
