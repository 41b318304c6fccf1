"""`GET /logs` and `GET /v1/usage`: what they take, what they tell to whom, and `corral logs` on top of them."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from aiohttp.typedefs import Handler

from gateway.cli import Parser, logs_options
from gateway.cli import logs as command
from gateway.errors import BadRequest, InsufficientScope
from gateway.http import logs, usage
from gateway.http.context import KEY, RUNTIME
from gateway.http.middleware.errors import errors
from gateway.pipeline.usage import Usage
from gateway.runtime import Runtime
from gateway.stores.keys.file import Key
from gateway.stores.records.books import Books
from gateway.stores.records.reading import Wanted
from tests.books_kit import opened, record
from tests.house import soon

NOW = 1_800_000_000.0
DAY = 86_400.0
ADMIN, ADA = Key("root", scopes=frozenset({"infer", "admin"})), Key("ada", scopes=frozenset({"infer"}))


@web.middleware
async def by_header(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who asks; that a route needs the scope admin is the route table's matter."""
    request[KEY] = ADA if request.headers.get("Authorization") == "Bearer ada" else ADMIN
    return await handler(request)


@asynccontextmanager
async def serving(books: Books) -> AsyncIterator[str]:
    app = web.Application(middlewares=(errors, by_header))
    app[RUNTIME] = cast(Runtime, SimpleNamespace(books=books, shared_usage=None))
    app.router.add_get("/logs", logs.logs)
    app.router.add_get("/v1/usage", usage.usage)
    async with TestServer(app) as server:
        yield str(server.make_url("/")).rstrip("/")


async def get(url: str, key: str = "root") -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.get(url) as response,
    ):
        assert response.content_type == "application/json"
        return response.status, await response.json()


# What they take


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("1h", NOW - 3600),
        ("30m", NOW - 1800),
        ("90s", NOW - 90),
        ("2d", NOW - 2 * DAY),
        ("1w", NOW - 7 * DAY),
        ("2026-11-21", 1_795_219_200),
        ("2026-11-21T13:00:00Z", 1_795_266_000),
        ("2026-11-21T13:00:00", 1_795_266_000),
        ("2026-11-21 13:00", 1_795_266_000),
        ("2026-11-21T15:00:00+02:00", 1_795_266_000),
        ("2026-11-21T15:00:00 02:00", 1_795_266_000),  # a + that nobody has quoted
        ("1795266000.5", 1_795_266_000.5),
        ("0", 0),
    ],
)
def test_moments(text: str, at: float) -> None:
    assert logs.moment(text, NOW) == at


@pytest.mark.parametrize("text", ["x", "1", "-1h", "1y", "1.5h", "2026-13-01", "99999999999999", "١h", "1h ", "'; --"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(BadRequest, match="since is"):
        logs.moment(text, NOW)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, Wanted()),
        ({"limit": "5", "since": "1h", "key": "ada"}, Wanted(limit=5, since=NOW - 3600, key="ada")),
        ({"model": "qwen", "status": "5xx"}, Wanted(model="qwen", status="5xx")),
        ({"since": "2h", "until": "1h"}, Wanted(since=NOW - 7200, until=NOW - 3600)),
        ({"before": "17"}, Wanted(before=17)),
        ({"after": "0", "limit": "1000"}, Wanted(after=0, limit=1000)),
        (dict.fromkeys(("limit", "since", "key", "model", "status"), ""), Wanted()),
    ],
)
def test_questions(query: dict[str, str], wanted: Wanted) -> None:
    assert logs.wanted(query, NOW) == wanted


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "ten"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"limit": "9" * 5000}, "limit"),
        ({"since": "yesterday"}, "since"),
        ({"until": "tomorrow"}, "until"),
        ({"status": "abc"}, "status"),
        ({"status": "99"}, "status"),
        ({"status": "6xx"}, "status"),
        ({"before": "-1"}, "before"),
        ({"before": str(2**63)}, "before"),
        ({"before": "1", "after": "1"}, "after"),
        ({"sicne": "1h"}, "sicne"),
    ],
)
def test_bad_questions(query: dict[str, str], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        logs.wanted(query, NOW)
    assert refused.value.param == param


TODAY = date(2026, 11, 21)


@pytest.mark.parametrize(
    ("since", "until", "first", "last"),
    [
        (None, None, "2026-10-23", "2026-11-21"),
        ("2026-11-21", None, "2026-11-21", "2026-11-21"),
        ("2020-01-01", None, "2020-01-01", "2026-11-21"),
        (None, "2026-01-31", "2026-01-02", "2026-01-31"),
        (None, "0001-01-01", "0001-01-01", "0001-01-01"),
    ],
)
def test_days(since: str | None, until: str | None, first: str, last: str) -> None:
    assert [day.isoformat() for day in usage.days(since, until, TODAY)] == [first, last]


@pytest.mark.parametrize(
    ("since", "until", "param"),
    [
        ("1h", None, "since"),
        (None, "2026-02-30", "until"),
        ("20260101", None, "since"),
        ("2026-W01-1", None, "since"),
        ("2026-11-22", None, "since"),
        ("2026-01-02", "2026-01-01", "since"),
    ],
)
def test_bad_days(since: str | None, until: str | None, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        usage.days(since, until, TODAY)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("key", "asked", "told"), [(ADMIN, None, None), (ADMIN, "ada", "ada"), (ADA, None, "ada"), (ADA, "ada", "ada")]
)
def test_whose_usage(key: Key, asked: str | None, told: str | None) -> None:
    assert usage.whose(key, asked) == told


def test_the_usage_of_others_needs_the_scope_admin() -> None:
    with pytest.raises(InsufficientScope):
        usage.whose(ADA, "bob")


# What they tell


async def test_usage_over_http(tmp_path: Path) -> None:
    with opened(tmp_path / "corral.sqlite") as books:
        for day, key, model in [(0, "ada", "qwen"), (0, "ada", "llama"), (0, "bob", "qwen"), (1, "ada", "qwen")]:
            books.record(record(ts=NOW + day * DAY, key_id=key, model=model, usage=Usage(10, 20, 3)))
        assert books.database.flush()
        async with serving(books) as url:
            asked = f"{url}/v1/usage?since=2027-01-01&until=2027-12-31"
            status, body = await get(asked)
            assert status == 200 and body["object"] == "usage"
            assert body["data"][0] == {
                "date": "2027-01-15",
                "key": "ada",
                "model": "llama",
                "requests": 1,
                "tokens_in": 10,
                "tokens_out": 20,
                "tokens_cached": 3,
                "seconds": pytest.approx(0.1),
            }
            assert body["total"] == {
                "requests": 4,
                "tokens_in": 40,
                "tokens_out": 80,
                "tokens_cached": 12,
                "seconds": pytest.approx(0.4),
            }
            own = (await get(asked, "ada"))[1]
            assert {line["key"] for line in own["data"]} == {"ada"} and own["total"]["requests"] == 3
            assert (await get(f"{asked}&key=ada"))[1] == own
            assert (await get(f"{asked}&model=qwen&key=bob"))[1]["total"]["requests"] == 1
            status, body = await get(f"{asked}&key=bob", "ada")
            assert (status, body["error"]["code"]) == (403, "insufficient_scope")
            status, body = await get(f"{url}/v1/usage?since=tomorrow")
            assert (status, body["error"]["param"]) == (400, "since")
            status, body = await get(f"{url}/v1/usage")
            assert (status, body["data"], body["total"]["requests"]) == (200, [], 0)


async def test_logs_over_http(tmp_path: Path) -> None:
    with opened(tmp_path / "corral.sqlite") as books:
        for number in range(5):
            books.record(record(number, key_id="ab"[number % 2], status=200 + number, stream=True))
        assert books.database.flush()
        async with serving(books) as url:
            status, body = await get(f"{url}/logs?limit=2")
            assert status == 200 and [row["request_id"] for row in body["logs"]] == ["req_4", "req_3"]
            assert body["logs"][0].keys() >= {"id", "ts", "trace_id", "tokens_in", "cache", "response"}
            assert body["logs"][0]["stream"] is True
            status, body = await get(f"{url}/logs?limit=3&before={body['next']}")
            assert [row["request_id"] for row in body["logs"]] == ["req_2", "req_1", "req_0"]
            status, body = await get(f"{url}/logs?before={body['next']}")
            assert (body["logs"], body["next"]) == ([], None)
            status, body = await get(f"{url}/logs?key=a&status=2xx&since=1h&model=qwen")
            assert [row["request_id"] for row in body["logs"]] == ["req_4", "req_2", "req_0"]
            status, body = await get(f"{url}/logs?limit=all")
            assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_where_there_are_no_records_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "corral.sqlite") as books:
        async with serving(books) as url:
            for path in ("/logs", "/v1/usage"):
                status, body = await get(url + path)
                assert status == 503 and "there are no records" in body["error"]["message"]


# corral logs


def parsed(*argv: str) -> argparse.Namespace:
    parser: argparse.ArgumentParser = Parser(prog="corral")
    logs_options.add_parser(parser.add_subparsers())
    return parser.parse_args(["logs", *argv])


async def run(url: str, *argv: str) -> int:
    args = parsed("--url", url, "--api-key", "root", *argv)
    return await asyncio.to_thread(args.run, args)


@pytest.fixture
def filled(tmp_path: Path) -> Any:
    with opened(tmp_path / "corral.sqlite") as books:
        for number in range(1234):
            books.record(record(number, ts=NOW + number, key_id="ab"[number % 2], status=200 if number % 3 else 429))
        assert books.database.flush()
        yield books


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], list(range(1184, 1234))),
        (["--limit", "3"], [1231, 1232, 1233]),
        (["--limit", "700"], list(range(534, 1234))),
        (["--since", "2027-01-15T08:00:00Z"], list(range(1234))),
        (["--since", "2027-01-15T08:20:00Z", "--limit", "2"], [1232, 1233]),
        (["--since", "2027-01-15T08:20:00Z"], list(range(1200, 1234))),
        (
            ["--since", "2027-01-15T08:20:00+00:00", "--key", "b", "--status", "4xx"],
            [1203, 1209, 1215, 1221, 1227, 1233],
        ),
        (["--model", "none"], []),
    ],
    ids=str,
)
async def test_export(filled: Books, argv: list[str], expected: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(filled) as url:
        assert await run(url, "--json", *argv) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["request_id"] for line in out.splitlines()] == [f"req_{number}" for number in expected]
    assert err == ""


async def test_a_line_for_people(filled: Books, capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(filled) as url:
        assert await run(url, "--limit", "1") == 0
    assert capsys.readouterr().out == (
        "2027-01-15T08:20:33.000Z 429 b qwen /v1/chat/completions 103 ms, queue 2, load 1, first token 12, "
        "tokens 12+34 req_1233\n"
    )


async def test_follow_shows_what_comes(
    filled: Books, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    ended = False

    def nap(_: float) -> None:
        shown.extend(capsys.readouterr().out.splitlines())
        if ended:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "time", SimpleNamespace(sleep=nap))
    async with serving(filled) as url:
        running = asyncio.create_task(run(url, "--follow", "--limit", "1", "--key", "b"))
        await soon(lambda: len(shown) == 1)
        filled.record(record(5000, key_id="b"))
        filled.record(record(5001, key_id="a"))
        filled.record(record(5002, key_id="b"))
        await soon(lambda: len(shown) >= 3)
        ended = True
        assert await running == 0
    assert [line.split()[-1] for line in shown] == ["req_1233", "req_5000", "req_5002"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--limit", "0"], "whole number"),
        (["--since", "yesterday"], "not 'yesterday'"),
        (["--status", "bad"], "not 'bad'"),
        (["--key", "sk-ada-0123456789012345678901234567890123456789012"], "--api-key"),
        (["--bogus"], "unrecognized"),
    ],
)
def test_wrong_usage(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parsed(*argv)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert says in err and "01234567890" not in err and err.count("\n") == 1
