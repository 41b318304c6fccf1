"""The health server as a process: CONTRACT 2, its bounds, its life and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.health.support import (
    COMMAND,
    Health,
    Reply,
    connect,
    free_port,
    is_alive,
    kill_quietly,
    read_all,
    write_state,
)
from tests.house import ROOT, eventually

CODES = [("starting", 204), ("loading", 204), ("ready", 200), ("draining", 503), ("stopped", 503), ("failed", 503)]


def test_every_state_on_every_path(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json")
    with Health(tmp_path) as health:
        for status, code in CODES:
            write_state(health.state, status=status, detail="why", models={"m": {"state": "off"}}, pid=7)
            eventually(lambda status=status: health.ask("/health").json()["status"] == status)  # type: ignore[misc]
            for path in ("/ping", "/", "/healthz", "/ping/", "/ping?x=1", "/v1/models", "/statuses"):
                assert (health.ask(path).status, health.ask(path, "HEAD").status) == (code, code), path
            reply = health.ask("/health")
            assert reply.status == (200 if status == "ready" else 503)
            assert reply.json() == {
                "status": status,
                "since": 1000.5,
                "detail": "why",
                "models": {"m": {"state": "off"}},
            }
            assert health.ask("/status").status == 200 and health.ask("/status").json()["pid"] == 7
            assert health.ask("/status/m").json() == {"state": "off"}
            assert health.ask("/status/nope").status == 404


def test_liveness_mode_keeps_ping_quiet_and_health_honest(tmp_path: Path) -> None:
    with Health(tmp_path, HEALTH_MODE="liveness", HEALTH_STALE_SECONDS="0.2") as health:
        for status, _ in CODES:
            write_state(health.state, status=status)
            assert (health.ask().status, health.ask("/anything", "HEAD").status) == (200, 200)
        eventually(lambda: health.ask("/health").status == 503)
        health.state.unlink()
        assert health.ask().status == 200


def test_no_file_is_starting_and_then_no_gateway(tmp_path: Path) -> None:
    with Health(tmp_path, HEALTH_STALE_SECONDS="0.5") as health:
        assert health.ask().status == 204
        assert health.ask("/status").json()["status"] == "starting"
        eventually(lambda: health.ask().status == 503)
        assert "no gateway" in health.ask("/health").json()["detail"]
        write_state(health.state)
        eventually(lambda: health.ask().status == 200)


def test_the_entrypoints_first_word_counts_as_starting(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", status="starting", heartbeat=None)
    with Health(tmp_path, HEALTH_STALE_SECONDS="0.1") as health:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            assert health.ask().status == 204


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[1]", b"\xff", b'"x"', b"[" * 100_000, b"{" + b" " * (5 << 20) + b"}"]
)
def test_a_corrupt_file_changes_nothing_until_it_is_stale(tmp_path: Path, garbage: bytes) -> None:
    with Health(tmp_path, HEALTH_STALE_SECONDS="1") as health:
        write_state(health.state)
        eventually(lambda: health.ask().status == 200)
        health.state.write_bytes(garbage)
        until = time.monotonic() + 0.15  # long enough for it to be read
        while time.monotonic() < until:
            assert health.ask().status == 200
        eventually(lambda: health.ask().status == 503)
        assert "no heartbeat" in health.ask("/health").json()["detail"]


def test_a_fifo_in_place_of_the_file_does_not_hold_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "state.json")
    with Health(tmp_path) as health:
        assert health.ask().status == 204


def test_numbers_that_are_no_json_are_not_passed_on(tmp_path: Path) -> None:
    text = f'"status":"ready","heartbeat":{time.monotonic()},"x":NaN,"since":Infinity'
    (tmp_path / "state.json").write_text("{" + text + "}")
    with Health(tmp_path) as health:
        assert health.ask("/status").json()["x"] is None


def test_a_stopped_writer_is_noticed_and_so_is_its_return(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tests.health.support import write_state\n"
        "while True: write_state(Path(sys.argv[1])); time.sleep(0.05)"
    )
    with Health(tmp_path, HEALTH_STALE_SECONDS="0.5") as health:
        writer = subprocess.Popen([sys.executable, "-c", script, str(health.state)], cwd=ROOT)
        try:
            eventually(lambda: health.ask().status == 200)
            os.kill(writer.pid, signal.SIGSTOP)
            eventually(lambda: health.ask().status == 503)
            reply = health.ask("/health")
            assert reply.json()["status"] == "failed" and "no heartbeat from the gateway for" in reply.json()["detail"]
            os.kill(writer.pid, signal.SIGCONT)
            eventually(lambda: health.ask().status == 200)
        finally:
            writer.kill()
            writer.wait()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "get"])
def test_other_methods(tmp_path: Path, method: str) -> None:
    with Health(tmp_path) as health:
        reply = health.ask("/ping", method)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
        assert reply.json()["error"]["code"] == "method_not_allowed"


def test_a_posted_body_does_not_tear_the_answer(tmp_path: Path) -> None:
    with Health(tmp_path) as health, connect(health.port) as sock:
        sock.sendall(b"POST /ping HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
        assert Reply(read_all(sock)).status == 405


def test_one_connection_many_requests_pipelined(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json")
    with Health(tmp_path) as health, connect(health.port) as sock:
        one = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        sock.sendall(one * 3000 + b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n")
        received = read_all(sock)
        assert received.count(b"HTTP/1.1 200 OK") == 3001
        assert received.endswith(b"ready\n")


def test_bad_requests_are_refused_and_cut(tmp_path: Path) -> None:
    cases = [(b"nonsense\r\n\r\n", 400), (b"GET / HTTP/3\r\n\r\n", 505), (b"GET /" + b"x" * 9000, 431)]
    with Health(tmp_path) as health:
        for raw, status in cases:
            with connect(health.port) as sock:
                sock.sendall(raw)
                reply = Reply(read_all(sock))
                assert (reply.status, reply.headers["connection"]) == (status, "close")


def test_it_answers_beside_a_thousand_idle_connections_and_stays_small(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", models={f"m{n}": {"state": "ready", "slots": 4} for n in range(50)})
    idle: list[socket.socket] = []
    with Health(tmp_path, HEALTH_STALE_SECONDS="60") as health:
        try:
            idle += [connect(health.port) for _ in range(1000)]
            for sock in idle[::2]:
                sock.sendall(b"GET /half HTTP/1.1\r\nX: y")
            begin = time.monotonic()
            assert health.ask().status == 200
            assert time.monotonic() - begin < 0.5
            assert all(health.ask("/status").status == 200 for _ in range(100))
            assert health.rss_mb() < 20
            idle[0].sendall(b"\r\nConnection: close\r\n\r\n")
            assert Reply(read_all(idle[0])).status == 200
        finally:
            for sock in idle:
                sock.close()


def test_out_of_files_the_oldest_idle_connection_goes_and_the_state_is_still_read(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json", status="loading")
    with Health(tmp_path, prefix=("bash", "-c", 'ulimit -n 40; exec "$0" "$@"')) as health:
        idle = [connect(health.port) for _ in range(100)]
        try:
            assert health.ask().status == 204
            write_state(health.state)
            eventually(lambda: health.ask().status == 200)
            assert idle[0].recv(10) == b""
            idle[-1].sendall(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert Reply(read_all(idle[-1])).status == 200
        finally:
            for sock in idle:
                sock.close()


def test_ipv6(tmp_path: Path) -> None:
    with Health(tmp_path, HOST="::1") as health:
        assert health.ask().status == 204


def test_a_port_that_is_free_again_soon_is_waited_for(tmp_path: Path) -> None:
    with Health(tmp_path) as first:
        second = Health(tmp_path, PORT_HEALTH=str(first.port))
        first.process.kill()
        first.process.wait()
        with second:
            assert second.ask().status == 204


# -- its life and its end --


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PORT_HEALTH", value) for value in ("0", "65536", "-1", "http", "8001x", "٣", "00000199999")),
        *(("HEALTH_STALE_SECONDS", value) for value in ("0", "-1", "soon", "nan", "inf", "3601")),
        ("HEALTH_MODE", "aliveness"),
    ],
)
def test_wrong_settings(name: str, value: str) -> None:
    done = subprocess.run(COMMAND, env={name: value}, capture_output=True, text=True, timeout=5)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert name in done.stderr and repr(value) in done.stderr and "must be" in done.stderr


def test_wrong_arguments() -> None:
    for arguments in (["--nonsense"], ["--with-parent"], ["--with-parent", "x"]):
        done = subprocess.run([*COMMAND, *arguments], env={}, capture_output=True, text=True, timeout=5)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = subprocess.run(
        [sys.executable, "-m", "health", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=5
    )
    assert done.returncode == 0 and "--with-parent" in done.stdout


def test_a_taken_port_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = {"PORT_HEALTH": str(port), "HOST": "127.0.0.1"}
        done = subprocess.run(COMMAND, env=env, capture_output=True, text=True, timeout=8)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and str(port) in done.stderr


def test_a_private_state_is_removed_after_a_failure_too(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    write_state(folder / "state.json")
    env = {"PORT_HEALTH": "x", "STATE_FILE": str(folder / "state.json")}
    done = subprocess.run([*COMMAND, "--own-state"], env=env, capture_output=True, timeout=8)
    assert done.returncode == 2 and not folder.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_by_itself_it_ends_at_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    with Health(tmp_path) as health:
        health.process.send_signal(number)
        assert health.process.wait(2) == 0


class Family:
    """A parent process with a health server beside it, as entrypoint.sh makes them."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        self.state = folder / "state.json"
        script = 'echo $$; "$@" --with-parent $$ & echo $!; exec sleep 60'
        self.parent = subprocess.Popen(
            ["bash", "-c", script, "bash", *COMMAND, *options],
            env={"PORT_HEALTH": str(self.port), "STATE_FILE": str(self.state), "PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.parent.stdout is not None
        self.parent.stdout.readline()
        self.pid = int(self.parent.stdout.readline())

    def __enter__(self) -> Family:
        eventually(lambda: connect(self.port)).close()
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.kill()
        self.parent.wait()
        kill_quietly(self.pid)
        if self.parent.stdout is not None:
            self.parent.stdout.close()


def test_it_answers_through_group_signals_and_ends_with_its_parent(tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    write_state(folder / "state.json", status="draining")
    (folder / ".state.json.123").write_text("the gateway died while writing")
    with Family(folder, "--own-state") as family:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(family.pid, number)
        with connect(family.port) as sock:
            sock.sendall(b"GET /ping HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert Reply(read_all(sock)).status == 503
        family.parent.kill()
        family.parent.wait()
        eventually(lambda: not is_alive(family.pid), 1.0)
        assert not folder.exists()


def test_a_state_file_that_is_not_ours_stays(tmp_path: Path) -> None:
    write_state(tmp_path / "state.json")
    with Family(tmp_path) as family:
        family.parent.kill()
        family.parent.wait()
        eventually(lambda: not is_alive(family.pid), 1.0)
        assert family.state.exists()


def test_a_parent_that_is_gone_from_the_beginning() -> None:
    done = subprocess.run(
        [*COMMAND, "--with-parent", "1"], env={"PORT_HEALTH": str(free_port())}, capture_output=True, timeout=3
    )
    assert (done.returncode, done.stderr) == (0, b"")
