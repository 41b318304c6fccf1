"""Processes under measurement: their start, what they cost, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 90.0


class BenchError(Exception):
    """Something that has to run does not; the message says what, and what it last said."""


@dataclass(frozen=True)
class Command:
    """What is started. `variables` are all of its environment, but for PATH."""

    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process tree, MiB: now, and at most since `forget_peaks`."""

    now: float
    peak: float


class Running:
    """A started command and its descendants."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.started_at = time.monotonic()

    def pids(self) -> list[int]:
        return family(self.process.pid)

    def last_words(self) -> str:
        return (self.folder / "output").read_text(errors="replace")[-2000:]

    def memory(self) -> Memory:
        now = peak = 0.0
        for pid in self.pids():
            sizes = _status(pid)
            now += sizes.get("VmRSS", 0) / 1024
            peak += sizes.get("VmHWM", 0) / 1024
        return Memory(now, peak)

    def forget_peaks(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def cpu_ns(self) -> int:
        """Processor time of all of them, ended threads included."""
        spent = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                spent += time.clock_gettime_ns((~pid << 3) | 2)  # what clock_getcpuclockid() makes of a pid
        return spent


@contextlib.contextmanager
def running(command: Command, folder: Path) -> Iterator[Running]:
    """The command in a process group of its own, its output in `folder`/output; ended when the block is left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command.arguments,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **command.variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(process, folder)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def family(pid: int) -> list[int]:
    """The process and all that descend from it, by what /proc says now."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, ahead = [], [pid]
    while ahead:
        found.append(ahead.pop())
        ahead.extend(children.get(found[-1], ()))
    return found


def _status(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, KiB; empty where the process has ended."""
    sizes = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if value.endswith(" kB"):
                sizes[name] = int(value.split()[0])
    return sizes


def free_port() -> int:
    """Outside the range that the kernel hands out, so that no connection of ours takes it before its server does."""
    first = 11_000 + os.getpid() * 37 % 15_000
    for port in range(first, first + 2000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise BenchError("no port is free")


_given: set[int] = set()


def ask(port: int, path: str, body: bytes = b"", *, key: str = "none", timeout: float = 5.0) -> int:
    """The status of one request on a connection of its own; raises OSError."""
    method = "POST" if body else "GET"
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.settimeout(timeout)
        connection.sendall(head.encode() + body)
        answer = connection.recv(64)
    if not answer.startswith(b"HTTP/1."):
        raise ConnectionResetError("no HTTP answer")
    return int(answer[9:12])


def wait_until(look: Callable[[], bool], process: Running, what: str, seconds: float = START_SECONDS) -> None:
    """Raises BenchError if the process ends, or nothing is seen in time."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if look():
                return
        if process.process.poll() is not None:
            raise BenchError(f"{what}: ended with {process.process.returncode}: {process.last_words()}")
        if time.monotonic() > deadline:
            raise BenchError(f"{what}: not within {seconds:g} s: {process.last_words()}")
        time.sleep(0.002)
