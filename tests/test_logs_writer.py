"""The thread that writes the logs: where things go, what it survives, what it counts."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path

import pytest

from gateway.logs import LogWriter, logging_to
from tests.house import eventually

log = logging.getLogger("corral.test")


def read(folder: Path, kind: str) -> str:
    (path,) = folder.glob(f"*_{kind}_pod.log")
    return path.read_text()


def test_records_go_to_stderr_and_a_file_and_a_childs_output_to_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logging_to(tmp_path, "pod", level="info", as_json=False, secrets=["hunter22"]) as writer:
        log.info("first, with hunter22", extra={"request_id": "req_1"})
        log.debug("not at this level")
        writer.put(b"main: loading hunter22\nmain: \xff ok\n")
        writer.add_secret("later-secret")
        log.warning("second, with later-secret")
    text = read(tmp_path, "gateway")
    first, second = text.splitlines()
    assert first.endswith(" INFO    first, with *** request_id=req_1")
    assert second.endswith(" WARNING second, with ***")
    assert capsys.readouterr().err == text
    assert read(tmp_path, "server") == "main: loading ***\nmain: \ufffd ok\n"
    assert writer.errors == writer.dropped == 0 and not writer.is_alive()


def test_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to(tmp_path, "pod", level="debug", as_json=True, secrets=[]):
        log.debug("one", extra={"model": "m"})
        log.error("two")
    rows = [json.loads(line) for line in read(tmp_path, "gateway").splitlines()]
    assert [(row["level"], row["message"], row["model"]) for row in rows] == [
        ("debug", "one", "m"),
        ("error", "two", None),
    ]


def test_logging_is_as_before_afterwards(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with logging_to(tmp_path, "pod", level="error", as_json=False, secrets=[]):
        assert root.level == logging.ERROR and len(root.handlers) == len(before[1]) + 1
    assert (root.level, list(root.handlers)) == before


def test_a_disk_that_refuses_leaves_stderr_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "file" / "logs"
    folder.parent.write_bytes(b"")
    with logging_to(folder, "pod", level="info", as_json=False, secrets=[]) as writer:
        for number in range(3):
            log.info("line %d", number)
        writer.put(b"of llama-server\n")
    lines = capsys.readouterr().err.splitlines()
    refused = [line for line in lines if " ERROR " in line]
    assert [line[-6:] for line in lines if line not in refused] == ["line 0", "line 1", "line 2"]
    assert [line.partition("ERROR   ")[2] for line in refused] == [
        f"no {kind} log is written in {folder}, the service goes on: Not a directory" for kind in ("gateway", "server")
    ]
    assert writer.errors == 4


def test_stderr_that_is_gone_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    with logging_to(tmp_path, "pod", level="info", as_json=False, secrets=[]) as writer:
        monkeypatch.setattr(sys, "stderr", Gone())
        log.info("kept")
        eventually(lambda: list(tmp_path.glob("*_gateway_pod.log")))
        monkeypatch.undo()
    assert "kept" in read(tmp_path, "gateway") and writer.errors == 0


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(("message", "argument"), [("%d", "five"), ("%s %s", "one"), ("%s", Unprintable())])
def test_a_call_that_cannot_be_formatted_does_not_end_the_log(tmp_path: Path, message: str, argument: object) -> None:
    with logging_to(tmp_path, "pod", level="info", as_json=False, secrets=[]) as writer:
        writer.put(logging.LogRecord("corral.x", logging.INFO, "/here.py", 7, message, (argument,), None))
        log.info("the next one")
    wrong, following = read(tmp_path, "gateway").splitlines()
    assert " ERROR " in wrong and "/here.py:7: this entry cannot be formatted: " in wrong
    assert following.endswith("the next one")


def test_a_flood_is_dropped_and_counted_and_nobody_waits(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "pod", False, [])  # not started: a disk that hangs
    for _ in range(10_101):
        writer.put(b"x")
    assert writer.dropped == writer.errors == 100


def test_the_thread_ends_the_process_does_not_wait_for_it(tmp_path: Path) -> None:
    with logging_to(tmp_path, "pod", level="info", as_json=False, secrets=[]) as writer:
        assert writer.daemon and writer in threading.enumerate()
    assert writer not in threading.enumerate()
