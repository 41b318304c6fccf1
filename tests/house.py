"""What the tests stand on: real gateways as processes, the real llama-server, the fake that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

ROOT = Path(__file__).parents[1]
FAKE_LLAMA = ROOT / "tests" / "fake_llama.py"
ADMIN = "sk-admin-0123456789abcdefghijABCDEFGHIJ"
USER = "sk-user-0123456789abcdefghijABCDEFGHIJ"
T = TypeVar("T")


def llama_server() -> Path:
    """The real one; `./scripts/test` fetches it and says where it is. Without it these tests fail."""
    path = os.environ.get("LLAMA_SERVER_PATH")
    assert path, "LLAMA_SERVER_PATH is not set: run the tests by ./scripts/test"
    return Path(path)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and only waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Below the ports that the kernel hands out by itself, and those of further llama-servers. Each process locks
# those it has taken, by a byte of a file, until it ends: between our look at a port and the server's bind, a parallel
# test would otherwise take it.
_FIRST, _LAST = 10_000, 20_000
_ports: Iterator[int] = itertools.cycle([*range(_FIRST + os.getpid() * 37 % 9_000, _LAST), *range(_FIRST, _LAST)])
_taken = os.open(Path(tempfile.gettempdir()) / f"corral-test-ports-{os.getuid()}", os.O_RDWR | os.O_CREAT, 0o600)


def free_port() -> int:
    for port in itertools.islice(_ports, 2 * _LAST):
        with socket.socket() as probe, contextlib.suppress(OSError):
            fcntl.lockf(_taken, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def eventually(look: Callable[[], T | Literal[False]], seconds: float = 10.0) -> T:
    """The first true thing that `look` returns; a refused connection counts as not yet."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if found := look():
                return found
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.01)


async def soon(look: Callable[[], T | Literal[False]], seconds: float = 5.0) -> T:
    """`eventually` for a test that runs on the loop it watches."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        await asyncio.sleep(0.005)
    return found


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Gateway:
    """A gateway process in a folder of its own. Made by `running_gateway`."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text()

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = USER,
        headers: dict[str, str] | None = None,
        seconds: float = 30,
    ) -> Response:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        about = {"Content-Type": "application/json"} if data is not None else {}
        about |= {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, data, about | (headers or {}), method=method)
        try:
            with urllib.request.urlopen(request, timeout=seconds) as reply:
                return Response(reply.status, {k.lower(): v for k, v in reply.headers.items()}, reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())

    def get(self, path: str, **how: Any) -> Response:
        return self.request("GET", path, **how)

    def chat(self, text: str = "hi", **fields: Any) -> Response:
        """One whole answer; fields beside the message are the request's."""
        how = {name: fields.pop(name) for name in ("key", "headers", "seconds") if name in fields}
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8} | fields
        return self.request("POST", "/v1/chat/completions", body, **how)

    def model(self) -> dict[str, Any]:
        """The status of the only model, with its process id."""
        row: dict[str, Any] = self.get("/status", key=ADMIN).json()["instances"][0]
        return row

    def slots_busy(self) -> int:
        """How many of the real llama-server's slots are at work, as it says itself."""
        model = self.model()["model_id"]
        return sum(slot["is_processing"] for slot in self.get(f"/upstream/{model}/slots", key=ADMIN).json())

    def wait_ready(self, seconds: float = 20) -> None:
        def look() -> bool:
            assert self.process.poll() is None, f"the gateway has ended: {self.stderr}"
            return self.get("/readyz", key=None).status == 200

        eventually(look, seconds)

    def stop(self, number: signal.Signals = signal.SIGTERM, seconds: float = 20) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextlib.contextmanager
def running_gateway(
    folder: Path,
    variables: Mapping[str, str] | None = None,
    *,
    entrypoint: bool = False,
    ready: bool = True,
    command: Sequence[str] = ("serve",),
    **more: str,
) -> Iterator[Gateway]:
    """A gateway with the variables given; keys ADMIN and USER unless AUTH_KEYS_FILE or API_KEY say otherwise.

    Its environment holds nothing else of ours. It is ended by its id, and if need be killed.
    """
    variables = {**(variables or {}), **more}
    folder.mkdir(parents=True, exist_ok=True)
    keys = folder / "api_keys.txt"
    if not keys.exists():
        keys.write_text(f"admin:{ADMIN} scope=infer,admin\nuser:{USER}\n")
        keys.chmod(0o600)
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DATA_DIR": str(folder / "data"),
        "AUTH_KEYS_FILE": str(keys),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "PORT_HEALTH": str(free_port()),
        "PORT_BACKEND": str(free_port()),
        "MAX_REQUESTS_PER_MINUTE": "0",
        "NGL": "0",
        "CTX": "4096",
        "THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if "LLAMA_URL" not in variables:
        environment["LLAMA_SERVER_PATH"] = str(variables.get("LLAMA_SERVER_PATH") or llama_server())
    environment |= variables
    argv = [str(ROOT / "entrypoint.sh")] if entrypoint else [sys.executable, "-m", "gateway", *command]
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(argv, cwd=folder, env=environment, stdout=out, stderr=err)
    gateway = Gateway(int(environment["PORT"]), process, folder, environment)
    try:
        if ready:
            gateway.wait_ready()
        yield gateway
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
