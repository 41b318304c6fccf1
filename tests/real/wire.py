"""An HTTP client that hides nothing: what stands on the wire, several requests on one connection, half requests."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.house import USER, Gateway

SECONDS = 8.0  # of silence; an answer that takes longer is none


@dataclass(frozen=True)
class Answer:
    version: str
    status: int
    headers: dict[str, str]
    body: bytes  # without its framing
    whole: bool  # it came to the end that its framing promised

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of each event of a stream."""
        return [line[6:] for line in self.body.decode().split("\n") if line.startswith("data: ")]


class Wire:
    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._file = sock, sock.makefile("rb")

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def send(self, *requests: bytes) -> None:
        self._socket.sendall(b"".join(requests))

    def send_no_more(self) -> None:
        """Half closes: answers may still be read."""
        self._socket.shutdown(socket.SHUT_WR)

    def first_bytes(self) -> None:
        """Waits for the beginning of a response; `answer` reads all of it."""
        assert self._file.peek(1), "the other side has closed the connection"

    def answer(self, method: str = "POST") -> Answer:
        """The next response. It may be an interim one."""
        first = self._file.readline().decode("latin-1")
        assert first.endswith("\r\n"), f"no response, but {first!r}"
        version, status, _ = first.split(" ", 2)
        headers: dict[str, str] = {}
        while (line := self._file.readline().decode("latin-1")).strip():
            name, _, value = line.partition(":")
            assert name.lower() not in headers, f"{name} comes twice"
            headers[name.lower()] = value.strip()
        body, whole = self._body(method, int(status), headers)
        return Answer(version, int(status), headers, body, whole)

    @property
    def ended(self) -> bool:
        """The other side has closed the connection, and nothing more has come."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def _body(self, method: str, status: int, headers: dict[str, str]) -> tuple[bytes, bool]:
        if method == "HEAD" or status < 200 or status in (204, 304):
            return b"", True
        if headers.get("transfer-encoding") == "chunked":
            return self._chunks()
        if "content-length" in headers:
            length = int(headers["content-length"])
            body = self._file.read(length)
            return body, len(body) == length
        return self._file.read(), True

    def _chunks(self) -> tuple[bytes, bool]:
        parts: list[bytes] = []
        while size := self._file.readline().strip():
            part = self._file.read(int(size, 16) + 2)
            if size == b"0":
                return b"".join(parts), part == b"\r\n"
            parts.append(part[:-2])
        return b"".join(parts), False


@contextlib.contextmanager
def wire(gateway: Gateway) -> Iterator[Wire]:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=SECONDS) as sock:
        with Wire(sock) as opened:
            yield opened


def request(
    method: str,
    path: str,
    body: Any = None,
    *,
    key: str | None = USER,
    version: str = "1.1",
    headers: dict[str, str] | None = None,
) -> bytes:
    """A request's bytes; `body` is JSON unless it is bytes. A header that is given wins over the usual one."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    about = {"Host": "gateway"}
    about |= {"Authorization": f"Bearer {key}"} if key else {}
    about |= {"Content-Type": "application/json", "Content-Length": str(len(data))} if body is not None else {}
    lines = [
        f"{method} {path} HTTP/{version}",
        *(f"{name}: {value}" for name, value in (about | (headers or {})).items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


def chat(*, stream: bool = False, **more: Any) -> dict[str, Any]:
    """The body of a chat request that is answered with 8 words."""
    return {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": stream} | more
