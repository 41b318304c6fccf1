"""`/metrics/stream`: what its numbers are made of, who gets it, and what many readers cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway.http import live
from gateway.http.live import Counts, First, LiveFeed, Look, Rates, quantile, spread
from gateway.metrics import Metrics
from gateway.runtime import Runtime
from gateway.state import ServiceState
from gateway.stores.keys.file import Key
from tests.hot_path_kit import EVENT, FINAL, Client, Rote, client, counting, house, request
from tests.house import ADMIN, USER, soon

BOUNDS = (0.1, 0.2, 0.4)
CALLS_PER_READER = 60  # for a snapshot; a request takes 270. A little above what it takes today
SMALL = b'{"max_tokens":20,"stream":true,"messages":[{"role":"user","content":"Tell me about llamas."}]}'


@pytest.fixture(autouse=True)
def four_times_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "SNAPSHOT_SECONDS", 0.0)


# Numbers


@pytest.mark.parametrize(
    ("counts", "share", "found"),
    [
        ((1, 0, 0, 0), 0.5, 0.05),
        ((2, 2, 0, 0), 0.5, 0.1),
        ((0, 4, 0, 0), 0.5, 0.15),
        ((0, 4, 0, 0), 1.0, 0.2),
        ((1, 0, 1, 0), 0.95, 0.38),
        ((0, 0, 0, 3), 0.5, 0.4),
    ],
)
def test_quantiles_are_those_of_prometheus(counts: tuple[int, ...], share: float, found: float) -> None:
    assert quantile(BOUNDS, counts, share) == pytest.approx(found)


def test_what_came_since_an_earlier_look() -> None:
    earlier, now = First((5, 0, 0, 0), 0.25), First((5, 2, 0, 0), 0.55)
    assert spread(BOUNDS, [(earlier, now)]) == {"count": 2, "avg": 150.0, "p50": 150.0, "p95": 195.0}
    assert spread(BOUNDS, [(First(), now), (First(), now)])["count"] == 14
    assert spread(BOUNDS, [(now, now), (First(), First())]) == {"count": 0, "avg": None, "p50": None, "p95": None}


@pytest.mark.parametrize(
    ("before", "now", "all", "of_a"),
    [
        ({}, {}, 0, 0),
        ({}, {"a": 6, "b": 4}, 5, 3),
        ({"a": 6, "b": 4}, {"a": 6, "b": 8}, 2, 0),
        ({"a": 6}, {"a": 5}, 0, 0),  # a stream had more events than tokens
    ],
)
def test_rates(before: dict[str, int], now: dict[str, int], all: float, of_a: float) -> None:
    looks = [
        Look(at, {name: Counts(tokens_out=value) for name, value in counts.items()})
        for at, counts in ((10.0, before), (12.0, now))
    ]
    rates = Rates(*looks)
    assert (rates.of(lambda one: one.tokens_out), rates.of(lambda one: one.tokens_out, "a")) == (all, of_a)


# Readers


class Reader:
    """A client of the stream, and the snapshots that it has got."""

    def __init__(self, connection: Client) -> None:
        self.connection = connection

    @property
    def snapshots(self) -> list[Any]:
        lines = self.connection.got.split(b"\n")
        return [json.loads(line[6:]) for line in lines if line.startswith(b"data: ") and line.endswith(b"}")]


@contextlib.asynccontextmanager
async def reader(port: int, key: str = ADMIN) -> AsyncIterator[Reader]:
    connection = await client(port)
    connection.transport.write(
        f"GET /metrics/stream HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    )
    await connection.until(b"\r\n\r\n")
    try:
        yield Reader(connection)
    finally:
        connection.transport.abort()


async def test_a_running_stream_is_counted_token_by_token(tmp_path: Path) -> None:
    async with house(tmp_path) as (_, port), reader(port) as seen:
        await soon(lambda: seen.snapshots)
        first = seen.snapshots[0]
        assert first["state"] == "ready" and first["requests"]["total"] == first["tokens"]["out"] == 0
        assert first["models"].keys() == {"default"} and first["time_to_first_token_ms"]["avg"] is None
        Rote.streaming = None
        one = await client(port)
        one.transport.write(request(SMALL))
        await soon(lambda: Rote.streaming is not None)
        assert Rote.streaming is not None
        for number in range(1, 31):
            Rote.streaming.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
            await one.until(b" token", number)
        running = await soon(lambda: next((snap for snap in seen.snapshots if snap["tokens"]["out"] == 30), False))
        assert running["requests"] | {"active": 1, "total": 0} == running["requests"]
        assert running["models"]["default"]["active"] == 1
        rates = [snap["models"]["default"]["tokens_out_per_second"] for snap in seen.snapshots]
        assert max(rates) > 0 and max(rates) == max(snap["tokens"]["out_per_second"] for snap in seen.snapshots)
        Rote.streaming.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(FINAL), FINAL))
        await one.until(b"data: [DONE]")
        over = await soon(lambda: next((snap for snap in seen.snapshots if snap["requests"]["total"]), False))
        assert (over["tokens"]["in"], over["tokens"]["out"], over["requests"]["successful"]) == (10, 9, 1)
        assert over["time_to_first_token_ms"]["count"] == 1 and over["time_to_first_token_ms"]["avg"] > 0
        assert all(snap["tokens"]["out_per_second"] >= 0 for snap in seen.snapshots)
        one.transport.close()


async def test_who_may_read(tmp_path: Path) -> None:
    async with house(tmp_path) as (_, port):
        for key, status in ((USER, b"403"), ("sk-nobody", b"401")):
            async with reader(port, key) as seen:
                assert seen.connection.got.startswith(b"HTTP/1.1 " + status)
        async with reader(port) as seen:
            head = seen.connection.got.partition(b"\r\n\r\n")[0]
            assert head.startswith(b"HTTP/1.1 200") and b"text/event-stream" in head and b"x-request-id" in head


async def test_it_ends_when_the_service_does(tmp_path: Path) -> None:
    async with house(tmp_path) as (runtime, port), reader(port) as seen:
        await soon(lambda: seen.snapshots)
        runtime.board.set_service(ServiceState.DRAINING, "the end")
        await seen.connection.until(b"\r\n0\r\n\r\n")
        assert seen.snapshots[-1]["state"] == "draining"


async def test_it_ends_when_the_key_is_taken_back(tmp_path: Path) -> None:
    async with house(tmp_path) as (runtime, port), reader(port) as seen:
        await soon(lambda: seen.snapshots)
        (tmp_path / "keys").write_text(f"user:{USER}\n")
        runtime.keys.reload()
        await seen.connection.until(b"\r\n0\r\n\r\n")


def feed_of(runtime: Runtime) -> LiveFeed:
    ticking: list[Any] = [getattr(tick, "__self__", None) for tick in runtime.ticks]
    (feed,) = (owner for owner in ticking if isinstance(owner, LiveFeed))
    return feed


async def test_one_snapshot_is_made_and_encoded_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, looked = 0, live.service

    def service(runtime: Runtime) -> dict[str, Any]:
        nonlocal made
        made += 1
        return looked(runtime)

    monkeypatch.setattr(live, "service", service)
    async with house(tmp_path) as (runtime, port), contextlib.AsyncExitStack() as stack:
        readers = [await stack.enter_async_context(reader(port)) for _ in range(50)]
        await soon(lambda: all(len(one.snapshots) >= 3 for one in readers))
        assert made <= max(len(one.snapshots) for one in readers) + 2
        with counting() as found:
            before = sum(one.connection.got.count(b"event:") for one in readers)
            await soon(lambda: sum(one.connection.got.count(b"event:") for one in readers) >= before + 150)
        assert found.total() / 150 < CALLS_PER_READER, found.most_common(20)
        feed = feed_of(runtime)
        assert feed.event(Key("one")) is feed.event(Key("two"))
        assert json.loads(feed.event(Key("few", models=("x*",))).split(b"data: ")[1])["models"] == {}
        await stack.aclose()
        await soon(lambda: not feed._listeners)


async def test_without_readers_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(tmp_path) as (runtime, _):
        feed = feed_of(runtime)
        before = feed._now
        monkeypatch.setattr(feed, "_made", None)  # to call it would fail
        await soon(lambda: feed._now is not before)


async def test_a_slow_reader_gets_the_newest(tmp_path: Path) -> None:
    async with house(tmp_path) as (runtime, port), reader(port) as slow, reader(port) as quick:
        slow.connection.transport.pause_reading()
        await soon(lambda: len(quick.snapshots) >= 3)
        assert runtime.accounts.active == 0 and len(asyncio.all_tasks()) < 40
        slow.connection.transport.resume_reading()
        await soon(lambda: slow.snapshots and slow.snapshots[-1]["timestamp"] >= quick.snapshots[2]["timestamp"])


def test_pings_and_scrapes_are_no_requests() -> None:
    metrics = Metrics()
    for path, model, status in (
        ("/ping", "", 200),
        ("/metrics", "", 200),
        ("unknown", "", 404),
        ("/v1/chat/completions", "tiny", 200),
        ("/v1/chat/completions", "", 401),
        ("worker", "tiny", 502),
    ):
        metrics.count_request(path, "POST", status, model)

    runtime = cast(Runtime, SimpleNamespace(metrics=metrics, accounts=SimpleNamespace(running={})))
    found = live.look(runtime, 5.0)
    assert (found.successful, found.failed) == (1, 2)
    assert {name: one.requests for name, one in found.counts.items()} == {"tiny": 2, "": 1}
