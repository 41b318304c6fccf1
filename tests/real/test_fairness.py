"""On real sockets: whose turn it is, and what a key's own limits allow."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.house import ADMIN, Gateway, Response, eventually, running_gateway
from tests.real.wire import chat, request, wire

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

NAMES = ("many", "one", "low", "tokens", "single", "day", "holds", "six")
KEYS = {name: f"sk-{name}-0123456789abcdefghijABCDEFGHIJ" for name in NAMES}
LINES = f"""
admin:{ADMIN} scope=infer,admin
many:{KEYS["many"]}
one:{KEYS["one"]}
low:{KEYS["low"]} priority=low
tokens:{KEYS["tokens"]} tpm=300
single:{KEYS["single"]} concurrency=1
day:{KEYS["day"]} budget=100/day
holds:{KEYS["holds"]} budget=2000/day
six:{KEYS["six"]}:6 tpm=600
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    """One slot, so that everybody has to wait for everybody."""
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "api_keys.txt").write_text(LINES)
    (folder / "api_keys.txt").chmod(0o600)
    with running_gateway(
        folder, MODEL_PATH=str(slow_model), PARALLEL="1", CTX="2048", MAX_REQUESTS_PER_MINUTE="0", MAX_QUEUE_SIZE="300"
    ) as running:
        yield running


def waiting(gateway: Gateway) -> int:
    return int(gateway.get("/health", key=None).json()["queue"]["waiting"])


def crowd(gateway: Gateway, pool: ThreadPoolExecutor, done: list[str], count: int, **how: object) -> None:
    """Requests of the key `many`, all of them waiting when this returns."""

    def ask(number: int) -> None:
        assert gateway.chat(f"number {number}", key=KEYS["many"], seconds=60, max_tokens=4, **how).status == 200
        done.append("many")

    for number in range(count):
        pool.submit(ask, number)
    eventually(lambda: waiting(gateway) > count - 10 - len(done), 20)


def test_a_crowd_does_not_stand_before_anothers_first_request(gateway: Gateway) -> None:
    done: list[str] = []
    with ThreadPoolExecutor(200) as pool:
        crowd(gateway, pool, done, 200)
        before = len(done)
        assert gateway.chat(key=KEYS["one"], max_tokens=4, seconds=60).status == 200
        served_before = len(done) - before
        assert waiting(gateway) > 100, "the crowd is still there"
    assert served_before <= 4, "next, or next but one; two may have been on their way when it was sent"
    assert len(done) == 200


def test_high_goes_before_normal_before_low_and_a_key_has_its_ceiling(gateway: Gateway) -> None:
    done: list[str] = []
    lock = threading.Lock()

    def ask(name: str, key: str, priority: str) -> Response:
        reply = gateway.chat(key=KEYS[key], headers={"X-Request-Priority": priority}, max_tokens=4, seconds=60)
        with lock:
            done.append(name)
        return reply

    with ThreadPoolExecutor(80) as pool:
        crowd(gateway, pool, [], 60)
        before = waiting(gateway)
        replies = [pool.submit(ask, "ceiling", "low", "high"), pool.submit(ask, "low", "one", "low")]
        eventually(lambda: waiting(gateway) >= before - 20)
        replies.append(pool.submit(ask, "high", "one", "high"))
        assert {reply.result().status for reply in replies} == {200}
    assert done[0] == "high"


def test_tokens_a_minute(gateway: Gateway) -> None:
    key = KEYS["tokens"]
    first = gateway.chat(key=key, max_tokens=100)
    assert first.status == 200
    assert first.headers["x-ratelimit-limit-tokens"] == "300"
    used = first.json()["usage"]["total_tokens"]
    second = gateway.chat(key=key, max_tokens=100)
    left = int(second.headers["x-ratelimit-remaining-tokens"])
    assert second.status == 200 and left <= 300 - used - 100
    third = gateway.chat(key=key, max_tokens=150)
    assert (third.status, third.json()["error"]["code"]) == (429, "tokens_exceeded")
    assert 1 <= int(third.headers["retry-after"]) <= 60
    never = gateway.chat(key=key, max_tokens=400)
    assert (never.status, never.headers["x-should-retry"]) == (429, "false")
    assert gateway.chat(key=key, max_tokens=1).status == 200, "what was refused has cost nothing"


def test_requests_at_once(gateway: Gateway) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(gateway.chat, key=KEYS["single"], max_tokens=200)
        eventually(lambda: gateway.get("/health", key=None).json()["queue"]["active"])
        refused = gateway.chat(key=KEYS["single"], max_tokens=1)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        assert running.result().status == 200
    assert gateway.chat(key=KEYS["single"], max_tokens=1).status == 200


def test_tokens_a_day(gateway: Gateway) -> None:
    assert gateway.chat(key=KEYS["day"], max_tokens=40).status == 200
    refused = gateway.chat(key=KEYS["day"], max_tokens=60)
    assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert refused.headers["x-should-retry"] == "false"
    assert int(refused.headers["retry-after"]) > 0


def test_what_a_running_request_holds_of_the_day_is_worth_a_short_wait(gateway: Gateway) -> None:
    key = KEYS["holds"]
    with wire(gateway) as leaving:
        leaving.send(request("POST", "/v1/chat/completions", chat(stream=True, max_tokens=1800), key=key))
        leaving.first_bytes()
        refused = gateway.chat(key=key, max_tokens=300)
        assert (refused.status, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert "x-should-retry" not in refused.headers
        too_much = gateway.chat(key=key, max_tokens=2000)
        assert (too_much.status, too_much.json()["error"]["code"]) == (429, "insufficient_quota")
    eventually(lambda: gateway.chat(key=key, max_tokens=300).status == 200)


def test_who_finds_no_place_is_told_that_it_has_cost_nothing(gateway: Gateway) -> None:
    with wire(gateway) as running:
        running.send(request("POST", "/v1/chat/completions", chat(stream=True, max_tokens=1800), key=KEYS["one"]))
        running.first_bytes()
        late = gateway.chat(key=KEYS["six"], max_tokens=4, headers={"X-Request-Timeout": "0.1"})
        assert (late.status, late.json()["error"]["code"]) == (503, "queue_timeout")
        remaining = [late.headers[f"x-ratelimit-remaining-{what}"] for what in ("requests", "tokens")]
        assert remaining == ["6", "600"]


def test_who_cannot_be_served_in_time_is_told_at_once(gateway: Gateway) -> None:
    with ThreadPoolExecutor(60) as pool:
        crowd(gateway, pool, [], 60)
        early = gateway.chat(key=KEYS["many"], headers={"X-Request-Timeout": "0.05"}, max_tokens=4)
        assert (early.status, early.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(early.headers["retry-after"]) >= 1
