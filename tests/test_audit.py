"""The audit's rows, its retention, and reading it in pages."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from gateway.events import Event
from gateway.pipeline.usage import NO_USAGE
from gateway.stores.records import audit
from gateway.stores.records.audit import COLUMNS, Detail
from gateway.stores.records.books import Books
from gateway.stores.records.reading import Page, Wanted, listed
from tests.books_kit import Said, count, opened, record, rows


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corral.sqlite"


def ask(books: Books, **wanted: Any) -> Page:
    assert books.database.flush()
    return books.database.read(lambda connection: listed(connection, Wanted(**wanted)))


def names(page: Page) -> list[int]:
    return [int(row["request_id"].removeprefix("req_")) for row in page.rows]


def test_the_tables_have_the_columns_of_the_contract(path: Path) -> None:
    with opened(path):
        pass
    requests = [row[1] for row in rows(path, "PRAGMA table_info(requests)")]
    assert requests == [
        "id",
        *"ts request_id trace_id key_id model route transport status error queue_ms load_ms ttft_ms".split(),
        *"duration_ms tokens_in tokens_out tokens_cached stream cache prompt response".split(),
    ]
    assert [row[1] for row in rows(path, "PRAGMA table_info(events)")] == ["id", *"ts level code message data".split()]
    assert rows(path, "PRAGMA journal_mode") == [("wal",)]


def test_a_request_as_it_is_written(path: Path) -> None:
    with opened(path) as books:
        books.record(record(1, ts=1_800_000_000.25, stream=True))
        books.record(record(2, ts=1.0, status=429, error="rate_limit_exceeded", ttft_ms=None, model="", usage=NO_USAGE))
    first, second = (dict(zip(["id", *COLUMNS], row, strict=True)) for row in rows(path))
    assert first == {
        "id": 1,
        "ts": 1_800_000_000.25,
        "request_id": "req_1",
        "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
        "key_id": "ada",
        "model": "qwen",
        "route": "/v1/chat/completions",
        "transport": "http",
        "status": 200,
        "error": None,
        "queue_ms": 2.0,
        "load_ms": 1.0,
        "ttft_ms": 12.5,
        "duration_ms": 103.0,
        "tokens_in": 12,
        "tokens_out": 34,
        "tokens_cached": 5,
        "stream": 1,
        "cache": None,
        "prompt": None,
        "response": None,
    }
    assert (second["status"], second["error"], second["ttft_ms"]) == (429, "rate_limit_exceeded", None)
    assert (second["model"], second["tokens_in"], second["tokens_out"]) == ("", 0, 0)


@pytest.mark.parametrize(
    ("content", "prompt", "response"),
    [
        ("off", None, None),
        ("full", "a secret plan", "half a \ufffd\ufffd\ufffd pair"),
        (
            "hash",
            hashlib.sha256(b"a secret plan").hexdigest(),
            hashlib.sha256("half a \ud800 pair".encode(errors="surrogatepass")).hexdigest(),
        ),
    ],
)
def test_what_is_kept_of_prompts_and_answers(path: Path, content: Any, prompt: str, response: str) -> None:
    with opened(path, content=content) as books:
        books.audit.add_request(record(1), Detail("miss", Said("a secret plan"), Said("half a \ud800 pair")))
        books.audit.add_request(record(2), Detail("hit"))
    assert rows(path, "SELECT cache, prompt, response FROM requests") == [
        ("miss", prompt, response),
        ("hit", None, None),
    ]
    if content != "full":
        assert not any(b"secret" in file.read_bytes() for file in path.parent.iterdir() if file.is_file())


def test_texts_are_cut(path: Path) -> None:
    whole = "é" * (audit.MOST_TEXT // 2)
    with opened(path, content="full") as books:
        books.audit.add_request(record(1), Detail(None, Said(whole), Said(whole + "!")))
    ((prompt, response),) = rows(path, "SELECT prompt, response FROM requests")
    assert prompt == whole
    assert response == f"{whole}… [cut: it has {audit.MOST_TEXT + 1} bytes]"


def test_texts_are_kept_without_secrets(path: Path) -> None:
    def mask(text: str) -> str:
        return text.replace("sk-1", "***")

    with opened(path, content="full", mask=mask) as books:
        books.audit.add_request(record(1), Detail(None, Said("my key is sk-1"), Said("so it is sk-1")))
        straddling = "x" * (audit.MOST_TEXT - 2) + "sk-1"
        books.audit.add_request(record(2), Detail(None, Said(straddling)))
    first, (cut, _) = rows(path, "SELECT prompt, response FROM requests")
    assert first == ("my key is ***", "so it is ***")
    assert cut == straddling[:-4] + "**… [cut: it has 262146 bytes]"


def test_where_too_many_texts_wait_they_go_before_the_rows_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MOST_CONTENT", 1000)
    with opened(path, content="full") as books:
        books.database.close()  # nobody writes
        for number in range(30):
            books.audit.add_request(record(number), Detail("miss", Said("x" * 100), None))
        assert (books.audit.trimmed, books.audit.waiting, books.dropped) == (20, 30, 0)
        texts = [row[-2] for row in books.audit.pending()[0].rows]
        assert [text is not None for text in texts] == [True] * 10 + [False] * 20
        books.audit.written()
        books.audit.add_request(record(40), Detail(None, Said("x" * 900), None))
        assert books.audit.trimmed == 20  # there is room again


def test_events(path: Path) -> None:
    with opened(path) as books:
        books.event(
            Event("model.loaded", "qwen is loaded", data={"model": "qwen", "path": Path("/m"), "mb": 12}, ts=5.5)
        )
        books.event(Event("model.crashed", "no \udcff text", logging.ERROR, ts=6.5))
    assert rows(path, "SELECT ts, level, code, message, data FROM events ORDER BY id") == [
        (5.5, "info", "model.loaded", "qwen is loaded", '{"model": "qwen", "path": "/m", "mb": 12}'),
        (6.5, "error", "model.crashed", "no ? text", None),
    ]


def test_events_hold_no_secrets(path: Path) -> None:
    with opened(path, mask=lambda text: text.replace("hunter22", "***")) as books:
        books.event(Event("model.crashed", "it said hunter22", data={"url": "http://hunter22@host"}))
    assert rows(path, "SELECT message, data FROM events") == [("it said ***", '{"url": "http://***@host"}')]


def test_data_of_an_event_is_json_even_where_it_is_much(path: Path) -> None:
    with opened(path) as books:
        books.event(Event("a.b", "much", data={"all": ["x" * 1000] * 1000}))
    json.loads(rows(path, "SELECT data FROM events")[0][0])


# Retention


@pytest.mark.parametrize(("days", "left"), [(30, [29, 0]), (0, [40, 31, 29, 0]), (1, [0])])
def test_what_is_old_goes(path: Path, days: int, left: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path, retention_days=0) as books:
        for age in (40, 31, 29, 0):
            books.record(record(age, ts=time.time() - age * 86_400))
            books.event(Event("a", str(age), ts=time.time() - age * 86_400))
    monkeypatch.setattr(audit, "TIDY_ROWS", 1)  # a slice at a time
    with opened(path, retention_days=days) as books:
        for _ in range(6):
            assert books.database.flush()
    assert [row[2] for row in rows(path)] == [f"req_{age}" for age in left]
    assert rows(path, "SELECT message FROM events ORDER BY id") == [(str(age),) for age in left]
    assert rows(path, "SELECT sum(requests) FROM usage") == [(4,)]  # usage stays


def test_ids_are_not_given_twice(path: Path) -> None:
    with opened(path) as books:
        books.record(record(1, ts=time.time() - 99 * 86_400))
    with opened(path) as books:
        assert books.database.flush()
        assert count(path) == 0
        books.record(record(2))
    assert [row[0] for row in rows(path)] == [2]


# Reading


def test_pages_newest_first_while_new_ones_come(path: Path) -> None:
    with opened(path) as books:
        for number in range(25):
            books.record(record(number))
        seen, before, pages = [], None, 0
        while True:
            page = ask(books, limit=10, before=before)
            seen += names(page)
            pages += 1
            books.record(record(1000 + pages))
            before = page.next
            if before is None:
                break
        assert seen == list(reversed(range(25))) and pages == 3


def test_pages_oldest_first_behind_an_id(path: Path) -> None:
    with opened(path) as books:
        for number in range(25):
            books.record(record(number))
        first = ask(books, limit=10, after=0)
        second = ask(books, limit=10, after=first.next)
        third = ask(books, limit=10, after=second.next)
        assert names(first) + names(second) + names(third) == list(range(25))
        assert third.next is None


def test_a_request_that_took_long_is_found_by_when_it_began(path: Path) -> None:
    with opened(path) as books:
        for number, ts in enumerate([100.0, 200.0, 50.0, 300.0, 40.0]):
            books.record(record(number, ts=ts))
        assert names(ask(books, since=45.0)) == [3, 2, 1, 0]
        assert names(ask(books, since=150.0)) == [3, 1]
        assert names(ask(books, since=150.0, after=0)) == [1, 3]
        assert names(ask(books, since=1000.0)) == []
        assert sorted(names(ask(books, since=45.0)) + names(ask(books, until=45.0))) == names(ask(books))[::-1]
        assert names(ask(books, since=150.0, until=150.0)) == []


FILTERS: list[dict[str, Any]] = [
    {},
    {"key": "ada"},
    {"model": "llama"},
    {"status": "429"},
    {"status": "4xx"},
    {"status": "5xx"},
    {"key": "bob", "model": "qwen", "status": "2xx"},
    {"key": "nobody"},
    {"since": 1030.0, "key": "ada"},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters(path: Path, filters: dict[str, Any]) -> None:
    given = [
        {"key_id": key, "model": model, "status": status, "ts": 1000.0 + number}
        for number, (key, model, status) in enumerate(
            2 * list(itertools.product(("ada", "bob"), ("qwen", "llama"), (200, 404, 429, 499, 500, 503)))
        )
    ]

    def wanted(row: dict[str, Any]) -> bool:
        status = filters.get("status", str(row["status"]))
        return bool(
            filters.get("key", row["key_id"]) == row["key_id"]
            and filters.get("model", row["model"]) == row["model"]
            and status.replace("xx", str(row["status"])[1:]) == str(row["status"])
            and filters.get("since", 0.0) <= row["ts"]
        )

    with opened(path) as books:
        for number, fields in enumerate(given):
            books.record(record(number, **fields))
        expected = [number for number, fields in enumerate(given) if wanted(fields)]
        assert names(ask(books, limit=1000, **filters)) == expected[::-1]
        assert names(ask(books, limit=1000, after=0, **filters)) == expected
        assert bool(expected) is (filters.get("key") != "nobody")


def test_a_page_reads_no_more_than_it_must(path: Path) -> None:
    """Of a long history, a page by time or by id touches a small part."""
    with opened(path) as books:
        for number in range(20_000):
            books.record(record(number, ts=1000.0 + number))
            if number % 2000 == 0:
                books.database.flush()
        assert books.database.flush()
        for wanted in (
            Wanted(limit=10),
            Wanted(limit=100, since=20_950.0, key="nobody"),
            Wanted(limit=10, after=19_990),
        ):
            steps = 0

            def stepped() -> int:
                nonlocal steps
                steps += 1
                return 0

            def look(connection: Any, wanted: Wanted = wanted) -> Page:
                connection.set_progress_handler(stepped, 100)
                return listed(connection, wanted)

            books.database.read(look)
            assert steps < 100, f"{wanted} took {steps * 100} steps of SQLite's machine"
