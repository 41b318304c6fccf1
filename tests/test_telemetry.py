"""`/v1/telemetry/…`: what may be asked, and every number that is told derived again."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.errors import BadRequest
from gateway.http import telemetry
from gateway.http.context import RUNTIME
from gateway.http.middleware.errors import errors
from gateway.pipeline.usage import NO_USAGE, Usage
from gateway.runtime import Runtime
from gateway.stores.records.books import Books
from gateway.stores.records.telemetry import Asked
from tests.books_kit import opened, record
from tests.telemetry_kit import check_errors, check_requests, check_summary

NOW = 1_800_000_000.0
DAY = 86_400.0
ENDS = [(200, None)] * 6 + [(499, None), (429, "rate_limit_exceeded"), (502, "backend_error"), (401, "missing_api_key")]


def fill(books: Books, count: int, seed: int = 1) -> None:
    """Records of all kinds, over three hours."""
    dice = random.Random(seed)
    for number in range(count):
        status, error = dice.choice(ENDS)
        reached = status in (200, 499, 502) and dice.random() < 0.9
        queue, load = dice.choice([0.0, dice.uniform(0, 500)]), dice.choice([0.0, 0.0, dice.uniform(0, 9000)])
        first = queue + load + dice.uniform(1, 900)
        books.record(
            record(
                number,
                ts=NOW + dice.choice([0.0, dice.uniform(0, 3 * 3600)]),
                key_id="" if status == 401 else dice.choice(["ada", "bob", "carol"]),
                model="" if status == 401 else dice.choice(["qwen", "llama"]),
                route=dice.choice(["/v1/chat/completions", "/v1/embeddings", "/completion"]),
                status=status,
                error=error,
                queue_ms=queue,
                load_ms=load,
                ttft_ms=first if reached else None,
                duration_ms=round(first + dice.uniform(0, 5000), dice.choice([0, 3])),
                usage=Usage(dice.randrange(500), dice.randrange(300), dice.randrange(9)) if reached else NO_USAGE,
            )
        )
    assert books.database.flush()


@asynccontextmanager
async def serving(books: Books) -> AsyncIterator[str]:
    app = web.Application(middlewares=(errors,))
    app[RUNTIME] = cast(Runtime, SimpleNamespace(books=books))
    for name in ("summary", "requests", "errors"):
        app.router.add_get(f"/v1/telemetry/{name}", getattr(telemetry, name))
    async with TestServer(app) as server:
        yield str(server.make_url("/v1/telemetry/"))


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.content_type == "application/json"
        return response.status, await response.json()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("telemetry") / "corral.sqlite"
    with opened(path) as books:
        fill(books, 400)
        yield path, books


# What may be asked


@pytest.mark.parametrize(
    ("query", "asked"),
    [
        ({}, Asked(since=NOW - DAY)),
        ({"since": "1h"}, Asked(since=NOW - 3600)),
        ({"until": "1d"}, Asked(since=NOW - 2 * DAY, until=NOW - DAY)),
        ({"since": "2d", "until": "1h"}, Asked(since=NOW - 2 * DAY, until=NOW - 3600)),
        ({"key": "ada", "model": "qwen"}, Asked(since=NOW - DAY, key="ada", model="qwen")),
        (dict.fromkeys(("since", "until", "key", "model"), ""), Asked(since=NOW - DAY)),
    ],
)
def test_questions(query: dict[str, str], asked: Asked) -> None:
    assert telemetry.questions(query, NOW) == asked


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"since": "yesterday"}, "since"),
        ({"until": "tomorrow"}, "until"),
        ({"since": "1h", "until": "2h"}, "since"),
        ({"bucket": "1m"}, "bucket"),
        ({"limit": "3"}, "limit"),
    ],
)
def test_bad_questions(query: dict[str, str], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        telemetry.questions(query, NOW)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("text", "hours", "seconds"),
    [
        (None, 0.01, 1),
        (None, 1, 60),
        (None, 24, 900),
        (None, 24 * 30, 6 * 3600 * 4),
        (None, 24 * 365, 4 * 86_400),
        ("", 1, 60),
        ("90", 1, 90),
        ("5m", 24, 300),
        ("1h", 24, 3600),
        ("1w", 1, 604_800),
        ("0", 1, None),
        ("-1m", 1, None),
        ("1s", 24, None),
        ("often", 1, None),
        ("1" * 5000, 1, None),
    ],
)
def test_buckets(text: str | None, hours: float, seconds: int | None) -> None:
    asked = Asked(since=NOW, until=NOW + hours * 3600)
    if seconds is None:
        with pytest.raises(BadRequest, match="bucket"):
            telemetry.bucket_seconds(text, asked)
    else:
        assert telemetry.bucket_seconds(text, asked) == seconds


# What is told


@pytest.mark.parametrize(
    ("query", "where"),
    [
        ("", "TRUE"),
        ("&key=ada", "key_id = 'ada'"),
        ("&model=qwen", "model = 'qwen'"),
        ("&key=bob&model=llama", "key_id = 'bob' AND model = 'llama'"),
        ("&until=1800003600", "ts < 1800003600"),
        ("&key=nobody", "FALSE"),
    ],
)
async def test_each_number_is_derived_again(filled: tuple[Path, Books], query: str, where: str) -> None:
    path, books = filled
    async with serving(books) as url:
        status, told = await get(f"{url}summary?since=1800000000{query}")
        assert status == 200
        check_summary(path, told, where)
        status, told = await get(f"{url}errors?since=1800000000{query}")
        assert status == 200
        check_errors(path, told, where)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 100, 101])
async def test_percentiles_of_few(tmp_path: Path, count: int) -> None:
    with opened(tmp_path / "corral.sqlite") as books:
        fill(books, count, seed=count)
        async with serving(books) as url:
            _, told = await get(f"{url}summary?since=1970-01-02")
    check_summary(tmp_path / "corral.sqlite", told)
    assert told["total_requests"] == count


@pytest.mark.parametrize(
    "query",
    [
        "since=1800000000&until=1800010800",
        "since=1800000100.5&until=1800003000&bucket=7m",
        "since=1800003600&until=1800003600",
    ],
)
async def test_requests_over_time(filled: tuple[Path, Books], query: str) -> None:
    path, books = filled
    async with serving(books) as url:
        status, told = await get(f"{url}requests?{query}")
    assert status == 200
    check_requests(path, told)


async def test_where_there_are_no_records_yet(tmp_path: Path) -> None:
    with opened(tmp_path / "corral.sqlite") as books:
        async with serving(books) as url:
            status, told = await get(f"{url}summary")
            assert status == 200
            check_summary(tmp_path / "corral.sqlite", told)
            assert (told["total_requests"], told["success_rate"], told["per_model"]) == (0, None, {})
            status, told = await get(f"{url}requests")
            assert status == 200 and {row["total_requests"] for row in told["buckets"]} == {0}
            status, told = await get(f"{url}errors")
            assert (status, told["total_errors"], told["errors"]) == (200, 0, [])


async def test_where_there_are_no_books_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "corral.sqlite") as books:
        async with serving(books) as url:
            for path in ("summary", "requests", "errors"):
                status, body = await get(url + path)
                assert status == 503 and "there are no records" in body["error"]["message"]
                status, body = await get(f"{url}{path}?limit=3")
                assert (status, body["error"]["param"]) == (400, "limit")
