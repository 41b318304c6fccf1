"""What these tests share: a health server as a real process, and a raw client that hides nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.house import ROOT, eventually, free_port

__all__ = ["COMMAND", "ROOT", "eventually", "free_port"]

COMMAND = (sys.executable, "-I", "-S", str(ROOT / "health" / "__main__.py"))


class Reply:
    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def json(self) -> Any:
        return json.loads(self.body)


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((host, port), timeout=5)


def read_all(sock: socket.socket) -> bytes:
    received = b""
    while data := sock.recv(65536):
        received += data
    return received


def ask(port: int, path: str = "/ping", method: str = "GET", host: str = "127.0.0.1") -> Reply:
    with connect(port, host) as sock:
        sock.sendall(f"{method} {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        return Reply(read_all(sock))


def write_state(path: Path, **state: Any) -> None:
    """Publish as the gateway does: atomically, with a fresh heartbeat unless one is given (None: none)."""
    state = {"status": "ready", "since": 1000.5, "detail": "", "models": {}, "heartbeat": time.monotonic()} | state
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    temporary.replace(path)


class Health:
    """A running health server; `with` ends it by its pid, however it was started."""

    def __init__(self, folder: Path, *options: str, prefix: tuple[str, ...] = (), **env: str) -> None:
        self.state = folder / "state.json"
        self.port = int(env.get("PORT_HEALTH") or free_port())
        self.host = env.get("HOST", "127.0.0.1")
        settings = {"PORT_HEALTH": str(self.port), "HOST": self.host, "STATE_FILE": str(self.state)}
        self.process = subprocess.Popen([*prefix, *COMMAND, *options], env=settings | env, cwd=folder)

    def __enter__(self) -> Health:
        try:
            eventually(lambda: connect(self.port, self.host)).close()
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def ask(self, path: str = "/ping", method: str = "GET") -> Reply:
        return ask(self.port, path, method, self.host)

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def is_alive(pid: int) -> bool:
    """False for a zombie too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
