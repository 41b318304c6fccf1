"""Clients by the thousand and clients without hurry: time-outs are totals, memory is bounded, others are served."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.house import USER, Gateway, eventually, running_gateway
from tests.real.test_errors import check
from tests.real.wire import Wire, chat, request, wire

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

CHAT = "/v1/chat/completions"
MB = 1024 * 1024
PATIENCE = 2.5  # of CLIENT_HEADER_TIMEOUT and CLIENT_BODY_TIMEOUT


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """Short of patience and of memory, not of file descriptors."""
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(
        folder,
        MODEL_PATH=str(chat_model),
        CLIENT_HEADER_TIMEOUT=str(PATIENCE),
        CLIENT_BODY_TIMEOUT=str(PATIENCE),
        MAX_QUEUED_BYTES=str(32 * MB),
    ) as running:
        files = resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (files[1], files[1]))
        yield running


@pytest.fixture(autouse=True)
def goes_on(gateway: Gateway) -> Iterator[None]:
    before = gateway.model()["pid"]
    yield
    assert gateway.chat().status == 200
    assert gateway.model()["pid"] == before
    assert "Traceback" not in gateway.stderr


def rss(gateway: Gateway) -> int:
    """Bytes."""
    return int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1]) * resource.getpagesize()


def files(gateway: Gateway) -> int:
    return len(list(Path(f"/proc/{gateway.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def connections(gateway: Gateway, count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=20)) for _ in range(count)
        ]


def drip(client: Wire, data: bytes, pause: float) -> None:
    """A byte a `pause`, until the other side has had enough."""
    with contextlib.suppress(OSError):
        for letter in data:
            client.send(bytes([letter]))
            time.sleep(pause)


def test_one_byte_a_second(gateway: Gateway) -> None:
    """In headers and in bodies alike: each byte comes in time, the whole does not."""
    body = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n".encode()
    slow = {
        "request line": (b"", b"GET /healthz HTTP/1.1"),
        "empty lines": (b"", b"\r\n" * 20),
        "header": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X-Slow: aaaaaaaaaaaaaaaaaaa"),
        "second request": (request("GET", "/healthz"), b"GET /healthz HTTP/1.1"),
        "length": (head + b"Content-Length: %d\r\n\r\n" % len(body), body),
        "chunk": (head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body), body),
        "chunk size": (head + b"Transfer-Encoding: chunked\r\n\r\n", b"00000000000000000000"),
        "trailers": (head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X-Slow: aaaaaaaaaaaaaaaaaaa"),
    }

    def one(name: str) -> float:
        first, rest = slow[name]
        with wire(gateway) as client:
            client.send(first)
            if name == "second request":
                assert client.answer("GET").status == 200
            begun = time.monotonic()
            sender = threading.Thread(target=drip, args=(client, rest, 1.0))
            sender.start()
            check(client.answer(), 408, "client_timeout")
            took = time.monotonic() - begun
            if name in ("request line", "header", "second request"):
                assert client.ended
            sender.join()
        return took

    with ThreadPoolExecutor(len(slow)) as pool:
        for name, took in zip(slow, pool.map(one, slow), strict=True):
            assert PATIENCE - 1.1 <= took < PATIENCE + 2, name  # for a second request it begins with its first byte


def test_a_thousand_half_open_connections(gateway: Gateway) -> None:
    before = rss(gateway)
    parts = [b"", b"\r\n", b"GET /healthz HT", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 8000]
    with connections(gateway, 1000) as half:
        for number, client in enumerate(half):
            client.sendall(parts[number % len(parts)])
        begun = time.monotonic()
        for _ in range(5):
            assert gateway.chat().status == 200
        assert time.monotonic() - begun < 1.5
        assert rss(gateway) - before < 100 * MB
        for client in half:
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 408 ")
    eventually(lambda: files(gateway) < 100)
    assert gateway.chat().status == 200


def test_ten_thousand_connections_opened_and_dropped(gateway: Gateway) -> None:
    """Reset at every stage: before a byte, within a head, within a body, while an answer is on its way."""
    running = request("POST", CHAT, chat(stream=True, max_tokens=2000))
    stages = [b"", b"GET /hea", request("POST", CHAT, chat())[:-9], request("GET", "/healthz"), b"\0\r\n\r\n"]
    before = rss(gateway)
    for batch in range(100):
        with connections(gateway, 100) as clients:
            for number, client in enumerate(clients):
                sent = running if number == 0 and batch % 4 == 0 else stages[number % len(stages)]
                with contextlib.suppress(OSError):
                    client.sendall(sent)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if batch % 10 == 9:
            assert gateway.get("/healthz", key=None).status == 200
    eventually(lambda: files(gateway) < 100)
    eventually(lambda: gateway.get("/health", key=None).json()["queue"]["active"] == 0)
    assert rss(gateway) - before < 100 * MB
    assert gateway.chat().status == 200


def test_bodies_that_are_being_read_are_bounded_together(gateway: Gateway) -> None:
    """MAX_QUEUED_BYTES holds for them as well. 200 clients want to send 10 MB each, and get as far as they may."""
    before = rss(gateway)
    head = request("POST", CHAT, b"", headers={"Content-Length": str(10 * MB)})
    piece = b" " * 65536
    with connections(gateway, 200) as clients:
        for client in clients:
            client.sendall(head)
        for _ in range(16):  # 200 MB in all
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(piece)
        assert rss(gateway) - before < 100 * MB
        assert gateway.chat().status == 200, "small bodies need no share"
        refused = 0
        for client in clients:
            with Wire(client) as waiting:
                reply = waiting.answer()
            refused += reply.status == 503
            check(reply, *((503, "queue_full") if reply.status == 503 else (408, "client_timeout")))
            if reply.status == 503:
                assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert 200 - 32 * 16 <= refused < 200
        assert refused > 100
    body = json.dumps(chat()).encode()
    body += b" " * (9 * MB)
    for _ in range(5):
        assert gateway.request("POST", CHAT, body).status == 200, "what was held has been given back"


def test_large_bodies_of_clients_without_a_key_are_not_kept(gateway: Gateway) -> None:
    before = rss(gateway)
    head = request("POST", CHAT, b"", key=None, headers={"Content-Length": str(10 * MB)})
    with connections(gateway, 50) as clients:
        for client in clients:
            client.sendall(head)
        for _ in range(40):
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sendall(b" " * 65536)
        assert rss(gateway) - before < 50 * MB


def test_heads_are_bounded_together(gateway: Gateway) -> None:
    """64 headers of 8 KB each would be half a megabyte a connection."""
    with wire(gateway) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):
            for number in range(40):
                client.send(b"X-%d: %s\r\n" % (number, b"a" * 8000))
                time.sleep(0.002)
        check(client.answer(), 431, "header_fields_too_large")
        assert client.ended


def test_no_408_behind_an_answer(gateway: Gateway) -> None:
    """A body that came late, or one that nobody wanted, is not taken for the head of a next request."""
    body = json.dumps(chat()).encode()
    with wire(gateway) as late, wire(gateway) as unwanted:
        late.send(request("POST", CHAT, b"", headers={"Content-Length": str(len(body))}))
        time.sleep(0.05)
        late.send(body)
        assert late.answer().status == 200
        unwanted.send(request("POST", CHAT, b"", key=None, headers={"Content-Length": "100000"}))
        check(unwanted.answer(), 401, "missing_api_key")
        for _ in range(10):
            unwanted.send(b" " * 10000)
            time.sleep(0.01)
        time.sleep(PATIENCE + 0.6)
        for client in (late, unwanted):
            client.send(request("GET", "/healthz"))
            assert client.answer("GET").body == b"ok"


def test_more_connections_than_file_descriptors(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        pid = gateway.model()["pid"]
        limit = files(gateway) + 100
        resource.prlimit(gateway.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        for _ in range(3):
            with connections(gateway, 300):
                time.sleep(0.05)
        eventually(lambda: gateway.chat().status == 200)
        assert gateway.model()["pid"] == pid
