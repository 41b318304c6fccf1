"""Requests taken off a buffer, however they were cut, and refused where they are none."""

from __future__ import annotations

import pytest

from health import wire

GET = b"GET /ping HTTP/1.1\r\nHost: x\r\n\r\n"


def take_all(raw: bytes) -> list[wire.Request]:
    buffer, found = bytearray(raw), []
    while request := wire.take(buffer):
        found.append(request)
    return found


@pytest.mark.parametrize(
    ("raw", "path", "last"),
    [
        (GET, "/ping", False),
        (b"GET /ping HTTP/1.1\nHost: x\n\n", "/ping", False),
        (b"\r\n\r\n" + GET, "/ping", False),
        (b"GET /ping HTTP/1.1\r\n\r\n", "/ping", False),
        (b"GET /ping HTTP/1.0\r\n\r\n", "/ping", True),
        (b"GET /ping HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", "/ping", False),
        (b"GET /ping HTTP/1.1\r\nConnection: foo, Close\r\n\r\n", "/ping", True),
        (b"GET /ping HTTP/1.1\r\nConnection: foo\r\nconnection: close\r\n\r\n", "/ping", True),
        (b"POST /ping HTTP/1.1\r\nContent-Length: 5\r\n\r\n", "/ping", True),
        (b"POST /ping HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "/ping", False),
        (b"POST /ping HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 9\r\n\r\n", "/ping", True),
        (b"POST /ping HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "/ping", True),
        (b"GET /status/org%2Fa%20b?x=1 HTTP/1.1\r\n\r\n", "/status/org/a b", False),
        (b"GET /50%-%zz% HTTP/1.1\r\n\r\n", "/50%-%zz%", False),
        (b"GET /%ff HTTP/1.1\r\n\r\n", "/\ufffd", False),
        (b"GET http://host:8001/health HTTP/1.1\r\n\r\n", "/health", False),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", "*", False),
    ],
)
def test_take(raw: bytes, path: str, last: bool) -> None:
    (request,) = take_all(raw)
    assert (request.path, request.last) == (path, last)


def test_a_request_may_be_cut_anywhere() -> None:
    for cut in range(1, len(GET)):
        buffer = bytearray(GET[:cut])
        assert wire.take(buffer) is None
        buffer += GET[cut:]
        request = wire.take(buffer)
        assert request is not None and request.path == "/ping" and not buffer


def test_pipelined_requests_keep_their_order() -> None:
    raw = GET + b"HEAD /health HTTP/1.1\n\n" + GET + b"GET /unfinished HTTP/1.1\r\n"
    assert [(r.method, r.path) for r in take_all(raw)] == [("GET", "/ping"), ("HEAD", "/health"), ("GET", "/ping")]


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\n\r\n", 400),
        (b"G<T / HTTP/1.1\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\n\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (b"GET /" + b"x" * wire.MAX_HEAD + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * wire.MAX_HEAD, 431),
    ],
)
def test_refused(raw: bytes, status: int) -> None:
    with pytest.raises(wire.Refused) as refused:
        take_all(raw)
    assert refused.value.status == status


def test_a_large_head_within_the_limit_and_more_behind_it_are_fine() -> None:
    head = b"GET / HTTP/1.1\r\nA: " + b"x" * (wire.MAX_HEAD - 30) + b"\r\n\r\n"
    assert len(take_all(head + head)) == 2


def test_responses_say_what_becomes_of_the_connection() -> None:
    def head(raw: bytes, status: int = 200) -> str:
        return wire.response(take_all(raw)[0], status, b"body", "text/plain").decode()

    assert "Connection" not in head(GET)
    assert head(GET).endswith("\r\n\r\nbody") and "Content-Length: 4" in head(GET)
    assert "Connection: close" in head(b"GET / HTTP/1.0\r\n\r\n")
    assert "Connection: keep-alive" in head(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert head(b"HEAD / HTTP/1.1\r\n\r\n").endswith("Content-Length: 4\r\n\r\n")
    assert "Content-" not in head(GET, 204) and head(GET, 204).endswith("\r\n\r\n")
