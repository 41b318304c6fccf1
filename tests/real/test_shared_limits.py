"""Two gateways, one Redis: a limit holds across them, and a Redis that dies stops nobody."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.house import USER, Gateway, eventually, running_gateway
from tests.redis_kit import RedisServer, running_redis

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

LIMIT = 100


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path / "redis") as server:
        yield server


def is_up(gateway: Gateway) -> bool:
    return bool(gateway.get("/health", key=None).json()["redis"]["up"])


@contextlib.contextmanager
def two(folder: Path, chat_model: Path, redis: RedisServer) -> Iterator[list[Gateway]]:
    variables = {
        "MODEL_PATH": str(chat_model),
        "REDIS_URL": redis.url,
        "MAX_REQUESTS_PER_MINUTE": str(LIMIT),
        "MAX_QUEUE_SIZE": "0",
    }
    with running_gateway(folder / "a", variables) as first, running_gateway(folder / "b", variables) as second:
        for gateway in (first, second):
            eventually(partial(is_up, gateway))
        yield [first, second]


def ask(gateways: list[Gateway], count: int) -> Counter[str]:
    def one(number: int) -> str:
        reply = gateways[number % len(gateways)].chat(key=USER, max_tokens=1, user=str(number))
        return "200" if reply.status == 200 else str(reply.json()["error"]["code"])

    with ThreadPoolExecutor(16) as pool:
        return Counter(pool.map(one, range(count)))


def test_three_hundred_requests_against_a_hundred_a_minute(
    tmp_path: Path, chat_model: Path, redis_server: RedisServer
) -> None:
    with two(tmp_path, chat_model, redis_server) as gateways:
        assert ask(gateways, 300) == {"200": LIMIT, "rate_limit_exceeded": 300 - LIMIT}


def test_redis_dies_in_the_middle(tmp_path: Path, chat_model: Path, redis_server: RedisServer) -> None:
    with two(tmp_path, chat_model, redis_server) as gateways:
        before = ask(gateways, 60)
        assert before == {"200": 60}
        redis_server.kill()
        during = ask(gateways, 240)
        assert set(during) <= {"200", "rate_limit_exceeded"}
        assert before["200"] + during["200"] <= 2 * LIMIT
        begun = time.monotonic()
        assert set(ask(gateways, 20)) <= {"200", "rate_limit_exceeded"}
        assert time.monotonic() - begun < 2, "nobody waits for Redis once the breaker is open"
        assert not is_up(gateways[0])
        refused = gateways[0].chat(key=USER, max_tokens=1)
        assert (refused.status, refused.headers["x-ratelimit-remaining-requests"]) == (429, "0")
        assert "gateway_redis_up 0.0" in gateways[0].get("/metrics", key=None).body.decode()
        redis_server.start()
        for gateway in gateways:
            eventually(partial(is_up, gateway), 20)
        assert before["200"] + during["200"] + ask(gateways, 40)["200"] <= 2 * LIMIT, "what was let in alone counts"


def test_usage_is_that_of_both(tmp_path: Path, chat_model: Path, redis_server: RedisServer) -> None:
    with two(tmp_path, chat_model, redis_server) as gateways:
        assert ask(gateways, 6) == {"200": 6}

        def told(gateway: Gateway) -> bool:
            usage = gateway.get("/v1/usage").json()
            return bool(usage["gateways"] == "all" and usage["total"]["requests"] == 6 == usage["total"]["tokens_out"])

        for gateway in gateways:
            eventually(partial(told, gateway))
        redis_server.kill()
        alone = gateways[0].get("/v1/usage").json()
        assert (alone["gateways"], alone["total"]["requests"]) == ("this one", 3)
