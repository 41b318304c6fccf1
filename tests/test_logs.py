"""Log files and lines: names, rotation, masking, disks that refuse, and texts that would forge a line."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import logs
from gateway.logs import KEEP_FILES, LogFile, LogWriter, log_folder

KEY = "sk-bob-0123456789abcdefghijklmnopqrstuvwxyz0123456"
DAY = 86_400.0


class FakeTime:
    """Stands for the `time` module in gateway.logs; one clock for both."""

    gmtime = staticmethod(time.gmtime)

    def __init__(self) -> None:
        self.now = float(int(time.time()))  # the files have real times

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def strftime(self, form: str, when: Any = None) -> str:
        return time.strftime(form, when or time.gmtime(self.now))

    def name(self, kind: str = "gateway", instance: str = "pod") -> str:
        return f"{self.strftime('%Y%m%d_%H%M%S')}_{kind}_{instance}.log"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(logs, "time", fake)
    return fake


@pytest.fixture
def file(tmp_path: Path, clock: FakeTime) -> Iterator[LogFile]:
    opened = LogFile(tmp_path / "logs" / "llama", "gateway", "pod")
    yield opened
    opened.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.log"))


def latest(folder: Path) -> list[str]:
    return (folder / "latest.txt").read_text().splitlines()


# --- files


def test_a_file_has_the_contracts_name_and_is_named_as_the_latest(file: LogFile, clock: FakeTime) -> None:
    assert file.write(b"one\n") and file.write(b"two\n")
    assert names(file.folder) == [clock.name()] == latest(file.folder)
    assert re.fullmatch(r"\d{8}_\d{6}_gateway_pod\.log", clock.name())
    assert (file.folder / clock.name()).read_bytes() == b"one\ntwo\n"


def test_the_latest_of_each_kind_stand_beside_each_other(tmp_path: Path, clock: FakeTime) -> None:
    pod = "x_gateway_y"  # an instance whose name looks like a kind
    files = [LogFile(tmp_path, kind, pod) for kind in ("gateway", "server")]
    for _ in range(3):
        clock.now += DAY + 1
        assert all(file.write(b"x\n") for file in files)
    assert latest(tmp_path) == [clock.name("gateway", pod), clock.name("server", pod)]
    assert len(names(tmp_path)) == 6
    for file in files:
        file.close()


def test_rotation_by_size(file: LogFile, clock: FakeTime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 10)
    for _ in range(4):
        clock.now += 1
        assert file.write(b"sixsix")
    sizes = [(file.folder / name).stat().st_size for name in names(file.folder)]
    assert sizes == [12, 12]
    assert latest(file.folder) == names(file.folder)[-1:]


def test_a_new_start_in_the_same_second_goes_on_in_the_same_file(file: LogFile, clock: FakeTime) -> None:
    file.write(b"one\n")
    again = LogFile(file.folder, "gateway", "pod")
    again.write(b"two\n")
    again.close()
    assert (file.folder / clock.name()).read_bytes() == b"one\ntwo\n"


def test_rotation_by_age(file: LogFile, clock: FakeTime) -> None:
    file.write(b"one\n")
    clock.now += DAY
    file.write(b"two\n")
    clock.now += 1
    file.write(b"three\n")
    assert [(file.folder / name).read_bytes() for name in names(file.folder)] == [b"one\ntwo\n", b"three\n"]


def test_old_and_surplus_files_go_but_none_that_another_instance_writes(file: LogFile, clock: FakeTime) -> None:
    file.folder.mkdir(parents=True)
    begin = clock.now

    def put(instance: str, idle: float, kind: str = "gateway") -> str:
        clock.now += 1
        path = file.folder / clock.name(kind, instance)
        path.touch()
        os.utime(path, (begin + 1000 - idle,) * 2)
        return path.name

    ancient = put("pod", 15 * DAY)
    mine = [put("pod", 10) for _ in range(3)]
    quiet = put("other", 7200)
    live = put("other", 10)
    recent = [put("pod", 10) for _ in range(KEEP_FILES - 1)]
    servers = [put("pod", 10, "server"), put("pod", 15 * DAY, "server")]
    strange = [file.folder / "notes_gateway_x.log", file.folder / "latest.txt"]
    for path in strange:
        path.write_bytes(b"\xff\xfe")
    clock.now = begin + 1000
    assert file.write(b"x\n")
    assert names(file.folder) == sorted([live, *recent, *servers, clock.name(), strange[0].name])
    assert not {ancient, quiet, *mine} & set(names(file.folder))


def refuse_by_parent(folder: Path, clock: FakeTime) -> Callable[[], None]:
    """No folder can be made, as on a read-only disk."""
    folder.parent.write_bytes(b"a file where a folder should be")
    return lambda: folder.parent.unlink()


def refuse_by_full_disk(folder: Path, clock: FakeTime) -> Callable[[], None]:
    folder.mkdir(parents=True)
    path = folder / clock.name()
    path.symlink_to("/dev/full")
    return lambda: path.unlink()


@pytest.mark.parametrize("refuse", [refuse_by_parent, refuse_by_full_disk])
def test_a_disk_that_refuses_is_counted_and_tried_again_a_minute_later(
    refuse: Callable[[Path, FakeTime], Callable[[], None]], file: LogFile, clock: FakeTime
) -> None:
    mend = refuse(file.folder, clock)
    assert not file.write(b"lost 1\n")
    mend()
    clock.now += 59
    assert not file.write(b"lost 2\n")  # it does not ask the disk for each line
    assert file.errors == 2
    clock.now += 1
    assert file.write(b"kept\n")
    assert file.errors == 2 and (file.folder / clock.name()).read_bytes() == b"kept\n"


def test_housekeeping_that_fails_stops_nothing(file: LogFile, clock: FakeTime) -> None:
    (file.folder / "latest.txt").mkdir(parents=True)
    gone = file.folder / clock.name("gateway", "gone")
    gone.symlink_to("/nonexistent/at/all")  # stat() fails
    assert file.write(b"kept\n")
    assert file.errors == 0


@pytest.mark.parametrize(
    ("worker", "folder"), [(None, "/d/logs/llama"), ("", "/d/logs/llama"), ("w-1", "/d/logs/llama-w-1")]
)
def test_the_folder(worker: str | None, folder: str) -> None:
    assert log_folder(Path("/d"), "llama", worker) == Path(folder)


# --- lines


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("corral.x", logging.WARNING, "/x.py", 7, message, args, None)
    made.created = 1_800_000_000.25
    made.__dict__.update(extra)
    return made


def writer(as_json: bool = False, *secrets: str) -> LogWriter:
    return LogWriter(Path("/nonexistent"), "pod", as_json, list(secrets))


ABOUT = {"request_id": "req_1", "key_id": "bob", "model": "qwen"}


def test_the_text_form() -> None:
    assert writer().format(record("%s is %d", "it", 5, **ABOUT)) == (
        "2027-01-15T08:00:00.250Z WARNING it is 5 request_id=req_1 key_id=bob model=qwen"
    )
    assert writer().format(record("bare")) == "2027-01-15T08:00:00.250Z WARNING bare"


def test_the_json_form() -> None:
    bare = {"time": "2027-01-15T08:00:00.250Z", "level": "warning", "logger": "corral.x", "message": "é ok"}
    nobody = dict.fromkeys(ABOUT)
    assert json.loads(writer(True).format(record("é ok"))) == bare | nobody
    assert json.loads(writer(True).format(record("é ok", **ABOUT))) == bare | ABOUT


def test_a_traceback_is_indented_in_text_and_one_line_in_json() -> None:
    try:
        raise ValueError("first\n2027-01-15T08:00:00.250Z ERROR forged\x1b[2K")
    except ValueError:
        told = record("it broke", request_id="req_1", exc_info=sys.exc_info())
    first, *more = writer().format(told).split("\n")
    assert first.endswith("WARNING it broke request_id=req_1")
    assert more[0] == "    Traceback (most recent call last):" and "ValueError: first" in more[-2]
    assert all(line.startswith("    ") and line.isprintable() for line in more)
    text = writer(True).format(told)
    assert "\n" not in text and "ValueError: first\n2027" in json.loads(text)["message"]


HOSTILE = "a\r\n2027-01-15T00:00:00.000Z INFO forged\x1b[2J\u2028\x85\x00\ud800\t"


@given(st.text() | st.just(HOSTILE))
def test_one_record_is_one_line_whatever_it_says(text: str) -> None:
    about = {"request_id": text or "-", "key_id": text, "model": text}
    line = writer().format(record("%s", text, **about))
    assert line.isprintable() and len(line.splitlines()) == 1
    coded = writer(True).format(record("%s", text, **about))
    assert "\n" not in coded and "\r" not in coded and "\x1b" not in coded
    assert json.loads(coded)["message"] == text


@pytest.mark.parametrize("as_json", [False, True])
def test_secrets_are_masked(as_json: bool) -> None:
    held = writer(as_json, "redis://:pw@host", "of-the-start")
    held.add_secret("added-later")
    text = f"a redis://:pw@host b of-the-start c added-later d {KEY} e Authorization: Bearer abc.def-ghi f"
    line = held.mask(held.format(record("%s", text)))
    assert "a *** b *** c *** d *** e Authorization: Bearer *** f" in line
    assert held.mask("nothing secret: sk-bob, a bearer") == "nothing secret: sk-bob, a bearer"
