"""A real Redis in a folder of its own, which tests kill, stop and start again; and gateways' limits on it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.admission.limits import Claim
from gateway.errors import TooManyRequests
from gateway.stores.shared.limits import SharedLimits, SharedReservation, Timing, sharing
from tests.house import ROOT, eventually, free_port


@dataclass
class RedisServer:
    """Keeps nothing on disk: one that is started again is empty. Made by `running_redis`."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--save", "", "--appendonly", "no"], stdout=log, stderr=subprocess.STDOUT, cwd=self.folder
            )
        eventually(lambda: self.ask("PING") == b"+PONG\r\n")

    def ask(self, *words: str) -> bytes:
        """The raw answer to one command. Raises OSError."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            connection.sendall((" ".join(words) + "\r\n").encode())
            return connection.recv(65536)

    def number(self, *words: str) -> int:
        answer = self.ask(*words)
        assert answer.startswith(b":"), answer
        return int(answer[1:])

    def stop(self) -> None:
        """It answers nobody, until it gets SIGCONT."""
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()  # ends a stopped one too
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[RedisServer]:
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


PATIENT = Timing(call=5.0, slow=5.0, beat=0.1, lease=1.0)  # a loaded machine is no slow Redis


async def attempt(limits: SharedLimits, claim: Claim) -> SharedReservation | None:
    try:
        return await limits.reserve(claim)
    except TooManyRequests:
        return None


async def attempts(gateways: Sequence[SharedLimits], claim: Claim, number: int) -> list[SharedReservation]:
    """So many at once, in turn at each gateway; those that were let in."""
    tried = await asyncio.gather(*(attempt(gateways[n % len(gateways)], claim) for n in range(number)))
    return [reservation for reservation in tried if reservation]


async def _gateway(url: str, number: int, claim: Claim) -> None:
    """A process of its own: tells how many of its requests were let in, and holds these until it is killed."""
    async with sharing(url, timing=PATIENT) as limits:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.readline)
        passed = await attempts([limits], claim, number)
        sys.stdout.write(f"{len(passed)}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


@contextlib.contextmanager
def other_gateway(url: str, number: int, **limits: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.redis_kit", url, str(number), json.dumps(limits)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with process:
        try:
            assert process.stdout and process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def passed(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    return int(process.stdout.readline())


if __name__ == "__main__":
    asyncio.run(_gateway(sys.argv[1], int(sys.argv[2]), Claim("key", **json.loads(sys.argv[3]))))
