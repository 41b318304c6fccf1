"""The Lua scripts, called as they are: each is harmless when it comes twice, and its sums are those of its members."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from gateway.stores.shared.calls import Calls, Outcome, connect
from gateway.stores.shared.scripts import BEAT, GATEWAYS, REFUND, RENEW, RESERVE, SETTLE, keys_of
from tests.house import eventually
from tests.redis_kit import RedisServer, running_redis

SECOND = 1_000_000
KEYS = keys_of("key")
WINDOW, LEASES, SUMS, BUDGET = KEYS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def redis(server: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(server.url, decode_responses=True) as client:
        client.flushall()
        yield client


def call(redis: Redis, script: str, *arguments: str | int) -> Any:
    return redis.eval(script, len(KEYS), *KEYS, *arguments)


def reserve(redis: Redis, number: str, *, lease: int = 10 * SECOND, tokens: int = 50, budget: int = 1000) -> int:
    """The kind of the answer, for 9 requests and 500 tokens a minute and 5 at once."""
    answer = call(redis, RESERVE, number, 9, 500, 5, budget, tokens, lease)
    return int(answer[0])


def renew(
    redis: Redis,
    *,
    seen: tuple[int, int] = (0, 0),
    charge: tuple[str, int] = ("", 0),
    leases: tuple[str, ...] = (),
    window: tuple[str | int, ...] = (),
) -> Any:
    return call(redis, RENEW, 10 * SECOND, *seen, "gateway", *charge, len(leases), *leases, *window)


def sums(redis: Redis) -> dict[str, int]:
    return {str(name): int(value) for name, value in redis.hgetall(SUMS).items() if int(value)}


def test_a_reservation_that_comes_twice_counts_once(redis: Redis) -> None:
    assert reserve(redis, "a") == reserve(redis, "a") == 0
    assert (redis.zcard(WINDOW), redis.zcard(LEASES)) == (1, 1)
    assert sums(redis) == {"window": 50, "leases": 50}


def test_one_whose_news_came_first_counts_once(redis: Redis) -> None:
    """It was held up on its way; what its gateway told of it meanwhile keeps its time."""
    renew(redis, leases=("a:50",), window=(30 * SECOND, "a:50"))
    told = redis.zscore(WINDOW, "a:50")
    assert reserve(redis, "a") == 0
    assert redis.zscore(WINDOW, "a:50") == told
    renew(redis, leases=("a:50",), window=(5 * SECOND, "a:50"))
    assert redis.zscore(WINDOW, "a:50") == told
    assert sums(redis) == {"window": 50, "leases": 50}


def test_an_end_that_comes_twice_counts_once(redis: Redis) -> None:
    reserve(redis, "a")
    reserve(redis, "b")
    for _ in range(2):
        call(redis, REFUND, "a:50", "a:50")
        day, used = call(redis, SETTLE, "b:50", "b:20", "b:50", 20, 0)
        assert (day, used) == (int(time.time() // 86_400), 20)
        assert sums(redis) == {"window": 20}
    assert redis.zcard(LEASES) == 0


def test_a_charge_needs_its_lease_or_that_it_comes_for_the_first_time(redis: Redis) -> None:
    assert call(redis, SETTLE, "a:50", "a:20", "a:50", 20, 0)[1] == 0
    assert call(redis, SETTLE, "a:50", "a:20", "a:50", 20, 1)[1] == 20


def test_the_same_charge_never_counts_twice(redis: Redis) -> None:
    assert [renew(redis, charge=("1", 30))[1] for _ in range(3)] == [30, 30, 30]
    assert renew(redis, charge=("2", 30))[1] == 60


def test_what_was_used_before_redis_lost_it_is_restored(redis: Redis) -> None:
    today = int(time.time() // 86_400)
    assert renew(redis, seen=(today, 70), charge=("1", 5))[1] == 75
    assert renew(redis, seen=(today, 70))[1] == 75
    assert renew(redis, seen=(today - 1, 900))[1] == 75


def test_yesterdays_budget_is_no_more(redis: Redis) -> None:
    redis.hset(BUDGET, mapping={"day": int(time.time() // 86_400) - 1, "used": 999, "gateway": "1"})
    assert reserve(redis, "a") == 0
    assert renew(redis, charge=("1", 40))[1] == 0  # charged yesterday, and told again
    assert renew(redis, charge=("2", 5))[1] == 5
    assert redis.hget(BUDGET, "used") == "5"


@pytest.mark.parametrize(("tokens", "kind"), [(0, 5), (1, 5), (50, 5), (51, 4)])
def test_what_runs_holds_its_part_of_the_budget(redis: Redis, tokens: int, kind: int) -> None:
    assert reserve(redis, "a", budget=50) == 0
    assert reserve(redis, "b", budget=50, tokens=tokens) == kind


@pytest.mark.parametrize(("tokens", "kind"), [(9, 0), (10, 5), (19, 5), (20, 4), (500, 4)])
def test_what_was_used_up_is_another_refusal_than_what_runs_holds(redis: Redis, tokens: int, kind: int) -> None:
    renew(redis, charge=("1", 31))
    assert reserve(redis, "a", budget=50, tokens=10) == 0
    assert reserve(redis, "b", budget=50, tokens=tokens) == kind


def test_what_takes_no_tokens_passes_where_none_are_left(redis: Redis) -> None:
    renew(redis, window=(0, "old:501"))
    assert reserve(redis, "a", tokens=1, budget=0) == 2
    assert reserve(redis, "a", tokens=0, budget=0) == 0
    assert call(redis, RESERVE, "b", 0, 500, 0, 0, 0, 10 * SECOND)[:4] == [0, 0, 2, 501]
    assert redis.zrange(WINDOW, 0, -1) == ["old:501", "a:0"]  # what no limit counts leaves nothing


def test_what_leaves_the_window_takes_its_tokens_along(redis: Redis) -> None:
    renew(redis, window=(60 * SECOND - 50_000, "old:300", 10 * SECOND, "young:190"))
    assert reserve(redis, "a") == 2
    eventually(lambda: reserve(redis, "a") == 0)
    assert redis.zrange(WINDOW, 0, -1) == ["young:190", "a:50"]
    assert sums(redis) == {"window": 240, "leases": 50}


def test_a_lease_ends_by_itself_and_may_come_back(redis: Redis) -> None:
    reserve(redis, "a", lease=1)
    renew(redis, leases=("a:50",))
    assert (redis.zcard(LEASES), sums(redis)["leases"]) == (1, 50)
    reserve(redis, "b", lease=1)
    renew(redis)
    assert (redis.zrange(LEASES, 0, -1), sums(redis)["leases"]) == (["a:50"], 50)


def test_gateways_are_counted_while_they_live(redis: Redis) -> None:
    def beat(gateway: str, lease: int) -> Any:
        return redis.eval(BEAT, 1, *GATEWAYS, gateway, lease)[0]

    assert [beat("a", SECOND), beat("b", SECOND), beat("a", SECOND)] == [1, 2, 2]
    assert [beat("b", 0), beat("c", 1), beat("a", SECOND)][::2] == [1, 1]


async def test_those_that_wait_behind_an_unanswered_call_do_not_wait_their_own_time(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        heard: list[Outcome] = []
        calls = Calls(connect(server.url, 0.5), 0.5, heard.append)
        assert await calls.send(BEAT, GATEWAYS, ("a", SECOND)) == [1]
        assert [(outcome.fresh, outcome.seconds is None) for outcome in heard] == [(True, False)]
        server.stop()
        began = time.monotonic()
        answers = await asyncio.gather(*(calls.send(BEAT, GATEWAYS, ("a", SECOND)) for _ in range(300)))
        assert set(answers) == {None} and time.monotonic() - began < 0.9
        assert [outcome.seconds for outcome in heard[1:]] == [None]
        await calls.close()
