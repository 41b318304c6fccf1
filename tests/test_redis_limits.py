"""Limits that gateways share, over a real Redis that is killed, stopped and started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest

from gateway.admission.limits import Claim, Limits
from gateway.errors import (
    ConcurrencyExceeded,
    ConfigError,
    InsufficientQuota,
    RateLimitExceeded,
    TokensExceeded,
    TooManyRequests,
)
from gateway.stores.shared.breaker import Breaker
from gateway.stores.shared.calls import Calls, Outcome
from gateway.stores.shared.limits import SharedLimits, SharedReservation, Timing, Told, sharing
from tests.house import ROOT, soon
from tests.redis_kit import PATIENT, RedisServer, attempt, attempts, go, other_gateway, passed, running_redis

HUNDRED = Claim("key", rpm=100)
QUICK = Timing(call=0.3, slow=0.3, beat=0.1)  # to see it fail soon, on a loaded machine too


@pytest.fixture(scope="module")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    assert shared_redis.ask("FLUSHALL") == b"+OK\r\n"
    return shared_redis


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that the test may end."""
    with running_redis(tmp_path / "redis") as server:
        yield server


@contextlib.asynccontextmanager
async def gateways(url: str, timing: Timing = PATIENT, number: int = 2) -> AsyncIterator[list[SharedLimits]]:
    async with contextlib.AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(sharing(url, timing=timing)) for _ in range(number)]
        await soon(lambda: all(one.view()["gateways"] == number for one in opened))
        yield opened


def window(redis: RedisServer, caller: str = "key") -> int:
    return redis.number("ZCARD", f"corral:{{{caller}}}:window")


def leases(redis: RedisServer, caller: str = "key") -> int:
    return redis.number("ZCARD", f"corral:{{{caller}}}:leases")


def held(redis: RedisServer, what: str, caller: str = "key") -> int:
    """Tokens in the window or in the leases, by the sums that Redis keeps."""
    answer = redis.ask("HGET", f"corral:{{{caller}}}:sums", what)
    return 0 if answer == b"$-1\r\n" else int(answer.split(b"\r\n")[1])


def members(redis: RedisServer, what: str, caller: str = "key") -> list[bytes]:
    """As they lie in the sorted set, whole."""
    lines = redis.ask("ZRANGE", f"corral:{{{caller}}}:{what}", "0", "-1").split(b"\r\n")
    return [line for line in lines if b":" in line]


def at_once(limits: SharedLimits, claim: Claim) -> SharedReservation | TooManyRequests:
    """The decision of one that may not wait for anything at all."""
    decision = limits.reserve(claim)
    try:
        decision.send(None)
    except StopIteration as done:
        assert isinstance(done.value, SharedReservation)
        return done.value
    except TooManyRequests as error:
        return error
    finally:
        decision.close()
    raise AssertionError("it waits")


async def test_of_300_requests_at_two_gateways_exactly_100_pass(redis: RedisServer) -> None:
    async with gateways(redis.url) as both:
        assert len(await attempts(both, HUNDRED, 300)) == 100
        with pytest.raises(RateLimitExceeded) as raised:
            await both[0].reserve(HUNDRED)
        assert window(redis) == 100
    error = raised.value
    assert error.retry_after is not None and 50 < error.retry_after <= 60
    assert error.headers()["x-ratelimit-remaining-requests"] == "0"
    assert error.headers()["Retry-After"] == error.headers()["x-ratelimit-reset-requests"].removesuffix("s")


def test_of_300_requests_at_two_processes_exactly_100_pass(redis: RedisServer) -> None:
    with other_gateway(redis.url, 150, rpm=100) as one, other_gateway(redis.url, 150, rpm=100) as other:
        go(one)
        go(other)
        assert passed(one) + passed(other) == 100


async def test_a_refused_request_costs_nothing(redis: RedisServer) -> None:
    async with gateways(redis.url) as (one, other):
        kept = await one.reserve(Claim("key", rpm=3, tpm=100, concurrency=1, budget=1000, tokens=60))
        for claim, error in (
            (Claim("key", rpm=3, tpm=100, concurrency=1, budget=1000, tokens=10), ConcurrencyExceeded),
            (Claim("key", rpm=1, tpm=100, concurrency=9, budget=1000, tokens=10), RateLimitExceeded),
            (Claim("key", rpm=3, tpm=100, concurrency=9, budget=1000, tokens=41), TokensExceeded),
            (Claim("key", rpm=3, tpm=100, concurrency=9, budget=65, tokens=10), ConcurrencyExceeded),
            (Claim("key", rpm=3, tpm=100, concurrency=9, budget=9, tokens=10), InsufficientQuota),
        ):
            with pytest.raises(error):
                await other.reserve(claim)
            assert (window(redis), leases(redis)) == (1, 1)
            assert (held(redis, "window"), held(redis, "leases")) == (60, 60)
        kept.refund()
        kept.refund()
        kept.settle(50)
        await soon(lambda: leases(redis) == 0)
        assert (window(redis), held(redis, "window"), held(redis, "leases")) == (0, 0, 0)


async def test_what_was_not_used_comes_back_at_every_gateway(redis: RedisServer) -> None:
    async with gateways(redis.url) as (one, other):
        claim = Claim("key", tpm=100, budget=1000, tokens=80)
        first = await one.reserve(claim)
        assert not await attempt(other, claim)
        first.settle(20)
        first.settle(20)
        await soon(lambda: held(redis, "window") == 20)
        assert held(redis, "leases") == 0
        second = await other.reserve(claim)
        assert dict(second.headers())["x-ratelimit-remaining-tokens"] == "0"
        second.settle(90)  # more than it had reserved
        await soon(lambda: held(redis, "window") == 110)
        assert redis.ask("HGET", "corral:{key}:budget", "used").split(b"\r\n")[1] == b"110"


async def test_a_days_budget_is_shared_and_its_end_told(redis: RedisServer) -> None:
    async with gateways(redis.url) as (one, other):
        claim = Claim("key", budget=100, tokens=40)
        (await one.reserve(claim)).settle(40)
        running = await other.reserve(claim)
        with pytest.raises(ConcurrencyExceeded) as held:
            await one.reserve(claim)
        assert held.value.headers() == {"retry-after-ms": "1000", "Retry-After": "1"}
        running.settle(30)
        await soon(lambda: leases(redis) == 0)
        with pytest.raises(InsufficientQuota) as raised:
            await one.reserve(claim)
        midnight = 86_400 - time.time() % 86_400
        assert raised.value.retry_after == pytest.approx(midnight, abs=10) or midnight < 10
        assert raised.value.headers()["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("claim", "before", "used"),
    [
        (Claim("key", rpm=2, tokens=5), 2, None),
        (Claim("key", tpm=10, tokens=5), 2, None),
        (Claim("key", tpm=10, tokens=11), 0, None),
        (Claim("key", concurrency=2), 2, None),
        (Claim("key", budget=10, tokens=5), 2, None),
        (Claim("key", budget=10, tokens=5), 2, 5),
        (Claim("key", rpm=9, tpm=99, budget=10, tokens=5), 2, None),
        (Claim("key", rpm=9, tpm=99, budget=10, tokens=5), 2, 4),
        (Claim("key", rpm=2, tpm=9, tokens=5), 1, None),
    ],
)
async def test_one_gateway_and_redis_refuse_alike(
    redis: RedisServer, claim: Claim, before: int, used: int | None
) -> None:
    """The same error, words and headers as without Redis, but for a guess of a wait. `used`: by those that have ended,
    where none runs any more."""
    embedded = Limits()
    async with gateways(redis.url, number=1) as (limits,):
        mine, theirs = [], []
        for _ in range(before):
            mine.append(embedded.reserve(claim))
            theirs.append(await limits.reserve(claim))
        assert [one.headers() for one in theirs] == [one.headers() for one in mine]
        if used is not None:
            for here, there in zip(mine, theirs, strict=True):
                here.settle(used)
                there.settle(used)
            await soon(lambda: leases(redis) == 0)
        with pytest.raises(TooManyRequests) as ours:
            await limits.reserve(claim)
        with pytest.raises(TooManyRequests) as alone:
            embedded.reserve(claim)
    assert type(ours.value) is type(alone.value)
    assert ours.value.message.partition("passes in")[0] == alone.value.message.partition("passes in")[0]
    assert ours.value.retry_after == pytest.approx(alone.value.retry_after, abs=1)
    ignored = {"retry-after-ms": "", "Retry-After": ""}
    assert ours.value.headers() | ignored == alone.value.headers() | ignored


async def test_a_killed_gateways_leases_end_by_themselves(redis: RedisServer) -> None:
    claim = Claim("key", concurrency=2, budget=100, tokens=50)
    async with sharing(redis.url, timing=PATIENT) as limits:
        with other_gateway(redis.url, 2, concurrency=2, budget=100, tokens=50) as other:
            go(other)
            assert passed(other) == 2
            until = time.monotonic() + 1.5 * PATIENT.lease  # its heartbeat holds them for longer than a lease lasts
            await soon(lambda: time.monotonic() > until)
            assert isinstance(await refused(limits, Claim("key", budget=100, tokens=50)), ConcurrencyExceeded)
            assert isinstance(await refused(limits, Claim("key", concurrency=2)), ConcurrencyExceeded)
            other.kill()
            killed = time.monotonic()
            until = killed + PATIENT.lease
            await soon(lambda: time.monotonic() > until)
            assert await attempt(limits, claim)
        await soon(lambda: limits.view()["gateways"] == 1)


@pytest.mark.parametrize("before", [0, 1])
async def test_a_refund_is_told_alike_too(redis: RedisServer, before: int) -> None:
    claim = Claim("key", rpm=9, tpm=99, tokens=5)
    embedded = Limits()
    async with gateways(redis.url, number=1) as (limits,):
        kept = [(embedded.reserve(claim), await limits.reserve(claim)) for _ in range(before)]
        mine, theirs = embedded.reserve(claim), await limits.reserve(claim)
        for reservation in (mine, theirs):
            reservation.refund()
        assert theirs.headers() == mine.headers()
        assert dict(theirs.headers())["x-ratelimit-remaining-requests"] == str(9 - len(kept))


async def test_whoever_leaves_while_waiting_has_reserved_nothing(redis: RedisServer) -> None:
    async with gateways(redis.url, number=1) as (limits,):
        claim = Claim("key", rpm=10, concurrency=10)
        tasks = [asyncio.ensure_future(limits.reserve(claim)) for _ in range(5)]
        await asyncio.sleep(0)  # they have asked
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        kept = await attempt(limits, Claim("key", rpm=10))  # behind them on the same connection
        assert kept and (window(redis), leases(redis)) == (1, 0)


async def test_a_reservation_that_is_lost_is_settled(redis: RedisServer) -> None:
    async with gateways(redis.url, number=1) as (limits,):
        assert await attempt(limits, Claim("key", concurrency=1))  # nobody keeps it
        await soon(lambda: leases(redis) == 0)


async def test_scripts_that_redis_forgot_are_told_again(redis: RedisServer) -> None:
    async with gateways(redis.url, number=1) as (limits,):
        assert await attempt(limits, HUNDRED)
        assert redis.ask("SCRIPT FLUSH") == b"+OK\r\n"
        assert await attempt(limits, HUNDRED)
        assert limits.view()["up"]
        assert window(redis) == 2
        assert redis.ask("FLUSHALL") == redis.ask("SCRIPT FLUSH") == b"+OK\r\n"  # as if it had started anew, unnoticed
        assert await attempt(limits, HUNDRED)
        await soon(lambda: window(redis) == 3)
    assert redis.number("ZCARD", "corral:{gateways}:beats") == 0


async def test_keys_are_of_one_cluster_slot_and_end_by_themselves(redis: RedisServer) -> None:
    async with gateways(redis.url, number=1) as (limits,):
        claim = Claim("key", rpm=9, tpm=900, concurrency=9, budget=900, tokens=10)
        reservation = await limits.reserve(claim)
        (await limits.reserve(claim)).settle(5)
        await soon(lambda: leases(redis) == 1)
        keys = [line for line in redis.ask("KEYS *").decode().split("\r\n") if line.startswith("corral:")]
        assert {key.split(":")[-1] for key in keys} == {"window", "leases", "sums", "budget", "beats"}
        assert {key.rpartition(":")[0] for key in keys} == {"corral:{key}", "corral:{gateways}"}
        assert all(0 < redis.number("TTL", key) <= 172_800 for key in keys)
        reservation.refund()


async def refused(limits: SharedLimits, claim: Claim) -> TooManyRequests | None:
    try:
        await limits.reserve(claim)
    except TooManyRequests as error:
        return error
    return None


# Redis dies, and comes back


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_redis_gone_in_the_middle(own_redis: RedisServer, how: signal.Signals) -> None:
    """Never more than twice the limit, nobody waits once the breaker is open, and full recovery."""
    redis = own_redis
    async with gateways(redis.url, QUICK) as both:
        kept = [one for _ in range(30) for one in await attempts(both, HUNDRED, 2)]
        assert 0 < len(kept) <= 100
        redis.kill() if how is signal.SIGKILL else redis.signal(how)
        longest = 0.0
        while any(one.view()["up"] for one in both):
            began = time.monotonic()
            kept += await attempts(both, HUNDRED, 4)
            longest = max(longest, time.monotonic() - began)
        assert longest < 2.0  # two calls' time and what a loaded machine adds
        for _ in range(75):
            for one in both:
                decision = at_once(one, HUNDRED)
                kept += [decision] if isinstance(decision, SharedReservation) else []
        assert 100 <= len(kept) <= 200

        redis.start() if how is signal.SIGKILL else redis.signal(signal.SIGCONT)
        await soon(lambda: all(one.view()["up"] for one in both))
        assert all(one.view()["gateways"] == 2 for one in both)
        await soon(lambda: window(redis) >= len(kept))
        assert not await attempts(both, HUNDRED, 50)
        for reservation in kept:
            reservation.refund()
        await soon(lambda: window(redis) == 0)
        assert len(await attempts(both, HUNDRED, 150)) == 100


async def test_however_often_redis_is_lost_in_a_minute_no_more_than_twice_the_limit_pass(
    own_redis: RedisServer,
) -> None:
    redis = own_redis
    kept: list[SharedReservation] = []
    async with gateways(redis.url, QUICK) as both:
        for how in (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL):
            kept += await attempts(both, HUNDRED, 60)
            redis.kill() if how is signal.SIGKILL else redis.signal(how)
            kept += await attempts(both, HUNDRED, 60)
            await soon(lambda: not any(one.view()["up"] for one in both))
            kept += await attempts(both, HUNDRED, 60)
            redis.start() if how is signal.SIGKILL else redis.signal(signal.SIGCONT)
            await soon(lambda: all(one.view()["up"] for one in both))
        kept += await attempts(both, HUNDRED, 300)
        assert 100 <= len(kept) <= 200
        await soon(lambda: window(redis) == len(kept))


async def test_a_redis_that_starts_anew_learns_what_it_had(own_redis: RedisServer) -> None:
    """Between two requests, so that nobody noticed it being away."""
    redis = own_redis
    async with gateways(redis.url, number=1) as (limits,):
        claim = Claim("key", rpm=100, tpm=10_000, concurrency=80, budget=10_000, tokens=50)
        kept = await attempts([limits], claim, 60)
        for reservation in kept[:20]:
            reservation.settle(10)
        await soon(lambda: leases(redis) == 40)
        redis.kill()
        redis.start()
        await soon(lambda: limits.view()["up"] and leases(redis) == 40)
        assert (window(redis), held(redis, "window"), held(redis, "leases")) == (60, 40 * 50 + 20 * 10, 40 * 50)
        assert redis.ask("HGET", "corral:{key}:budget", "used").split(b"\r\n")[1] == b"200"
        assert len(await attempts([limits], claim, 60)) == 40


async def test_what_ended_while_redis_was_away_is_told_once(own_redis: RedisServer) -> None:
    redis = own_redis
    async with gateways(redis.url, QUICK, number=1) as (limits,):
        claim = Claim("key", tpm=1000, concurrency=9, budget=1000, tokens=100)
        before = [await limits.reserve(claim) for _ in range(3)]
        redis.signal(signal.SIGSTOP)
        await soon(lambda: not limits.view()["up"])
        meanwhile = [at_once(limits, claim) for _ in range(3)]
        before[0].settle(10)
        before[1].refund()
        assert isinstance(meanwhile[0], SharedReservation) and isinstance(meanwhile[1], SharedReservation)
        meanwhile[0].settle(7)
        meanwhile[1].refund()
        redis.signal(signal.SIGCONT)
        await soon(lambda: limits.view()["up"])
        await soon(lambda: leases(redis) == 2)
        await soon(lambda: held(redis, "window") == 10 + 7 + 100 + 100)
        await soon(lambda: held(redis, "leases") == 200)
        assert redis.ask("HGET", "corral:{key}:budget", "used").split(b"\r\n")[1] == b"17"
        assert limits._news.own("key").spent == 17


async def test_what_redis_does_too_late_is_taken_back(own_redis: RedisServer) -> None:
    """The gateway has refused by then; the request must not count."""
    redis, claim = own_redis, Claim("key", rpm=2)
    async with gateways(redis.url, QUICK) as (one, other):
        first = await attempt(one, claim)
        redis.stop()
        assert first and await attempt(one, claim) is None  # its share is one
        redis.signal(signal.SIGCONT)
        await soon(lambda: one.view()["up"] and other.view()["up"])
        await soon(lambda: window(redis) == 1)
        assert await attempt(other, claim)


async def test_nobody_waits_on_when_the_breaker_opens() -> None:
    """For slowness: the answers do come, but late."""
    waiting: list[asyncio.Future[list[int] | None]] = []

    class Slow:
        def send(self, *_: object) -> asyncio.Future[list[int] | None]:
            waiting.append(asyncio.get_running_loop().create_future())
            return waiting[-1]

        def abandon(self) -> None:
            for answer in waiting:
                answer.set_result(None)

    limits = SharedLimits(lambda judge: cast(Calls, Slow()), Told(), Timing())
    limits._breaker = Breaker()
    asked = asyncio.ensure_future(attempt(limits, HUNDRED))
    await asyncio.sleep(0)
    for _ in range(3):
        assert not asked.done()
        limits._judge(Outcome(Timing().call))
    assert await asyncio.wait_for(asked, 1)  # by its own share


async def test_a_change_is_seen(own_redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    redis = own_redis
    ups: list[float] = []
    alone: list[int] = []
    caplog.set_level(logging.INFO, "corral.redis")
    told = Told(up=ups.append, alone=lambda: alone.append(1))
    async with sharing(redis.url, told, QUICK) as limits:
        await soon(lambda: limits.view()["up"])
        kept = [await limits.reserve(HUNDRED)]
        caplog.clear()
        assert ups[-1] == 1
        redis.kill()
        await soon(lambda: not limits.view()["up"])
        decided = len(alone)
        for _ in range(5):
            decision = at_once(limits, HUNDRED)
            assert isinstance(decision, SharedReservation)
            kept.append(decision)
        assert len(alone) == decided + 5
        assert ups[-1] == 0
        redis.start()
        await soon(lambda: limits.view()["up"])
        assert ups[-2:] == [0, 1]
    assert [(record.levelname, "ConnectionError" in record.getMessage()) for record in caplog.records] == [
        ("WARNING", True),
        ("INFO", False),
    ]


async def test_a_start_without_redis_is_not_delayed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    redis = RedisServer(tmp_path)
    began = time.monotonic()
    async with sharing(f"redis://user:secret-word@127.0.0.1:{redis.port}/0", timing=QUICK) as limits:
        assert time.monotonic() - began < 2
        assert limits.view() == {"up": False, "since": limits.view()["since"], "gateways": 1}
        kept = at_once(limits, Claim("key", rpm=1))
        assert isinstance(kept, SharedReservation)
        assert isinstance(at_once(limits, Claim("key", rpm=1)), RateLimitExceeded)
    assert "does not answer" in caplog.text and "secret-word" not in caplog.text


@pytest.mark.parametrize("seed", range(4))
async def test_everything_returns_to_zero(own_redis: RedisServer, seed: int) -> None:
    """Requests that come, end, are refunded and cancelled at random, while Redis stops, goes on, dies and starts."""
    redis, chance = own_redis, random.Random(seed)
    claim = Claim("key", rpm=1000, tpm=100_000, concurrency=50, budget=10**9, tokens=100)
    open_ones: list[SharedReservation] = []
    weights = used = 0
    async with gateways(redis.url, QUICK) as both:
        for _ in range(150):
            what = chance.random()
            if what < 0.5:
                if (reservation := await attempt(chance.choice(both), claim)) is not None:
                    open_ones.append(reservation)
            elif what < 0.6:
                task = asyncio.ensure_future(attempt(chance.choice(both), claim))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    if (reservation := await task) is not None:
                        open_ones.append(reservation)
            elif what < 0.95 and open_ones:
                reservation = open_ones.pop(chance.randrange(len(open_ones)))
                if chance.random() < 0.5:
                    reservation.refund()
                else:
                    tokens = chance.randrange(150)
                    reservation.settle(tokens)
                    weights, used = weights + 1, used + tokens
            elif what < 0.97:
                redis.signal(chance.choice([signal.SIGSTOP, signal.SIGCONT]))
            elif what > 0.98:
                redis.kill()
                redis.start()
        redis.signal(signal.SIGCONT)
        for reservation in open_ones:
            reservation.refund()
        await soon(lambda: all(one.view()["up"] for one in both))
        await soon(lambda: leases(redis) == 0)
        assert held(redis, "leases") == 0
        await soon(lambda: (window(redis), held(redis, "window")) == (weights, used))
        assert held(redis, "window") == sum(int(member.rpartition(b":")[2]) for member in members(redis, "window"))


@pytest.mark.parametrize("url", ["http://h", "redis://user:secret-word@h:port/0", "secret-word"])
async def test_a_wrong_url_is_told_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        async with sharing(url):
            pass
    assert str(raised.value).startswith("REDIS_URL: must be redis://")
    assert "secret-word" not in str(raised.value)


def test_redis_is_imported_only_where_it_is_used() -> None:
    program = "import sys, gateway.stores.shared.limits; sys.exit('redis' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
