"""The thread that owns an SQLite file: batches, crashes, and every way in which a disk can refuse."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import Unavailable
from gateway.stores.records import audit, db
from gateway.stores.records import rows as dbrows
from gateway.stores.records.audit import Keeping
from gateway.stores.records.books import open_books
from gateway.stores.records.db import Place
from gateway.stores.records.file import filesystem_of, on_network, places
from tests.books_kit import books_at, count, opened, record, rows
from tests.house import ROOT, eventually

WRITER = """
import sys, time
from pathlib import Path
from tests.books_kit import opened, record
with opened(Path(sys.argv[1])) as books:
    for number in range(10_000):
        books.record(record(number))
        if number % 10 == 0:
            print(number, time.monotonic(), flush=True)
            time.sleep(0.003)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "corral.sqlite"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]).returncode:
        pytest.skip("nobody may mount here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


# Batches


def test_what_is_added_is_in_the_file_within_a_second_without_being_asked_for(path: Path) -> None:
    with opened(path) as books:
        books.record(record(7))
        started = time.monotonic()
        eventually(lambda: count(path) == 1)
        assert time.monotonic() - started < 1
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    with opened(path) as books:
        books.record(record(8))
        assert books.database.flush()
    assert [row[2] for row in rows(path)] == ["req_7", "req_8"]


def test_a_clean_close_writes_all_and_leaves_one_file(path: Path) -> None:
    with opened(path) as books:
        for number in range(3210):
            books.record(record(number))
    assert not path.with_name("corral.sqlite-wal").exists()
    assert [row[2] for row in rows(path)] == [f"req_{number}" for number in range(3210)]


def test_batches_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    write = dbrows.Rows.write

    def watched(rows: dbrows.Rows, connection: sqlite3.Connection) -> None:
        if "INTO requests" in rows.head:
            sizes.append(len(rows.rows))
        write(rows, connection)

    monkeypatch.setattr(dbrows.Rows, "write", watched)
    with opened(path) as books:
        for number in range(2 * dbrows.BATCH_ROWS + 300):
            books.audit.add_request(record(number))
    assert max(sizes) == dbrows.BATCH_ROWS and sum(sizes) == 2 * dbrows.BATCH_ROWS + 300


def test_what_comes_while_a_batch_is_written_waits_for_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else commits follow each other with a few rows each, for as long as there is load."""
    at: list[float] = []
    write = dbrows.Rows.write

    def watched(rows: dbrows.Rows, connection: sqlite3.Connection) -> None:
        if "INTO requests" in rows.head and rows.rows:
            at.append(time.monotonic())
            if len(at) == 1:
                books.record(record(1))  # another one comes
        write(rows, connection)

    monkeypatch.setattr(dbrows.Rows, "write", watched)
    monkeypatch.setattr(db, "BATCH_SECONDS", 0.3)
    with opened(path) as books:
        books.record(record(0))
        eventually(lambda: len(at) == 2, 5)
    assert at[1] - at[0] > 0.25


def test_a_full_batch_does_not_wait_for_its_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "BATCH_SECONDS", 60.0)
    with opened(path) as books:
        for number in range(dbrows.BATCH_ROWS + 1):
            books.record(record(number))
        eventually(lambda: count(path) >= dbrows.BATCH_ROWS, 5)


@pytest.mark.timeout(30)
def test_after_a_kill_at_most_the_last_second_is_missing(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, env=environment, text=True
    )
    assert process.stdout is not None
    added = []
    for line in process.stdout:
        number, at = line.split()
        added.append((int(number), float(at)))
        if int(number) == 9990:
            break
    process.kill()
    killed = time.monotonic()
    process.wait()
    process.stdout.close()
    found = {int(row[2].removeprefix("req_")) for row in rows(path)}
    assert found == set(range(len(found))), "a record before the last ones is missing"
    assert all(number in found for number, at in added if at < killed - 1)
    assert added[-1][1] - added[0][1] > 1.5, "it was too quick to tell a second from all"
    ((requests, tokens),) = rows(path, "SELECT sum(requests), sum(tokens_in) FROM usage")
    assert (requests, tokens) == (len(found), 12 * len(found)), "usage and audit are not committed together"


def test_it_keeps_up_with_far_more_than_two_thousand_rows_a_second(path: Path) -> None:
    with opened(path) as books:
        started, most = time.monotonic(), 0
        for number in range(10_000):
            books.record(record(number))
            if number % 20 == 0:
                most = max(most, books.audit.waiting)
                time.sleep(max(0.0, started + number / 5000 - time.monotonic()))
        assert books.database.flush()
        took = time.monotonic() - started
    assert count(path) == 10_000 and books.dropped == 0
    assert took < 5, f"10,000 rows took {took:.1f} s"
    assert most < 5000


def test_beyond_what_it_can_hold_rows_are_dropped_and_counted_but_not_their_usage(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "MOST_WAITING", 50)
    books = books_at(path)
    for number in range(80):
        books.record(record(number))
    assert (books.audit.waiting, books.dropped) == (50, 30)
    books.database.start()
    books.database.close()
    assert count(path) == 50
    assert rows(path, "SELECT requests FROM usage") == [(80,)]


def test_adding_costs_the_event_loop_next_to_nothing(path: Path) -> None:
    books = books_at(path)
    books.database._bell.awake = True  # as it is while a batch is gathered
    entries = [record(number) for number in range(10_000)]
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for entry in entries[::5]:
            books.audit.add_request(entry)
        best = min(best, (time.perf_counter() - started) / 2000)
    assert best < 4e-6, f"{best * 1e6:.2f} µs"  # measured: 0.3; the bound leaves room for a busy machine


def test_a_row_that_sqlite_cannot_take_is_left_out_alone(path: Path) -> None:
    with opened(path) as books:
        books.audit.add_request(record(1))
        books.audit.add_request(record(2, error="half a \ud800 pair"))
        books.audit.add_request(record(3, status=2**70))
        books.audit.add_request(record(4))
    assert [row[2] for row in rows(path)] == ["req_1", "req_4"]
    assert books.dropped == 2 and books.database.problem is None


def test_a_mistake_in_one_batch_does_not_end_the_records(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(path) as books:
        with monkeypatch.context() as patch:
            patch.setattr(books.audit, "written", lambda: 1 / 0)
            books.record(record(1))
            assert books.database.flush()
        books.audit.written()
        books.record(record(2))
        assert books.database.flush()
    assert "a batch of records failed" in caplog.text
    assert [row[2] for row in rows(path)] == ["req_1", "req_2"]


# What is there already


def test_a_file_of_an_older_version_is_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as books:
        books.record(record(1))
    monkeypatch.setattr(
        "gateway.stores.records.books.MIGRATIONS",
        [audit.SCHEMA, "ALTER TABLE requests ADD COLUMN extra TEXT; CREATE TABLE more (a)", "CREATE TABLE third (a)"],
    )
    with opened(path):
        pass
    assert rows(path, "PRAGMA user_version") == [(3,)]
    assert rows(path, "SELECT request_id, extra FROM requests") == [("req_1", None)]


def test_a_migration_that_fails_half_way_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path):
        pass
    monkeypatch.setattr(
        "gateway.stores.records.books.MIGRATIONS", ["", "CREATE TABLE more (a); CREATE TABLE requests (a)"]
    )
    said: list[str | None] = []
    with opened(path, said) as books:
        assert "already exists" in (books.database.problem or "")
    assert rows(path, "PRAGMA user_version") == [(1,)]
    assert rows(path, "SELECT name FROM sqlite_master WHERE name = 'more'") == []
    assert len(said) == 1


def test_a_file_of_a_newer_version_is_put_aside_whole(path: Path) -> None:
    with opened(path) as books:
        books.record(record(1))
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with opened(path) as books:
        books.record(record(2))
    (aside,) = path.parent.glob("corral.sqlite.newer-2*")
    assert [row[2] for row in rows(aside)] == ["req_1"]
    assert [row[2] for row in rows(path)] == ["req_2"]


@pytest.mark.parametrize("damage", ["no database", "header", "pages"])
def test_a_corrupt_file_is_put_aside_with_its_date_and_a_new_one_begun(path: Path, damage: str) -> None:
    with opened(path) as books:
        for number in range(500):
            books.record(record(number))
    whole = path.read_bytes()
    spoiled = {
        "no database": b"this is a text\n" * 1000,
        "header": b"\0" * 4096 + whole[4096:],
        "pages": whole[:4096] + b"\xff" * (len(whole) - 4096),
    }[damage]
    path.write_bytes(spoiled)
    said: list[str | None] = []
    with opened(path, said) as books:
        books.record(record(1000))
        assert books.database.flush()
        assert books.database.problem is None
        (aside,) = books.database.set_aside
    assert [row[2] for row in rows(path)] == ["req_1000"]
    assert aside.read_bytes() == spoiled
    assert aside.name.startswith("corral.sqlite.corrupt-20")


def test_corruption_that_only_a_reader_finds_is_dealt_with_too(path: Path) -> None:
    with opened(path) as books:
        for number in range(2000):
            books.record(record(number))
        assert books.database.flush()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(size // 2)
            file.write(b"\xff" * 40_960)
        with pytest.raises(Unavailable):
            books.database.read(
                lambda connection: connection.execute("SELECT sum(length(route)) FROM requests").fetchall()
            )
        eventually(lambda: books.database.set_aside)
        books.record(record(1))
        assert books.database.flush()
        assert books.database.read(
            lambda connection: connection.execute("SELECT count(*) FROM requests").fetchone()
        ) == (1,)


def test_a_disk_that_spoils_every_file_is_not_filled_with_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "make_private", lambda path: path.write_bytes(b"this is a text\n" * 1000))
    said: list[str | None] = []
    with opened(path, said) as books:
        for _ in range(5):
            books.record(record(1))
            assert books.database.flush()
    assert len(books.database.set_aside) == 1 and len(said) == 1
    assert len(list(path.parent.glob("*.corrupt-*"))) == 1


def test_a_file_that_is_removed_is_made_anew(path: Path) -> None:
    with opened(path) as books:
        books.record(record(1))
        assert books.database.flush()
        for file in path.parent.glob("corral.sqlite*"):
            file.unlink()
        books.record(record(2))
        assert books.database.flush()
        assert [row[2] for row in rows(path)] == ["req_2"]


# Disks that refuse


def test_a_full_disk_stops_nothing_and_what_waited_is_written_afterwards(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "RETRY_SECONDS", 0.05)
    path, said = small_disk / "corral.sqlite", list[str | None]()
    with opened(path, said) as books:
        (small_disk / "ballast").write_bytes(b"x" * 100_000)
        for number in range(2000):
            books.record(record(number))
        eventually(lambda: books.database.problem)
        for number in range(2000, 2100):
            books.record(record(number))  # the service goes on
        assert eventually(lambda: said)[0] == "database or disk is full"
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        eventually(lambda: books.database.problem is None)
        assert books.database.flush()
        assert count(path) == 2100 and books.dropped == 0
        assert rows(path, "SELECT sum(requests) FROM usage") == [(2100,)]
    assert said == ["database or disk is full", None]


LIMITED = """
import resource, sys
from pathlib import Path
from gateway.stores.records import db
from tests.books_kit import count, opened, record
from tests.house import eventually
db.RETRY_SECONDS = 0.05
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
said = []
with opened(Path(sys.argv[1]), said) as books:
    for number in range(5000):
        books.record(record(number))
    eventually(lambda: books.database.problem)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    eventually(lambda: books.database.problem is None)
print(count(Path(sys.argv[1])), len(said), said[-1])
"""


def test_a_file_that_may_not_grow_stops_nothing(path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("5000 2 None\n", "")


def test_a_disk_that_becomes_read_only_stops_nothing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "RETRY_SECONDS", 0.05)
    path, said = small_disk / "deep" / "corral.sqlite", list[str | None]()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with opened(path, said) as books:
        assert "Read-only file system" in (said[0] or "")
        books.record(record(1))
        with pytest.raises(Unavailable, match="there are no records"):
            books.database.read(lambda connection: None)
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        eventually(lambda: books.database.problem is None)
        assert count(path) == 1
    assert len(said) == 2 and said[1] is None


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str | None] = []
    with opened(tmp_path / "file" / "corral.sqlite", said) as books:
        books.record(record(1))
        assert books.database.flush()
    assert len(said) == 1 and str(tmp_path / "file") in (said[0] or "")


def test_someone_elses_transaction_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "BUSY_SECONDS", 0.05)
    monkeypatch.setattr(db, "RETRY_SECONDS", 0.05)
    said: list[str | None] = []
    with opened(path, said) as books:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        books.record(record(1))
        assert eventually(lambda: said) == ["database is locked"]
        other.execute("ROLLBACK")
        other.close()
        eventually(lambda: count(path) == 1)
    assert said == ["database is locked", None]


# Whose file it is


def test_two_writers_have_a_file_each_and_find_it_again(path: Path) -> None:
    for turn in range(2):
        with opened(path) as first, opened(path, instance="other") as second:
            first.record(record(1))
            second.record(record(2))
            assert first.database.path == path
            assert second.database.path == path.with_name("corral-2.sqlite")
        assert {row[2] for row in rows(path)} == {"req_1"}
        assert {row[2] for row in rows(path.with_name("corral-2.sqlite"))} == {"req_2"}
        assert count(path) == turn + 1


def test_a_killed_writer_leaves_its_file_to_the_next(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    with opened(path) as books:
        assert books.database.path != path
    process.kill()
    process.wait()
    process.stdout.close()
    with opened(path) as books:
        assert books.database.path == path


MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
30 22 0:40 / /data rw shared:1 - nfs4 server:/x rw
31 30 0:41 / /data/fast rw - xfs /dev/vdb rw
32 22 0:42 / /work\\040space rw - fuse.sshfs me@host rw
33 22 0:43 / /runpod-volume rw - fuse mfs#host rw
34 22 0:44 / /over rw - ext4 /dev/vdc rw
35 34 0:45 / /over rw - cifs //host/x rw
36 22 0:46 / /box rw - fuse.fuse-overlayfs fuse-overlayfs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind", "network"),
    [
        ("/var/lib/corral", "ext4", False),
        ("/data", "nfs4", True),
        ("/data/deep/er", "nfs4", True),
        ("/data/fast/x", "xfs", False),
        ("/database", "ext4", False),
        ("/work space/a", "fuse.sshfs", True),
        ("/runpod-volume/a", "fuse", True),
        ("/over/a", "cifs", True),
        ("/box/a", "fuse.fuse-overlayfs", False),
    ],
)
def test_network_volumes_are_known(path: str, kind: str, network: bool) -> None:
    assert filesystem_of(Path(path), MOUNTS) == kind
    assert on_network(kind) is network


def test_where_nothing_is_known_a_disk_counts_as_local() -> None:
    assert filesystem_of(Path("/data"), "") == ""
    assert not on_network("")


def test_the_places_in_order() -> None:
    path, local = Path("/data/corral.sqlite"), Path("/tmp/corral")
    beside, elsewhere = places(path, local, "pod", False), places(path, local, "pod", True)
    assert [str(next(beside)) for _ in range(2)] == ["/data/corral.sqlite", "/data/corral-2.sqlite"]
    assert [str(next(elsewhere)) for _ in range(2)] == [
        "/tmp/corral/corral-pod.sqlite",
        "/tmp/corral/corral-pod-2.sqlite",
    ]


def test_on_a_network_volume_the_books_are_on_the_local_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gateway.stores.records.file._mountinfo", lambda: f"30 22 0:40 / {path.parent} rw - nfs4 a:/x rw"
    )
    with opened(path) as books:
        books.record(record(1))
    local = path.parent / "local" / "corral-pod.sqlite"
    assert count(local) == 1 and not path.exists()
    assert oct(local.parent.stat().st_mode & 0o777) == "0o700"


# Reading


def test_readers_cannot_write_and_do_not_wait_for_the_writer(path: Path) -> None:
    with opened(path) as books:
        books.record(record(1))
        assert books.database.flush()
        with pytest.raises(Unavailable, match="readonly"):
            books.database.read(lambda connection: connection.execute("DELETE FROM requests"))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        found = books.database.read(lambda connection: connection.execute("SELECT count(*) FROM requests").fetchone())
        assert found == (1,)
        other.close()


def test_a_query_without_end_is_ended(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(db, "READ_SECONDS", 0.1)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT sum(i) FROM n"
    with opened(path) as books, pytest.raises(Unavailable, match="ask for less"):
        books.database.read(lambda connection: connection.execute(endless).fetchone())


async def test_books_open_and_close_with_the_block_and_tell_on_the_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told: list[tuple[str | None, str]] = []
    place = Place(tmp_path / "file" / "corral.sqlite", tmp_path / "local", "pod")
    async with open_books(
        place, lambda problem: told.append((problem, threading.current_thread().name)), Keeping(1)
    ) as books:
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await books.used(None, "2026-01-01", "2026-01-02")
    assert len(told) == 1 and told[0][1] == "MainThread"
