"""`entrypoint.sh healthcheck`, the image's HEALTHCHECK, against ports that answer this and that."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.house import ROOT, free_port


@contextmanager
def answering(line: str) -> Iterator[int]:
    """The port of a server that gives one client this status line, and wants to be asked for /ping."""
    with socket.create_server(("127.0.0.1", free_port())) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"\r\n\r\n"):
                    asked += connection.recv(4096)
                expected = asked.startswith(b"GET /ping HTTP/1.1\r\nHost: ")
                connection.sendall(line.encode() if expected else b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(5)


def check(folder: Path, **env: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "entrypoint.sh"), "healthcheck"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "DATA_DIR": str(folder)} | {name: str(value) for name, value in env.items()},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("line", "healthy"),
    [
        ("HTTP/1.1 200 OK\r\n\r\n", True),
        ("HTTP/1.1 204 No Content\r\n\r\n", True),
        ("HTTP/1.1 503 Service Unavailable\r\n\r\n", False),
        ("HTTP/1.1 400 Bad Request\r\n\r\n", False),
        ("", False),
    ],
)
def test_200_and_204_are_healthy(tmp_path: Path, line: str, healthy: bool) -> None:
    with answering(line) as port:
        done = check(tmp_path, PORT_HEALTH=port)
    assert done.returncode == (0 if healthy else 1)
    assert f"127.0.0.1:{port}/ping: {line.split()[1] if line else 'no answer'}" in done.stdout
    assert list(tmp_path.iterdir()) == [], "it only looks"


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    done = check(tmp_path, PORT_HEALTH=free_port())
    assert done.returncode == 1
    assert "/ping: no answer" in done.stdout


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as listener:
        assert check(tmp_path, PORT_HEALTH=listener.getsockname()[1]).returncode == 1


def test_a_server_that_hangs_up(tmp_path: Path) -> None:
    """In the middle of our question, which must not end as a signal."""
    with socket.create_server(("127.0.0.1", free_port())) as listener:

        def hang_up() -> None:
            connection, _ = listener.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        assert check(tmp_path, PORT_HEALTH=listener.getsockname()[1]).returncode == 1
        thread.join(5)


def test_it_finds_the_port_as_the_entrypoint_does(tmp_path: Path) -> None:
    with answering("HTTP/1.1 204 No Content\r\n\r\n") as port:
        (tmp_path / ".env").write_text(f"PORT_HEALTH='{port}'  # here\n")
        assert check(tmp_path).returncode == 0
    (tmp_path / ".env").unlink()
    with answering("HTTP/1.1 200 OK\r\n\r\n") as port:  # RunPod: one port for both
        assert check(tmp_path, RUNPOD_ENDPOINT_ID="x", PORT=port).returncode == 0
    with answering("HTTP/1.1 200 OK\r\n\r\n") as port:
        assert check(tmp_path, PORT=1, PORT_HEALTH=port, HOST="127.0.0.1").returncode == 0


def test_corral_by_its_name(tmp_path: Path) -> None:
    """In the image, `corral` is a link to the entrypoint; `docker run IMAGE corral …` means the same."""
    link = tmp_path / "corral"
    link.symlink_to(ROOT / "entrypoint.sh")
    ways = [[str(link), "--version"], [str(ROOT / "entrypoint.sh"), "corral", "--version"]]
    said = [subprocess.run(way, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for way in ways]
    assert said[0] == said[1] and said[0].startswith("corral ")
    bare = subprocess.run([str(link)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert bare.returncode == 2 and bare.stderr
    help_ = subprocess.run(
        [str(ROOT / "entrypoint.sh"), "corral"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert help_.stdout.startswith("usage: corral")
