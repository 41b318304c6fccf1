"""What lies in the models folder: names, checksums, room, locks, and what a cancellation leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.models.fetching.download import DownloadError, Patience, fetch_url
from gateway.models.fetching.partial import Partial, disk_errors, is_complete, make_room, safe_name
from tests.download.origin import (
    BODY,
    DIGEST,
    MIB,
    Origin,
    drops_at,
    files,
    hangs_after_a_megabyte,
    status,
)

# Names


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("model.gguf", "model.gguf"),
        ("Model.GGUF", "Model.gguf"),
        ("../../etc/passwd", "passwd.gguf"),
        ("..\\..\\boot.ini", "boot.ini.gguf"),
        ("/abs/x.gguf", "x.gguf"),
        (".hidden", "hidden.gguf"),
        ("..", "model.gguf"),
        (".gguf", "model.gguf"),
        ("", "model.gguf"),
        ("a\x00b\nc\u202e.gguf", "abc.gguf"),
        ("ü" * 200 + ".gguf", "ü" * 100 + ".gguf"),
    ],
)
def test_a_strangers_name_is_made_safe(said: str, name: str) -> None:
    assert safe_name(said) == name


async def test_the_server_may_name_what_the_url_does_not(origin: Origin, tmp_path: Path, patience: Patience) -> None:
    named = {"Content-Disposition": 'attachment; filename="../Nice Model.gguf"'}
    origin.validators |= named
    origin.twists = [drops_at(MIB)]
    path = await fetch_url(origin.url("/download?id=7"), tmp_path, patience=patience)
    assert path == tmp_path / "Nice Model.gguf" and path.read_bytes() == BODY
    assert len(origin.requests) == 2
    assert await fetch_url(origin.url("/download?id=7"), tmp_path) == path
    assert len(origin.requests) == 2  # the name is remembered


async def test_without_any_name_the_redirects_end_gives_one(origin: Origin, tmp_path: Path) -> None:
    origin.twists = [status(302, Location="/blobs/abc")]
    assert (await fetch_url(origin.url("/latest"), tmp_path)).name == "abc.gguf"


async def test_all_parts_of_a_split_model_come(origin: Origin, tmp_path: Path) -> None:
    path = await fetch_url(origin.url("/m-00001-of-00003.gguf?t=1"), tmp_path, sha256=DIGEST)
    assert path.name == "m-00001-of-00003.gguf"
    assert [name for name in files(tmp_path) if "sha256" not in name] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert [r.raw_path for r in origin.requests] == [f"/m-0000{i}-of-00003.gguf?t=1" for i in (1, 2, 3)]


# Checksums


async def test_a_checked_file_is_hashed_once(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = await fetch_url(origin.url(), tmp_path, sha256=DIGEST.upper())
    assert files(tmp_path) == ["model.gguf", "model.gguf.sha256-ok"]
    with monkeypatch.context() as patch:
        patch.setattr("gateway.models.fetching.partial.hash_file", lambda *_: pytest.fail("hashed again"))
        assert await fetch_url(origin.url(), tmp_path, sha256=DIGEST) == path
    (tmp_path / "model.gguf.sha256-ok").unlink()
    assert await fetch_url(origin.url(), tmp_path, sha256=DIGEST) == path
    assert files(tmp_path) == ["model.gguf", "model.gguf.sha256-ok"] and len(origin.requests) == 1


async def test_a_present_file_with_another_checksum_is_replaced(origin: Origin, tmp_path: Path) -> None:
    await fetch_url(origin.url(), tmp_path, sha256=DIGEST)
    (tmp_path / "model.gguf").write_bytes(b"GGUF of last year")
    path = await fetch_url(origin.url(), tmp_path, sha256=DIGEST)
    assert path.read_bytes() == BODY and len(origin.requests) == 2


async def test_a_wrong_checksum_leaves_nothing_and_the_old_file(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"old")
    with pytest.raises(DownloadError, match=f"has the SHA-256 {DIGEST} and not {'0' * 64}"):
        await fetch_url(origin.url(), tmp_path, sha256="0" * 64)
    assert files(tmp_path) == ["model.gguf"] and (tmp_path / "model.gguf").read_bytes() == b"old"
    assert len(origin.requests) == 1


async def test_a_damaged_part_is_fetched_anew(origin: Origin, tmp_path: Path, patience: Patience) -> None:
    origin.twists = [drops_at(MIB)]
    with pytest.raises(DownloadError):
        await fetch_url(origin.url(), tmp_path, patience=Patience(attempts=1))
    with (tmp_path / "model.gguf.part").open("r+b") as part:
        part.seek(5)
        part.write(bytes(4096))  # as after a power cut
    path = await fetch_url(origin.url(), tmp_path, sha256=DIGEST, patience=patience)
    assert path.read_bytes() == BODY and origin.starts == [0, 1, 0]


# The disk


async def test_room_is_looked_for_first(origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2_000_000}))
    with pytest.raises(DownloadError, match=r"needs 0\.00 GB \(and 0\.27 GB to spare\) but .* has 0\.00 GB free"):
        await fetch_url(origin.url(), tmp_path)
    assert files(tmp_path) == []


def test_room_counts_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    make_room(tmp_path, 60, 40)
    with pytest.raises(DownloadError, match="set MODELS_DIR"):
        make_room(tmp_path, 61, 40)


@pytest.mark.parametrize(("code", "why"), [(errno.ENOSPC, "no room"), (errno.EACCES, "cannot be written")])
def test_disk_errors_say_what_to_do(code: int, why: str) -> None:
    with pytest.raises(DownloadError, match=why), disk_errors(Path("/models/m.gguf.part")):
        raise OSError(code, os.strerror(code))


async def test_a_folder_that_cannot_be(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        await fetch_url(origin.url(), tmp_path / "file" / "models")


# Others beside us, and leaving


async def test_two_that_want_the_same_fetch_it_once(origin: Origin, tmp_path: Path, patience: Patience) -> None:
    both = await asyncio.gather(*(fetch_url(origin.url(), tmp_path, sha256=DIGEST, patience=patience) for _ in "ab"))
    assert both == [tmp_path / "model.gguf"] * 2
    assert len(origin.requests) == 1


@pytest.mark.parametrize("finished", [True, False])
async def test_another_gateways_download_is_waited_for(origin: Origin, tmp_path: Path, finished: bool) -> None:
    other = (tmp_path / "model.gguf.part").open("wb")
    fcntl.flock(other, fcntl.LOCK_EX)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            if finished:
                other.write(BODY)
                other.flush()
                (tmp_path / "model.gguf.part").rename(tmp_path / "model.gguf")
            other.close()

    path = await fetch_url(origin.url(), tmp_path, patience=Patience(sleep=sleep))
    assert path.read_bytes() == BODY and waits == [1, 1, 1]
    assert len(origin.requests) == (0 if finished else 1)


async def test_a_cancelled_download_lets_go_and_keeps_its_part(origin: Origin, tmp_path: Path) -> None:
    def open_files() -> int:
        return sum(str(tmp_path) in target for target in map(_link, Path("/proc/self/fd").iterdir()))

    origin.twists = [hangs_after_a_megabyte]
    came = asyncio.Event()

    def progress(done: int, total: int | None) -> None:
        if done == MIB:
            came.set()

    task = asyncio.create_task(fetch_url(origin.url(), tmp_path, progress=progress))
    await came.wait()
    assert open_files() == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_files() == 0
    assert (tmp_path / "model.gguf.part").stat().st_size == MIB
    assert (await fetch_url(origin.url(), tmp_path)).read_bytes() == BODY
    assert origin.starts == [0, 1]


def _link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return str(path.readlink())
    return ""


async def test_a_cancellation_does_not_wait_for_a_long_hashing(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.Event()
    loop = asyncio.get_running_loop()

    def endless(path: Path, stop: Any) -> Any:
        loop.call_soon_threadsafe(started.set)
        stop.wait()
        return hashlib.sha256(), 0

    monkeypatch.setattr("gateway.models.fetching.partial.hash_file", endless)
    (tmp_path / "model.gguf").write_bytes(BODY)
    task = asyncio.create_task(fetch_url(origin.url(), tmp_path, sha256=DIGEST))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(tmp_path) == ["model.gguf"] and origin.requests == []


async def test_a_cancellation_while_taking_the_lock_gives_it_back(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go = threading.Event(), threading.Event()
    take = Partial.try_lock

    def slow(part: Partial) -> bool:
        started.set()
        go.wait()
        return take(part)

    monkeypatch.setattr(Partial, "try_lock", slow)
    task = asyncio.create_task(fetch_url(origin.url(), tmp_path))
    await asyncio.to_thread(started.wait)
    task.cancel()
    await asyncio.sleep(0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert files(tmp_path) == []
    assert (await fetch_url(origin.url(), tmp_path)).read_bytes() == BODY


def test_a_hashing_cut_short_proves_nothing(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    (tmp_path / "m.gguf").write_bytes(b"")
    assert not is_complete(tmp_path / "m.gguf", hashlib.sha256().hexdigest(), stop)
    assert files(tmp_path) == ["m.gguf"]


def test_nothing_heavy_is_imported_at_start() -> None:
    code = (
        "import sys, gateway.models.fetching.download, gateway.models.fetching.hub;"
        "import gateway.models.memory.ledger, gateway.models.memory.device;"
        "import json; print(json.dumps([m for m in ('aiohttp', 'yarl', 'numpy', 'ctypes') if m in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert json.loads(found) == []
