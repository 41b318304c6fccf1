"""Answers that are kept: in memory, in a file, over Redis; bounds, ages, broken files, servers that are away."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.stores.cache.answers import AtHand, FileAnswers, Stored
from gateway.stores.cache.shared import PREFIX, WITHIN_SECONDS, RedisAnswers
from gateway.stores.cache.vectors import Meanings
from gateway.stores.records.db import Place
from tests.house import soon
from tests.redis_kit import RedisServer, running_redis

HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def answer(text: bytes = b"{}", made_at: float = 1_000_000.0) -> Stored:
    return Stored(text, "application/json", made_at)


@contextlib.asynccontextmanager
async def kept_in(path: Path, clock: Clock, most: int = 1 << 20) -> AsyncIterator[FileAnswers]:
    answers = FileAnswers(Place(path, path.parent, "test"), HOUR, most, clock)
    try:
        yield answers
    finally:
        await answers.close()


def test_memory_is_bounded_and_forgets_who_was_used_least() -> None:
    held = AtHand(HOUR, most=3 * answer(b"x" * 100).size)
    for name in "abc":
        held.put(name, answer(b"x" * 100))
    held.get("a", 1_000_000.0)
    held.put("d", answer(b"x" * 100))
    assert [name for name in "abcd" if held.get(name, 1_000_000.0)] == ["a", "c", "d"]
    held.put("e", answer(b"x" * 1000))  # larger than all there is
    assert held.bytes == 0


def test_memory_forgets_what_is_old() -> None:
    held = AtHand(HOUR)
    held.put("a", answer())
    assert held.get("a", 1_000_000.0 + HOUR - 1)
    assert not held.get("a", 1_000_000.0 + HOUR)
    held.put("a", answer())
    assert not held.get("a", 999_999.0), "the clock was set back: nobody knows how old it is"


async def test_a_file_outlives_its_process(tmp_path: Path) -> None:
    path, clock = tmp_path / "cache.sqlite", Clock()
    async with kept_in(path, clock) as answers:
        answers.put("a", answer(b"one"))
        answers.put("a", answer(b"two"))
        answers.put("b", answer(b"old", clock.now - HOUR + 10))
    assert path.stat().st_mode & 0o777 == 0o600
    clock.now += 11
    async with kept_in(path, clock) as answers:
        assert answers.at_hand("a") is None, "this one has it from the file"
        found = await answers.get("a")
        assert found == answer(b"two")
        assert answers.at_hand("a") == found
        assert await answers.get("b") is None
        assert answers.facts() == {"entries": 1, "bytes": answer(b"two").size, "evicted": 0}
        assert await answers.clear() == 1
        assert await answers.get("a") is None
        assert answers.facts()["entries"] == 0


async def test_a_file_is_bounded(tmp_path: Path) -> None:
    path, clock = tmp_path / "cache.sqlite", Clock()
    one = answer(b"x" * 800)
    async with kept_in(path, clock, most=40 * one.size) as answers:
        for number in range(40):
            clock.now += 1
            answers.put(str(number), Stored(one.body, one.content_type, clock.now))
        await soon(lambda: answers.facts()["entries"] == 40)
        assert await answers.get("0")  # in memory; the file hears of it with the next that is written
        clock.now += 1
        answers.put("new", Stored(one.body, one.content_type, clock.now))
        facts = await soon(lambda: answers.facts() if answers.facts()["evicted"] else False)
        assert facts == {"entries": 25, "bytes": 25 * one.size, "evicted": 16}
    async with kept_in(path, clock, most=40 * one.size) as answers:
        assert await answers.get("0"), "it was used last but one"
        assert await answers.get("new")
        assert await answers.get("1") is None


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""], ids=["garbage", "empty"])
async def test_a_broken_file_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache.sqlite"
    path.write_bytes(content)
    async with kept_in(path, Clock()) as answers:
        assert await answers.get("a") is None
        answers.put("a", answer())
    async with kept_in(path, Clock()) as answers:
        assert await answers.get("a") == answer()


async def test_a_file_of_another_version_is_begun_anew(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "cache.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE answers (x); PRAGMA user_version = 999;")
    async with kept_in(path, Clock()) as answers:
        answers.put("a", answer())
    async with kept_in(path, Clock()) as answers:
        assert await answers.get("a") == answer()


async def test_without_a_disk_memory_serves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with kept_in(tmp_path / "file" / "cache.sqlite", Clock()) as answers:
        assert await answers.get("a") is None
        answers.put("a", answer())
        assert await answers.get("a") == answer()
        assert await answers.clear() == 0


async def test_a_clear_is_not_undone_by_a_look_under_way(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    async with kept_in(path, Clock()) as answers:
        answers.put("a", answer())
    async with kept_in(path, Clock()) as answers:
        looking = asyncio.create_task(answers.get("a"))
        await asyncio.sleep(0)
        await answers.clear()
        assert await looking is None
        assert answers.at_hand("a") is None


async def test_closed_it_keeps_nothing_and_raises_nothing(tmp_path: Path) -> None:
    async with kept_in(tmp_path / "cache.sqlite", Clock()) as answers:
        pass
    answers.put("a", answer())
    assert await answers.get("b") is None
    assert await answers.clear() == 0


# --- vectors


async def test_nearest(tmp_path: Path) -> None:
    path, clock = tmp_path / "meanings.sqlite", Clock()
    index = Meanings(Place(path, tmp_path, "test"), HOUR, clock)
    try:
        assert await index.nearest("kin", [1.0, 0.0]) is None
        index.keep("kin", [1.0, 0.0], "a")
        index.keep("kin", [0.0, 2.0], "b")
        index.keep("other", [0.6, 0.8], "c")
        index.keep("kin", [1.0, 0.0, 0.0], "d")
        near = await index.nearest("kin", [0.6, 0.8])
        assert near is not None
        assert near.key == "b"
        assert near.similarity == pytest.approx(0.8, abs=1e-6)
        assert await index.nearest("kin", [0.0, 0.0]) is None, "a vector of no direction is near nothing"
        clock.now += HOUR
        assert await index.nearest("kin", [0.6, 0.8]) is None
        clock.now -= HOUR
        await index.clear()
        assert await index.nearest("kin", [0.6, 0.8]) is None
    finally:
        await index.close()


# --- Redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@contextlib.asynccontextmanager
async def shared(server: RedisServer, seconds: int = 60) -> AsyncIterator[RedisAnswers]:
    answers = RedisAnswers.at(server.url, seconds)
    try:
        yield answers
    finally:
        await answers.close()


async def test_gateways_share_answers(redis: RedisServer) -> None:
    async with shared(redis) as here, shared(redis) as there:
        stored = answer(b"\x00\xff" * 1000, time.time())
        here.put("a", stored)
        await soon(lambda: redis.number("EXISTS", f"{PREFIX}a") == 1)
        assert await there.get("a") == stored
        assert await there.get("b") is None
        assert 0 < redis.number("PTTL", f"{PREFIX}a") <= 60_000
        redis.ask("SET", f"{PREFIX}broken", "x")
        redis.ask("SET", "others", "x")
        assert await there.get("broken") is None
        assert await there.clear() == 2
        assert await here.get("a") is None
        assert redis.number("EXISTS", "others") == 1


async def test_many_at_once_are_served(redis: RedisServer) -> None:
    async with shared(redis) as answers:
        answers.put("many", answer(b"x", time.time()))
        await soon(lambda: redis.number("EXISTS", f"{PREFIX}many") == 1)
        found = await asyncio.gather(*(answers.get("many") for _ in range(50)))
        assert sum(one is not None for one in found) > 40, "but for a few, where the machine is loaded"


async def test_a_redis_that_hangs_costs_its_budget_and_then_nothing(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        async with shared(server) as answers:
            answers.put("a", answer(b"x", time.time()))
            await soon(lambda: server.number("EXISTS", f"{PREFIX}a") == 1)
            assert await answers.get("a")
            server.stop()
            took = []
            for _ in range(10):
                began = time.monotonic()
                assert await answers.get("a") is None
                took.append(time.monotonic() - began)
            took.sort()  # a loaded machine makes one or the other late
            assert took[-2] < WITHIN_SECONDS * 4
            assert took[4] < WITHIN_SECONDS / 2, "the breaker is open: nobody waits any more"
            server.signal(signal.SIGCONT)
            deadline = time.monotonic() + 8
            while await answers.get("a") is None:
                assert time.monotonic() < deadline, "it is not taken back"
                await asyncio.sleep(0.01)


async def test_a_redis_that_is_away(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        pass
    async with shared(server) as answers:
        assert await answers.get("a") is None
        answers.put("a", answer())
        assert await answers.clear() == 0
