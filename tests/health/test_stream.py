"""What /status/stream says, and when it keeps quiet."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from health import server
from health.answers import changes
from health.decide import Report
from health.settings import Settings
from tests.health.support import Health, connect, free_port, write_state
from tests.house import eventually


def report(status: str = "ready", detail: str = "", believed: bool = True, **models: object) -> Report:
    return Report(status, 1.0, detail, {"models": models}, believed=believed)


def names(before: Report, after: Report) -> list[str]:
    return [line.removeprefix("event: ") for line in changes(before, after).decode().split("\n") if "event: " in line]


def test_changes() -> None:
    assert names(report(a={"state": "off"}), report(a={"state": "off"})) == []
    assert names(report("loading"), report("ready")) == ["server_update"]
    assert names(report(detail="a is loading"), report(detail="b is loading")) == ["server_update"]
    assert names(report(a={"state": "off"}), report(a={"state": "loading"})) == ["model_update"]
    assert names(report("loading", a=1, b=1), report("ready", a=2, b=2)) == [*["model_update"] * 2, "server_update"]
    assert names(report(a=1), report(a=1, b=1)) == ["full_status"]
    assert names(report("failed", "for 14 s", believed=False), report("failed", "for 15 s", believed=False)) == []


class Events:
    """Reads events off a stream, one at a time."""

    def __init__(self, port: int) -> None:
        self.sock = connect(port)
        self.sock.sendall(b"GET /status/stream HTTP/1.1\r\nHost: x\r\n\r\n")
        self.buffer = b""
        self.head = self._until(b"\r\n\r\n").decode()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            data = self.sock.recv(65536)
            assert data, "the stream has ended"
            self.buffer += data
        block, _, self.buffer = self.buffer.partition(mark)
        return block

    def next(self) -> tuple[str, Any]:
        name, data = self._until(b"\n\n").decode().split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_full_status_first_and_then_each_change(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", status="loading", models={"m": {"state": "loading", "load_progress": 0.1}})
    with Health(tmp_path) as health:
        events = Events(health.port)
        with events.sock:
            assert "200 OK" in events.head and "text/event-stream" in events.head
            name, data = events.next()
            assert (name, data["status"], data["models"]["m"]["load_progress"]) == ("full_status", "loading", 0.1)
            write_state(health.state, status="loading", models={"m": {"state": "loading", "load_progress": 0.5}})
            assert events.next() == ("model_update", {"id": "m", "state": "loading", "load_progress": 0.5})
            write_state(health.state, status="ready", models={"m": {"state": "loading", "load_progress": 0.5}})
            assert events.next() == ("server_update", {"status": "ready", "since": 1000.5, "detail": ""})
            late = Events(health.port)
            with late.sock:
                assert late.next()[1]["status"] == "ready"


def test_it_streams_before_the_gateway_is_up_and_sees_it_come(tmp_path: Path) -> None:
    with Health(tmp_path) as health:
        events = Events(health.port)
        with events.sock:
            assert events.next()[1]["status"] == "starting"
            write_state(health.state)
            assert events.next()[1]["status"] == "ready"


def test_heartbeats_alone_are_no_news_and_others_are_answered_meanwhile(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json")
    with Health(tmp_path) as health:
        events = Events(health.port)
        with events.sock:
            events.next()
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                write_state(health.state)
                assert health.ask().status == 200
            events.sock.settimeout(0.1)
            try:
                assert events.sock.recv(100) == b"never"
            except TimeoutError:
                pass


def test_a_head_request_is_answered_and_does_not_stream(tmp_path: Path) -> None:
    with Health(tmp_path) as health:
        reply = health.ask("/status/stream", "HEAD")
        assert (reply.status, reply.headers["content-type"], reply.body) == (200, "text/event-stream", b"")


def test_a_reader_that_sleeps_is_let_go(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", models={"m": {"n": 0}})
    with Health(tmp_path) as health, connect(health.port) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(b"GET /status/stream HTTP/1.1\r\n\r\n")
        assert sock.recv(4)
        fds = Path(f"/proc/{health.process.pid}/fd")
        before = len(list(fds.iterdir()))
        turn = 0

        def gone() -> bool:
            nonlocal turn
            turn += 1
            write_state(health.state, models={"m": {"n": turn, "text": "x" * 2_000_000}})
            return len(list(fds.iterdir())) < before

        eventually(gone)
        assert health.ask().status == 200


def test_a_quiet_stream_gets_comments_and_an_idle_connection_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    port, stop = free_port(), threading.Event()
    settings = Settings(host="127.0.0.1", port=port, stale_after=10, liveness=False, state_file=str(tmp_path / "none"))
    with server.listen("127.0.0.1", port) as listener:
        running = server.Server(settings, listener, max_connections=10)
        thread = threading.Thread(target=running.run, args=(stop.is_set,))
        thread.start()
        try:
            with connect(port) as idle:
                idle.sendall(b"GET /unfinished")
                assert idle.recv(10) == b""
            events = Events(port)
            with events.sock:
                events.next()
                assert events.sock.recv(100) == b": heartbeat\n\n"
                assert events.sock.recv(100) == b": heartbeat\n\n"
        finally:
            stop.set()
            thread.join()
            running.close()
