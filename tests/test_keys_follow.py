"""How the ring follows its file: nothing half-written, nobody revoked by accident, every change within 2 seconds."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.errors import InvalidKey
from gateway.stores.keys import hashes
from gateway.stores.keys import io as keyio
from gateway.stores.keys import ring as keys
from gateway.stores.keys.ring import Key, KeyRing, ReloadReport
from tests.keys_kit import CHOSEN, HERE, PLAIN, RANDOM, count_slow, slow, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.txt"


def replace(path: Path, text: str) -> None:
    other = path.with_name("other")
    other.write_text(text)
    other.replace(path)


@pytest.mark.parametrize("change", [write, replace])
async def test_a_change_is_taken_when_it_is_seen_twice(path: Path, change: Callable[[Path, str], None]) -> None:
    write(path, f"alice:{PLAIN}\nbob:{hashes.fast_hash(RANDOM)}\n")
    ring = KeyRing(path)
    heard: list[ReloadReport] = []
    ring.subscribe(heard.append)
    await ring.authenticate(RANDOM, HERE)
    assert ring.poll() is None
    change(path, f"carol:{CHOSEN}\nnonsense\n")
    assert ring.poll() is None
    assert ring.lookup(PLAIN)
    report = ring.poll()
    assert report is not None
    assert report.loaded == 1
    assert report.problems == [f"{path} line 2: no colon; write key_id:secret[:requests_per_minute][:expiry]"]
    assert heard == [report]
    assert ring.lookup(CHOSEN) == Key("carol")
    for revoked in (PLAIN, RANDOM):
        assert ring.lookup(revoked) is None
        with pytest.raises(InvalidKey):
            await ring.authenticate(revoked, HERE)
    assert ring.poll() is None
    assert heard == [report]


def test_a_change_that_no_time_stamp_shows_is_found_while_it_is_fresh(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, f"alice:{PLAIN}\n")
    frozen = keyio.signature(path.stat())
    monkeypatch.setattr(keyio, "signature", lambda found: frozen)
    ring = KeyRing(path, now=lambda: keyio.modified(frozen) + 1)
    write(path, f"alice:{PLAIN[::-1]}\n")
    assert ring.poll() is not None
    assert ring.lookup(PLAIN) is None


def test_size_and_time_put_back_do_not_hide_a_change(path: Path) -> None:
    write(path, f"alice:{PLAIN}\n")
    os.utime(path, (1e9, 1e9))
    ring = KeyRing(path, now=lambda: 4e9)
    write(path, f"alice:{PLAIN[::-1]}\n")
    os.utime(path, (1e9, 1e9))
    assert [ring.poll() is None, ring.poll() is None] == [True, False]
    assert ring.lookup(PLAIN) is None


def test_a_touched_file_is_no_news(path: Path) -> None:
    write(path, f"alice:{PLAIN}\n")
    ring = KeyRing(path)
    heard: list[ReloadReport] = []
    ring.subscribe(heard.append)
    path.touch()
    os.utime(path, (1e9, 1e9))
    assert [ring.poll() for _ in range(4)] == [None] * 4
    assert heard == []
    assert ring.reload() == ReloadReport(1, [])
    assert len(heard) == 1


def test_a_file_without_our_lock_half_written_revokes_nobody(path: Path) -> None:
    write(path, f"alice:{PLAIN}\nbob:{RANDOM}\n")
    ring = KeyRing(path)
    write(path, "")
    assert ring.poll() is None
    write(path, f"alice:{PLAIN}\nbo")
    assert ring.poll() is None
    write(path, f"alice:{PLAIN}\nbob:{CHOSEN}\n")
    assert ring.poll() is None
    assert ring.lookup(RANDOM)
    assert ring.poll() is not None
    assert ring.lookup(CHOSEN)


def test_a_file_that_was_truncated_long_before_it_is_written_revokes_nobody(path: Path) -> None:
    write(path, f"alice:{PLAIN}\n")
    ring = KeyRing(path)
    write(path, "")
    for _ in range(keys.EMPTY_LOOKS):
        assert ring.poll() is None
    write(path, f"alice:{PLAIN}\nbo")
    assert ring.poll() is None
    write(path, f"alice:{PLAIN}\nbob:{RANDOM}\n")
    assert ring.poll() is None
    assert ring.poll() == ReloadReport(2, [])
    assert keys.POLL_SECONDS + (keys.EMPTY_LOOKS + 1) * keys.SETTLE_SECONDS <= 2, "an emptied file counts in time, too"


def test_a_mounted_file_that_was_replaced_outside_is_told_once(path: Path) -> None:
    """A mount holds the old file, which is in no folder any more; so does the descriptor of a file."""
    write(path, f"alice:{PLAIN}\n")
    with path.open() as held:
        mounted = Path(f"/proc/self/fd/{held.fileno()}")
        ring = KeyRing(mounted)
        assert ring.report == ReloadReport(1, [])
        heard: list[ReloadReport] = []
        ring.subscribe(heard.append)
        replace(path, "")
        for _ in range(4):
            ring.poll()
        assert [report.loaded for report in heard] == [1]
        assert str(mounted) in heard[0].problems[0]
        assert "mount its folder instead" in heard[0].problems[0]
        assert ring.lookup(PLAIN)


def test_a_file_replaced_while_it_is_read_is_not_cut_off(path: Path) -> None:
    write(path, f"alice:{PLAIN}\n")
    with path.open() as held:
        replace(path, "")
        assert not keyio.is_cut_off(path, keyio.signature(os.fstat(held.fileno())))


def test_a_file_that_never_rests_is_read_all_the_same(path: Path) -> None:
    write(path, "")
    ring = KeyRing(path)
    for number in range(4):
        with path.open("a") as file:
            file.write(f"user{number}:{PLAIN}{number}\n")
        ring.poll()
    assert ring.lookup(f"{PLAIN}3")


def test_a_file_half_written_under_the_lock_revokes_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOCK_SECONDS", 0.02)
    write(path, f"alice:{PLAIN}\n")
    ring = KeyRing(path)
    heard: list[ReloadReport] = []
    ring.subscribe(heard.append)
    with path.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.truncate(0)
        for _ in range(keys.EMPTY_LOOKS + 3):
            ring.poll()
            assert ring.lookup(PLAIN)
        assert [report.loaded for report in heard] == [1]
        assert "another process holds or writes it" in heard[0].problems[0]
        held.write(f"alice:{PLAIN}\nbob:{RANDOM}\n".encode())
    ring.poll()
    ring.poll()
    assert ring.lookup(RANDOM)
    assert ring.report == ReloadReport(2, [])


def test_a_file_that_goes_away_or_cannot_be_read_leaves_the_keys_in_force(path: Path) -> None:
    write(path, f"alice:{PLAIN}\nwhat\n")
    ring = KeyRing(path)
    heard: list[ReloadReport] = []
    ring.subscribe(heard.append)
    path.unlink()
    for _ in range(3):
        ring.poll()
    path.mkdir()
    for _ in range(4):
        ring.poll()
    assert ring.lookup(PLAIN) == Key("alice")
    assert [report.loaded for report in heard] == [1, 1]
    assert "is gone: the keys last read from it stay in force; to revoke them" in heard[0].problems[0]
    assert "it is a folder" in heard[1].problems[0]
    assert "line 2" in heard[1].problems[1]
    path.rmdir()
    write(path, "")
    for _ in range(keys.EMPTY_LOOKS + 1):
        ring.poll()
    assert ring.lookup(PLAIN) is None
    assert ring.report == ReloadReport(0, [])


def test_a_file_that_appears_later(path: Path) -> None:
    ring = KeyRing(path)
    assert ring.report == ReloadReport(0, [])
    assert not ring.usable
    write(path, f"alice:{PLAIN}\n")
    ring.poll()
    assert ring.poll() == ReloadReport(1, [])
    assert ring.usable


def test_a_file_that_cannot_be_read_from_the_start(path: Path) -> None:
    path.mkdir()
    ring = KeyRing(path, PLAIN)
    assert ring.report.loaded == 1
    assert "no key of it is loaded" in ring.report.problems[0]


async def test_a_reload_keeps_what_was_proven_for_lines_that_stand(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"carol:{slow(CHOSEN)}"
    write(path, f"{line}\ndave:{slow(CHOSEN + '2')}\n")
    ring = KeyRing(path)
    for secret in (CHOSEN, CHOSEN + "2"):
        await ring.authenticate(secret, HERE)
    made = count_slow(monkeypatch)
    write(path, f"{line} tpm=5\nalice:{PLAIN}\n")
    ring.reload()
    assert ring.lookup(CHOSEN) == Key("carol", tpm=5)
    assert ring.lookup(CHOSEN + "2") is None
    with pytest.raises(InvalidKey):
        await ring.authenticate(CHOSEN + "2", HERE)
    assert made == [CHOSEN + "2"]
    ring.close()


async def test_a_key_removed_while_its_hash_is_computed_is_not_let_in(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    gate = threading.Event()
    made = count_slow(monkeypatch, gate)
    ring = KeyRing(path)
    asking = asyncio.create_task(ring.authenticate(CHOSEN, HERE))
    await asyncio.sleep(0)
    write(path, f"alice:{PLAIN}\n")
    ring.reload()
    gate.set()
    with pytest.raises(InvalidKey):
        await asking
    assert made == [CHOSEN]
    assert ring.lookup(CHOSEN) is None
    ring.close()


async def test_watching_sees_every_kind_of_change_within_two_seconds(path: Path) -> None:
    heard: asyncio.Queue[ReloadReport] = asyncio.Queue()

    def listen(report: ReloadReport) -> None:
        heard.put_nowait(report)
        if report.loaded == 1:
            raise RuntimeError("a listener's fault must not end the watching")

    async with KeyRing(path).watching() as ring:
        ring.subscribe(listen)
        for change, text, loaded in (
            (write, f"alice:{PLAIN}\n", 1),
            (replace, f"alice:{PLAIN}\nbob:{RANDOM}\n", 2),
            (write, f"bob:{RANDOM}\n", 1),
            (write, "", 0),
            (write, f"bob:{RANDOM}\n", 1),
        ):
            change(path, text)
            assert await asyncio.wait_for(heard.get(), timeout=2) == ReloadReport(loaded, [])
        assert ring.lookup(RANDOM)
        assert ring.lookup(PLAIN) is None
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "keys-watch"]
