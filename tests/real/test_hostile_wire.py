"""Clients that speak HTTP badly or not at all: each gets its 4xx in our shape or a closed connection, nobody else
notices, and llama-server goes on. Sizes, slow senders and what else goes wrong: test_errors, test_hostile_floods.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

import pytest

from tests.house import USER, Gateway, eventually
from tests.real.test_errors import check
from tests.real.wire import chat, request, wire

pytestmark = pytest.mark.real

CHAT = "/v1/chat/completions"
KEY = f"Authorization: Bearer {USER}\r\n".encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + KEY + b"Content-Type: application/json\r\n"
OK = json.dumps(chat()).encode()
CHUNK = b"%x\r\n%s\r\n" % (len(OK), OK)
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
BAD = (400, "invalid_request")
JSON = (400, "invalid_json")
MB = 1024 * 1024
LONG = (431, "header_fields_too_large")


@pytest.fixture(autouse=True)
def goes_on(gateway: Gateway) -> Iterator[None]:
    before = gateway.model()["pid"]
    yield
    assert gateway.chat().status == 200
    assert gateway.model()["pid"] == before
    assert "Traceback" not in gateway.stderr


def get(target: bytes, *headers: bytes, version: bytes = b"HTTP/1.1") -> bytes:
    lines = [b"GET " + target + b" " + version, b"Host: x", KEY[:-2], *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def body(data: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(data), data)


def length(value: bytes, data: bytes = b"{}") -> bytes:
    return HEAD + b"Content-Length: " + value + b"\r\n\r\n" + data


# What is sent, and the status and code that come back. The connection is closed after all of these.
CLOSED: dict[str, tuple[bytes, tuple[int, str]]] = {
    "two lengths": (length(b"2\r\nContent-Length: 3"), BAD),
    "the same length twice": (length(b"2\r\nContent-Length: 2"), BAD),
    "a list of lengths": (length(b"2, 2"), BAD),
    "a negative length": (length(b"-5"), BAD),
    "a length with a sign": (length(b"+2"), BAD),
    "a hexadecimal length": (length(b"0x2"), BAD),
    "an empty length": (length(b""), BAD),
    "a length of 10^30": (length(b"1" + b"0" * 30), BAD),
    "a length of 2^64": (length(b"%d" % 2**64), BAD),
    "a space before the colon": (HEAD + b"Content-Length : 2\r\n\r\n{}", BAD),
    "length and chunked": (length(b"2\r\nTransfer-Encoding: chunked", b"2\r\n{}\r\n0\r\n\r\n"), BAD),
    "chunked and length": (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n", BAD),
    "chunked twice": (HEAD + b"Transfer-Encoding: chunked, chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n", BAD),
    "gzip": (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", BAD),
    "gzip and chunked": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n", BAD),
    "gzip, then chunked": (
        HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
        BAD,
    ),
    "identity": (HEAD + b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}", BAD),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + CHUNK + b"0\r\n\r\n", BAD),
    "a chunk size that is none": (CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", BAD),
    "a negative chunk": (CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n", BAD),
    "a chunk of 0x2": (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", BAD),
    "a chunk of 2^68 bytes": (CHUNKED + b"f" * 17 + b"\r\n{}", BAD),
    "a chunk without its end": (CHUNKED + b"2\r\n{}xx0\r\n\r\n", BAD),
    "chunks with bare LF": (CHUNKED + CHUNK.replace(b"\r\n", b"\n") + b"0\n\n", BAD),
    "a bare LF in a chunk's extension": (CHUNKED + CHUNK.replace(b"\r\n", b";a\nb\r\n", 1) + b"0\r\n\r\n", BAD),
    "a length in the trailers": (CHUNKED + CHUNK + b"0\r\nContent-Length: 5\r\n\r\n", BAD),
    "70 trailers": (CHUNKED + CHUNK + b"0\r\n" + b"X: y\r\n" * 70 + b"\r\n", LONG),
    "a trailer of 9 KB": (CHUNKED + CHUNK + b"0\r\nX: " + b"y" * 9000 + b"\r\n\r\n", LONG),
    "65 headers": (get(b"/healthz", *[b"X-%d: a" % n for n in range(65)]), LONG),
    "a header of 9 KB": (get(b"/healthz", b"X: " + b"a" * 9000), LONG),
    "a header of 70 KB": (get(b"/healthz", b"X: " + b"a" * 70_000), LONG),
    "a header name of 9 KB": (get(b"/healthz", b"X" * 9000 + b": a"), LONG),
    "a URL of 9 KB": (get(b"/" + b"a" * 9000), (414, "uri_too_long")),
    "NUL in a header": (get(b"/healthz", b"X: a\0b"), BAD),
    "NUL in a name": (get(b"/healthz", b"X\0Y: a"), BAD),
    "NUL in the URL": (get(b"/heal\0thz"), BAD),
    "a bell in a header": (get(b"/healthz", b"X: a\x07b"), BAD),
    "a bare CR": (get(b"/healthz", b"X: a\rY: b"), BAD),
    "bare LFs": (get(b"/healthz").replace(b"\r", b""), BAD),
    "a folded header": (get(b"/healthz", b"X: a\r\n b"), BAD),
    "a name with a space": (get(b"/healthz", b"X Y: a"), BAD),
    "no name": (get(b"/healthz", b": a"), BAD),
    "no colon": (get(b"/healthz", b"nonsense"), BAD),
    "a URL that is not UTF-8": (get(b"/\xff\xfe"), BAD),
    "a URL without a slash": (get(b"healthz"), BAD),
    "a URL with a space": (get(b"/heal thz"), BAD),
    "a port that is none": (get(b"http://x:99999999/healthz"), BAD),
    "half an address": (get(b"http://[::1/healthz"), BAD),
    "two hosts": (get(b"/healthz", b"Host: y"), BAD),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", BAD),
    "HTTP/0.9": (b"GET /healthz\r\n", BAD),
    "HTTP/0.9 with bare LF": (b"GET /healthz\n", BAD),
    "HTTP/0.9 and a line more": (b"GET /healthz\r\n\r\n", BAD),
    "HTTP/0.9 with headers": (b"GET /healthz\r\nHost: x\r\n\r\n", BAD),
    "HTTP/0.9 by name": (get(b"/healthz", version=b"HTTP/0.9"), BAD),
    "HTTP/1.2": (get(b"/healthz", version=b"HTTP/1.2"), BAD),
    "HTTP/2.0 by name": (get(b"/healthz", version=b"HTTP/2.0"), BAD),
    "HTTP/2 by its preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    "HTTP/3.0": (get(b"/healthz", version=b"HTTP/3.0"), BAD),
    "no version that is one": (get(b"/healthz", version=b"HTTP/x"), BAD),
    "another protocol": (get(b"/healthz", version=b"SIP/2.0"), BAD),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 30, BAD),
    "a method in small letters": (get(b"/healthz").replace(b"GET", b"get"), BAD),
    "an unknown method": (get(b"/healthz").replace(b"GET", b"FOO"), BAD),
    "a method of 9 KB": (get(b"/healthz").replace(b"GET", b"G" * 9000), BAD),
    "an unknown wish": (get(b"/nothing", b"Expect: a-miracle"), BAD),
    "11 MB announced": (HEAD + b"Content-Length: 11534336\r\n\r\n", (413, "payload_too_large")),
}


@pytest.mark.parametrize("case", CLOSED)
def test_answered_and_closed(gateway: Gateway, case: str) -> None:
    sent, (status, code) = CLOSED[case]
    with wire(gateway) as client:
        client.send(sent)
        reply = client.answer()
        assert reply.version == "HTTP/1.1"
        check(reply, status, code)
        assert reply.headers["connection"] == "close"
        if status != 413:  # there its body is awaited for a while, so that the client gets to read the answer
            assert client.ended


DEEP = b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
SURROGATE = b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":%d}'
# The connection stays; the next request on it is served.
KEPT: dict[str, tuple[bytes, tuple[int, str] | int]] = {
    "no body": (HEAD + b"\r\n", JSON),
    "an empty body": (body(b""), JSON),
    "an empty chunked body": (CHUNKED + b"0\r\n\r\n", JSON),
    "no JSON": (body(b"hello"), JSON),
    "half of it": (body(OK[:-5]), JSON),
    "JSON and more": (body(OK + b"x"), JSON),
    "a byte order mark": (body(b"\xef\xbb\xbf" + OK), 200),
    "two byte order marks": (body(b"\xef\xbb\xbf" * 2 + OK), JSON),
    "UTF-16": (body(OK.decode().encode("utf-16-le")), JSON),
    "NUL behind it": (body(OK + b"\0"), JSON),
    "NaN": (body(OK[:-1] + b',"temperature":NaN}'), JSON),
    "Infinity": (body(OK[:-1] + b',"temperature":-Infinity}'), JSON),
    "single quotes": (body(OK.replace(b'"', b"'")), JSON),
    "a comment": (body(b"/* */" + OK), JSON),
    "not UTF-8": (body(OK.replace(b"hi", b"\xff\xfe")), JSON),
    "overlong UTF-8": (body(OK.replace(b"hi", b"\xc0\xaf")), JSON),
    "a surrogate as UTF-8": (body(OK.replace(b"hi", b"\xed\xa0\x80")), JSON),
    "half a surrogate, assembled": (body(SURROGATE % 80), JSON),
    "half a surrogate, passed on": (body(SURROGATE % 8), JSON),
    "deep lists": (body(DEEP), JSON),
    "deep objects": (body(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), JSON),
    "a list": (body(b"[]"), BAD),
    "a text": (body(b'"x"'), BAD),
    "a number": (body(b"1" * 5000), BAD),
    "names twice: the last one counts": (body(b'{"messages":5,' + OK[1:]), 200),
    "names twice, hidden by an escape": (body(OK[:-1] + b',"mess\\u0061ges":5}'), BAD),
    "chunks of one byte": (
        CHUNKED + b"".join(b"1\r\n%c\r\n" % letter for letter in OK) + b"0\r\n\r\n",
        200,
    ),
    "chunk extensions": (CHUNKED + CHUNK.replace(b"\r\n", b';a=b;c="d"\r\n', 1) + b"0\r\n\r\n", 200),
    "trailers": (CHUNKED + CHUNK + b"0\r\nX: y\r\n\r\n", 200),
    "empty lines first": (b"\r\n\r\n" + body(OK), 200),
    "an absolute URL": (get(b"http://elsewhere/v1/models"), 200),
    "an absolute URL with a user": (get(b"http://a:b@elsewhere/v1/models"), 200),
    "dot segments": (get(b"/v1/../slots"), (404, "not_found")),
    "dot segments to a route": (get(b"/v1/../v1/models"), (404, "not_found")),
    "dot segments encoded": (get(b"/v1/%2e%2e/slots"), (404, "not_found")),
    "dot segments half encoded": (get(b"/v1/.%2E/slots"), (404, "not_found")),
    "dot segments encoded twice": (get(b"/v1/%252e%252e/slots"), (404, "not_found")),
    "dot segments in an absolute URL": (get(b"http://x/v1/../slots"), (404, "not_found")),
    "backslashes": (get(b"/v1\\..\\slots"), (404, "not_found")),
    "an encoded slash": (get(b"/v1%2fmodels"), (404, "not_found")),
    "a slash too many": (get(b"//v1/models"), (404, "not_found")),
    "another host's path": (get(b"//evil/v1/models"), (404, "not_found")),
    "a path parameter": (get(b"/v1/models;x=y"), (404, "not_found")),
    "an encoded NUL": (get(b"/v1/models%00"), (404, "not_found")),
    "an encoded line end": (get(b"/v1/models/x%0d%0aX-Evil:%201"), (404, "model_not_found")),
    "an encoding that is none": (get(b"/v1/models%zz"), (404, "not_found")),
    "an encoding that is not UTF-8": (get(b"/v1/models/%ff%fe"), (404, "model_not_found")),
    "llama-server's own routes": (get(b"/slots"), (404, "not_found")),
    "CONNECT": (get(b"x:1").replace(b"GET", b"CONNECT"), (404, "not_found")),
    "TRACE": (get(b"/v1/models").replace(b"GET", b"TRACE"), (405, "method_not_allowed")),
    "a header that is not UTF-8": (get(b"/v1/models", b"X: \xff\xfe"), 200),
    "a key that is not UTF-8": (
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\xff\xfe\r\n\r\n",
        (401, "invalid_api_key"),
    ),
    "an empty key": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\n\r\n", (401, "missing_api_key")),
    "a type that is none": (
        body(OK).replace(b"application/json", b";;=/"),
        (415, "unsupported_media_type"),
    ),
    "a form without a boundary": (
        request("POST", "/v1/audio/transcriptions", b"{}", headers={"Content-Type": "multipart/form-data"}),
        BAD,
    ),
    "a form with a boundary of other letters": (
        request("POST", "/v1/audio/transcriptions", b"{}", headers={"Content-Type": "multipart/form-data; boundary=é"}),
        BAD,
    ),
    "a form that is none": (
        request("POST", "/v1/audio/transcriptions", b"{}", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        BAD,
    ),
    "HTTP/1.0, kept alive": (
        get(b"/v1/models", b"Connection: keep-alive", version=b"HTTP/1.0"),
        200,
    ),
    "a wish without a body": (get(b"/v1/models", b"Expect: 100-continue"), 200),
}


@pytest.mark.parametrize("case", KEPT)
def test_answered_and_served_again(gateway: Gateway, case: str) -> None:
    sent, expected = KEPT[case]
    with wire(gateway) as client:
        client.send(sent)
        reply = client.answer("GET")
        if expected == 200:
            assert reply.status == 200
        else:
            assert isinstance(expected, tuple)
            status, code = expected
            assert reply.status == status, reply.body
            error = reply.json()["error"]
            assert error["code"] == code
            assert error.keys() == {"message", "type", "param", "code"}
            assert "x-evil" not in reply.headers
        client.send(request("GET", "/healthz"))
        assert client.answer("GET").body == b"ok"


LATE = {"size": b"zz\r\n", "sign": b"-1\r\n", "end": b"2\r\nabXX", "trailer": b"0\r\nX: " + b"y" * 9000}


@pytest.mark.parametrize("case", LATE)
def test_a_bad_chunk_that_comes_while_the_body_is_read(gateway: Gateway, case: str) -> None:
    """aiohttp tells nobody: the request would have waited for CLIENT_BODY_TIMEOUT."""
    with wire(gateway) as client:
        client.send(CHUNKED + b"2\r\n{}\r\n")
        until_read(gateway)
        client.send(LATE[case])
        reply = client.answer()
        check(reply, *(LONG if case == "trailer" else BAD))
        assert reply.headers["connection"] == "close"
        assert client.ended


def test_a_bad_chunk_behind_a_refusal(gateway: Gateway) -> None:
    """The answer has gone out; the rest is read so that the client gets to see it, and it is nonsense."""
    with wire(gateway) as client:
        client.send(CHUNKED.replace(USER.encode(), b"sk-wrong-0123456789") + b"2\r\n{}\r\n")
        check(client.answer(), 401, "invalid_api_key")
        client.send(b"zz\r\n")
        assert client.ended


def test_nonsense_behind_a_request(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(body(OK))
        assert client.answer().status == 200
        client.send(b"\0\1\2\3\r\n\r\n")
        check(client.answer(), *BAD)
        assert client.ended


def test_nonsense_behind_a_request_that_runs(gateway: Gateway) -> None:
    """It does not get into the answer."""
    with wire(gateway) as client:
        client.send(request("POST", CHAT, chat(stream=True, max_tokens=2000)))
        client.send(b"GET /\r\n")
        answer = client.answer()
        assert answer.whole
        assert answer.events[-1] == "[DONE]"


def test_nonsense_behind_an_offer_to_upgrade(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(get(b"/healthz", b"Connection: Upgrade", b"Upgrade: websocket"), b"\0garbage\r\n\r\n")
        assert client.answer("GET").body == b"ok"
        check(client.answer(), *BAD)
        assert client.ended


def test_a_thousand_pipelined_requests(gateway: Gateway) -> None:
    with wire(gateway) as client:
        for _ in range(10):
            client.send(get(b"/healthz") * 100)
            for _ in range(100):
                assert client.answer("GET").body == b"ok"


def test_a_client_that_does_not_wait_to_be_told_to_go_on(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, OK, headers={"Expect": "100-continue"}))
        answer = client.answer()
        assert (client.answer() if answer.status == 100 else answer).status == 200


def test_a_client_that_leaves_in_the_middle_of_a_body(gateway: Gateway) -> None:
    for sent in (body(OK)[:-10], CHUNKED + CHUNK[:-10], CHUNKED + CHUNK, HEAD + b"Content-Length: 9999999\r\n\r\n{"):
        with wire(gateway) as client:
            client.send(sent)


LARGE = 11 * 1024 * 1024
TOO_LARGE = (413, "payload_too_large")
# The head, how many bytes are sent, and what comes back. What is more than was said is a next request.
LARGE_BODIES: dict[str, tuple[bytes, int, tuple[int, str]]] = {
    "with its length": (b"Content-Length: %d" % LARGE, LARGE, TOO_LARGE),
    "chunked": (b"Transfer-Encoding: chunked", LARGE, TOO_LARGE),
    "shorter than said": (b"Content-Length: %d" % LARGE, 1000, TOO_LARGE),
    "longer than said": (b"Content-Length: %d" % (LARGE - 1000), LARGE, TOO_LARGE),
    "2 bytes were said": (b"Content-Length: 2", LARGE, BAD),
}


@pytest.mark.parametrize("case", LARGE_BODIES)
def test_eleven_megabytes(gateway: Gateway, case: str) -> None:
    about, size, expected = LARGE_BODIES[case]
    data = b" " * size
    if about.endswith(b"chunked"):
        data = b"".join(b"10000\r\n%s\r\n" % data[:65536] for _ in range(size // 65536)) + b"0\r\n\r\n"
    with wire(gateway) as client:
        with contextlib.suppress(ConnectionError):  # it may be refused before all of it has been sent
            client.send(HEAD + about + b"\r\n\r\n", data)
        check(client.answer(), *expected)


def test_less_than_was_said_and_then_nothing_more(gateway: Gateway) -> None:
    """The client closes, or only says that it will send no more; nobody waits for CLIENT_BODY_TIMEOUT."""
    for said, sent in ((LARGE - MB, MB), (LARGE, MB), (len(OK), len(OK) - 1)):
        with wire(gateway) as client:
            client.send(length(b"%d" % said, OK[:sent].ljust(sent)))
            until_read(gateway)
            client.send_no_more()
            if said == LARGE:
                check(client.answer(), *TOO_LARGE)
            assert client.ended
    eventually(lambda: gateway.get("/health", key=None).json()["queue"]["active"] == 0)


def until_read(gateway: Gateway) -> None:
    """A request that is on its way has got to its handler: another connection has been served meanwhile."""
    for _ in range(3):
        assert gateway.get("/healthz", key=None).status == 200
