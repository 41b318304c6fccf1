"""Usage per day, key and model, and budgets: exact, whatever happens between the tally and the file."""

from __future__ import annotations

import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from gateway.admission.budgets import BudgetStore
from gateway.pipeline.usage import NO_USAGE
from gateway.pipeline.usage import Usage as Spent
from gateway.stores.records import usage
from gateway.stores.records.books import Books
from gateway.stores.records.rows import Bell
from gateway.stores.records.usage import Budgets, Changed, Line, Tally, Usage, iso_day, used
from tests.books_kit import books_at, opened, record, rows

DAY = 86_400.0
FRIDAY = 20_000 * DAY  # 2024-10-04


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corral.sqlite"


def ask(books: Books, key: str | None, since: str, until: str, model: str | None = None) -> list[Line]:
    assert books.database.flush()
    return books.database.read(lambda connection: used(connection, key, since, until, model))


@pytest.mark.parametrize(("day", "name"), [(0, "1970-01-01"), (20_000, "2024-10-04"), (19_782, "2024-02-29")])
def test_days_are_those_of_utc(day: int, name: str) -> None:
    assert iso_day(day) == name


def test_by_day_key_and_model(path: Path) -> None:
    with opened(path) as books:
        books.record(record(ts=FRIDAY + 1))
        books.record(record(ts=FRIDAY + DAY - 0.001))
        books.record(record(ts=FRIDAY + DAY))
        books.record(record(ts=FRIDAY + 2, model="llama", usage=Spent(1, 2, 0)))
        books.record(record(ts=FRIDAY + 3, key_id="bob"))
        books.record(
            record(ts=FRIDAY + 4, key_id="bob", status=429, ttft_ms=None, model_ms=0.0, usage=NO_USAGE, model="")
        )
        books.record(record(ts=FRIDAY + 5, key_id="", status=401, ttft_ms=None, usage=NO_USAGE, model=""))
        every = ask(books, None, "2024-10-01", "2024-10-31")
        assert [(line.date, line.key, line.model) for line in every] == [
            ("2024-10-04", "ada", "llama"),
            ("2024-10-04", "ada", "qwen"),
            ("2024-10-04", "bob", ""),
            ("2024-10-04", "bob", "qwen"),
            ("2024-10-05", "ada", "qwen"),
        ]
        line = every[1]
        assert (line.requests, line.tokens_in, line.tokens_out, line.tokens_cached) == (2, 24, 68, 10)
        assert line.seconds == pytest.approx(0.2)
        assert all(isinstance(value, int) for value in (line.requests, line.tokens_in))
        assert (every[2].requests, every[2].tokens_in, every[2].seconds) == (1, 0, 0.0)
        assert ask(books, "ada", "2024-10-05", "2024-10-05") == every[4:]
        assert ask(books, "ada", "2024-10-04", "2024-10-05", "qwen") == [every[1], every[4]]
        assert ask(books, "carol", "2024-10-01", "2024-10-31") == []


def test_it_is_added_up_over_batches_and_restarts(path: Path) -> None:
    for turn in range(3):
        with opened(path) as books:
            for _ in range(3):
                books.record(record(ts=FRIDAY))
                books.record(record(ts=FRIDAY))
                (line,) = ask(books, None, "2024-10-04", "2024-10-04")
            assert line.requests == (turn + 1) * 6 and line.tokens_in == (turn + 1) * 72


def test_usage_is_what_the_audit_says(path: Path) -> None:
    chance = random.Random(1)
    with opened(path) as books:
        for number in range(3000):
            spent = Spent(chance.randrange(1000), chance.randrange(1000), chance.randrange(10))
            about = {"key_id": chance.choice("abc"), "model": chance.choice("xy"), "usage": spent}
            books.record(record(number, ts=FRIDAY + chance.random() * 5 * DAY, **about))
    audited = rows(
        path,
        "SELECT date(ts, 'unixepoch'), key_id, model, count(*), sum(tokens_in), sum(tokens_out), sum(tokens_cached), "
        "round(sum(duration_ms - queue_ms - load_ms) / 1000, 3) FROM requests GROUP BY 1, 2, 3 ORDER BY 1, 2, 3",
    )
    told = rows(
        path,
        "SELECT day, key_id, model, requests, tokens_in, tokens_out, tokens_cached, round(seconds, 3) FROM usage "
        "ORDER BY day, key_id, model",
    )
    assert told == audited and len(told) == 30


def test_old_tallies_do_not_stay_in_memory(path: Path) -> None:
    with opened(path) as books:
        for day in range(30):
            books.record(record(ts=FRIDAY + day * DAY))
        assert books.database.flush()
        assert len(books._usage._tallies) == usage.KEEP_DAYS
        books.record(record(ts=FRIDAY))  # it has run for a month
        assert [line.requests for line in ask(books, None, "2024-10-01", "2024-12-31")] == [2] + [1] * 29


@pytest.mark.timeout(30)
def test_nothing_is_lost_between_the_thread_that_counts_and_the_one_that_writes() -> None:
    changed, tallies = Changed(Bell()), [Tally((number,), 2) for number in range(5)]
    written: Counter[int] = Counter()
    ended = threading.Event()

    def write() -> None:
        while True:
            last = ended.is_set()
            for tally, grown in changed.growth():
                written[tally.name[0]] += int(grown[1])
            changed.done()
            if last:
                return

    writer = threading.Thread(target=write)
    writer.start()
    for number in range(200_000):
        tally = tallies[number % 5]
        tally.counts[0] += 1
        tally.counts[1] += number
        changed.mark(tally)
    ended.set()
    writer.join()
    assert written == {tally.name[0]: tally.counts[1] for tally in tallies}


def test_what_was_not_committed_is_told_again() -> None:
    store = Usage(Bell())
    store.add_request(record(ts=FRIDAY))
    (first,) = store.pending()
    store.add_request(record(ts=FRIDAY))
    assert store.pending()[0].rows == first.rows
    store.written()
    ((*_, requests, tokens, _, _, _),) = store.pending()[0].rows
    assert (requests, tokens) == (1, 12)


# Budgets


def test_budgets_are_a_store_for_the_limits() -> None:
    store: BudgetStore = Budgets(Bell())
    assert store.load("ada", 20_000) == 0
    store.add("ada", 20_000, 5)
    assert store.load("ada", 20_000) == 5


def test_budgets_outlive_the_process(path: Path) -> None:
    today = 20_000
    with opened(path) as books:
        books.budgets.add("ada", today, 100)
        books.budgets.add("ada", today, 50)
        books.budgets.add("bob", today, 7)
        books.budgets.add("ada", today - 1, 1)
    books = books_at(path)
    books.database._tidy_at += 3600  # these days are long gone
    books.database.start()
    assert books.database.opened.wait(5)
    assert [books.budgets.load("ada", today - day) for day in (0, 1, 2)] == [150, 1, 0]
    books.budgets.add("ada", today, -30)
    assert books.budgets.load("ada", today) == 120
    assert books.database.flush()
    assert books.budgets.load("ada", today) == 120  # written, and not counted twice
    books.database.close()
    assert rows(path, "SELECT * FROM budgets ORDER BY key_id, day") == [
        ("ada", "2024-10-03", 1),
        ("ada", "2024-10-04", 120),
        ("bob", "2024-10-04", 7),
    ]


def test_budgets_of_old_days_go_from_memory_and_file(path: Path) -> None:
    with opened(path) as books:
        for day in range(20_000, 20_010):
            books.budgets.add("ada", day, 1)
        assert len(books.budgets._tallies) == usage.KEEP_DAYS
    with opened(path) as books:
        assert books.database.flush()
    assert rows(path, "SELECT * FROM budgets") == []


def test_budgets_work_where_no_file_does(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with opened(tmp_path / "file" / "corral.sqlite") as books:
        books.budgets.add("ada", 20_000, 5)
        assert books.budgets.load("ada", 20_000) == 5
