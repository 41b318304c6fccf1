"""Refusals: each has its status, its code and the one shape, wherever on the way it comes up."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, Response, eventually, running_gateway
from tests.real.wire import Answer, chat, request, wire

pytestmark = pytest.mark.real

HI = b'"messages":[{"role":"user","content":"hi"}],"max_tokens":4'
CHAT = "/v1/chat/completions"


def check(reply: Response | Answer, status: int, code: str, param: str | None = None) -> str:
    """The one shape; the message for further looks at it."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert isinstance(error["type"], str)
    assert error["type"]
    assert isinstance(error["message"], str)
    assert error["message"]
    return str(error["message"])


# --- 400

BODIES: dict[str, tuple[str, bytes, str, str | None]] = {  # path, body, code, param
    "nothing": (CHAT, b"", "invalid_json", None),
    "no JSON": (CHAT, b"{nonsense", "invalid_json", None),
    "two objects": (CHAT, b"{}{}", "invalid_json", None),
    "a bad value inside": (CHAT, b'{%s,"user":tru}' % HI, "invalid_json", None),
    "not UTF-8": (CHAT, b'{%s,"user":"\xff"}' % HI, "invalid_json", None),
    "half a surrogate": (CHAT, b'{%s,"user":"\\ud800"}' % HI, "invalid_json", None),
    "nested too deeply": (
        CHAT,
        b'{%s,"user":%s}' % (HI, b"[" * 9999 + b"]" * 9999),
        "invalid_json",
        None,
    ),
    "a number too large": (CHAT, b'{%s,"max_tokens":99,"temperature":1e400}' % HI, "invalid_json", None),
    "an array": (CHAT, b"[]", "invalid_request", None),
    "null": (CHAT, b"null", "invalid_request", None),
    "n of 0": (CHAT, b'{%s,"n":0}' % HI, "invalid_request", "n"),
    "n as a text": (CHAT, b'{%s,"n":"2"}' % HI, "invalid_request", "n"),
    "a stream of 1": (CHAT, b'{%s,"stream":1}' % HI, "invalid_request", "stream"),
    "a model of 1": (CHAT, b'{%s,"model":1}' % HI, "invalid_request", "model"),
    "a negative bound": (CHAT, b'{%s,"max_tokens":-1}' % HI, "invalid_request", "max_tokens"),
    "a negative bound beside": (CHAT, b'{%s,"n_predict":-1}' % HI, "invalid_request", "n_predict"),
    "a negative native bound": ("/completion", b'{"prompt":"a","n_predict":-2}', "invalid_request", "n_predict"),
    "a bound of responses": (
        "/v1/responses",
        b'{"input":"a","max_output_tokens":"x"}',
        "invalid_request",
        "max_output_tokens",
    ),
    "no messages": (CHAT, b'{"max_tokens":4}', "invalid_request", "messages"),
    "empty messages": (CHAT, b'{"messages":[]}', "invalid_request", "messages"),
    "messages of a wrong type": (CHAT, b'{"messages":"hi"}', "invalid_request", "messages"),
    "no role": (CHAT, b'{"messages":[{"content":"x"}]}', "invalid_request", "messages[0].role"),
    "nothing to apply": ("/apply-template", b"{}", "invalid_request", "messages"),
    # from here on llama-server refuses, partly with a 500
    "more answers than slots": (CHAT, b'{%s,"n":5}' % HI, "invalid_request", None),
    "a bad temperature": (CHAT, b'{%s,"temperature":"hot"}' % HI, "invalid_request", None),
    "a bad format": (CHAT, b'{%s,"response_format":{"type":"nope"}}' % HI, "invalid_request", None),
    "a bad grammar": (CHAT, b'{%s,"grammar":"root ::= ("}' % HI, "invalid_request", None),
    "an image without a projector": (
        CHAT,
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}]}]}',
        "invalid_request",
        None,
    ),
    "no prompt": ("/v1/completions", b'{"max_tokens":4}', "invalid_request", None),
    "unknown tokens": ("/completion", b'{"prompt":[99999],"n_predict":4}', "invalid_request", None),
    "tokens that are texts": ("/detokenize", b'{"tokens":["a"]}', "invalid_request", None),
    "no input": ("/v1/responses", b"{}", "invalid_request", None),
    "too long": (
        CHAT,
        b'{"messages":[{"role":"user","content":"%s"}]}' % (b"x" * 5000),
        "context_length_exceeded",
        None,
    ),
    "too long, streamed": (
        "/v1/completions",
        b'{"prompt":"%s","stream":true}' % (b"x" * 5000),
        "context_length_exceeded",
        None,
    ),
    "too long, short answer": (
        "/completion",
        b'{"prompt":"%s","n_predict":2}' % (b"x" * 5000),
        "context_length_exceeded",
        None,
    ),
}


@pytest.mark.parametrize("case", BODIES)
def test_bad_bodies(gateway: Gateway, case: str) -> None:
    path, body, code, param = BODIES[case]
    check(gateway.request("POST", path, body), 400, code, param)
    assert gateway.model()["state"] == "ready"


def test_tokens_that_the_model_does_not_have(gateway: Gateway) -> None:
    check(gateway.request("POST", "/detokenize", {"tokens": [99999]}), 400, "invalid_request")


def test_what_llama_server_says_is_kept(gateway: Gateway) -> None:
    reply = gateway.request("POST", CHAT, chat(temperature="hot"))
    assert "temperature" in check(reply, 400, "invalid_request")
    reply = gateway.request("POST", "/v1/completions", {"prompt": "x" * 5000})
    message = check(reply, 400, "context_length_exceeded")
    assert "5001" in message
    assert "4096" in message


WISHES = [("X-Request-Priority", "urgent"), *(("X-Request-Timeout", value) for value in ("soon", "0", "-1", "nan"))]


@pytest.mark.parametrize(("name", "value"), WISHES)
def test_bad_headers(gateway: Gateway, name: str, value: str) -> None:
    assert name in check(gateway.chat(headers={name: value}), 400, "invalid_request")


@pytest.mark.parametrize(("name", "value"), [("X-Request-Priority", "HIGH"), ("X-Request-Timeout", "2.5")])
def test_good_headers(gateway: Gateway, name: str, value: str) -> None:
    assert gateway.chat(headers={name: value}).status == 200


# --- 401 to 405, 415

ALLOWED = [
    ("GET", CHAT, "POST"),
    ("HEAD", CHAT, "POST"),
    ("DELETE", "/tokenize", "POST"),
    ("POST", "/v1/models", "GET, HEAD"),
    ("DELETE", "/v1/models/tiny", "GET, HEAD"),
    ("PUT", "/metrics", "GET, HEAD"),
    ("PATCH", "/ping", "GET, HEAD"),
    ("POST", "/", "GET, HEAD"),
    ("POST", "/swagger/doc.json", "GET, HEAD"),
    ("GET", "/reload", "POST"),
    ("GET", "/v1/models/load", "POST"),
    ("HEAD", "/v1/models/eject", "POST"),
    ("PUT", "/v1/models/eject", "GET, HEAD, POST"),
]
PUBLIC = {"/metrics", "/ping", "/", "/swagger/doc.json"}


@pytest.mark.parametrize(("method", "path", "allowed"), ALLOWED)
def test_other_methods(gateway: Gateway, method: str, path: str, allowed: str) -> None:
    reply = gateway.request(method, path)
    assert reply.headers["allow"] == allowed
    if method == "HEAD":
        assert (reply.status, reply.body) == (405, b"")
    else:
        check(reply, 405, "method_not_allowed")
    stranger = gateway.request(method, path, key=None)
    assert (stranger.status, stranger.headers.get("allow")) == ((405, allowed) if path in PUBLIC else (401, None))


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/reload", CHAT])
def test_no_key(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST" if path != "/v1/models" else "GET", path, key=None)
    check(reply, 401, "missing_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key(gateway: Gateway) -> None:
    wrong = "sk-wrong-0123456789abcdefghijABCDEFGHIJ"
    reply = gateway.get("/v1/models", key=wrong)
    message = check(reply, 401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"
    assert wrong not in message


def test_scope(gateway: Gateway) -> None:
    check(gateway.request("POST", "/reload", key=USER), 403, "insufficient_scope")
    assert gateway.request("POST", "/reload", key=ADMIN).status == 200


MEDIA = [
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/x-www-form-urlencoded"),
    ("Content-Encoding", "gzip"),
]


@pytest.mark.parametrize(("name", "value"), MEDIA)
def test_other_media(gateway: Gateway, name: str, value: str) -> None:
    check(gateway.chat(headers={name: value}), 415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_json_by_other_names(gateway: Gateway, kind: str) -> None:
    assert gateway.chat(headers={"Content-Type": kind}).status == 200


def test_a_body_without_a_type_is_taken_for_json(gateway: Gateway) -> None:
    body = json.dumps(chat()).encode()
    with wire(gateway) as client:
        client.send(request("POST", CHAT, headers={"Content-Length": str(len(body))}) + body)
        assert client.answer().status == 200


# --- sizes


@pytest.mark.parametrize("more", [{}, {"Expect": "100-continue"}], ids=["", "expecting"])
def test_a_large_body_is_refused_before_it_is_sent(gateway: Gateway, more: dict[str, str]) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, b"", headers={"Content-Length": "11000000"} | more))
        reply = client.answer()
    assert "10485760" in check(reply, 413, "payload_too_large")
    assert reply.headers["connection"] == "close"


def test_a_client_that_sends_a_large_body_all_the_same_hears_why(gateway: Gateway) -> None:
    body = json.dumps(chat(user="x" * 11_000_000)).encode()
    check(gateway.request("POST", CHAT, body), 413, "payload_too_large")


def test_a_body_may_have_ten_megabytes(gateway: Gateway) -> None:
    body = json.dumps(chat(user="")).encode()
    assert gateway.request("POST", CHAT, body + b" " * (10 * 1024 * 1024 - len(body))).status == 200


def test_a_client_that_asks_first_is_told_to_go_on(gateway: Gateway) -> None:
    body = json.dumps(chat()).encode()
    with wire(gateway) as client:
        client.send(request("POST", CHAT, b"", headers={"Content-Length": str(len(body)), "Expect": "100-continue"}))
        assert client.answer().status == 100
        client.send(body)
        assert client.answer().status == 200


@pytest.mark.parametrize(
    ("key", "path", "status"), [(None, CHAT, 401), (USER, "/reload", 403)], ids=["no key", "no scope"]
)
def test_a_client_that_asks_first_is_refused_first(gateway: Gateway, key: str | None, path: str, status: int) -> None:
    with wire(gateway) as client:
        client.send(request("POST", path, b"", key=key, headers={"Content-Length": "100", "Expect": "100-continue"}))
        assert client.answer().status == status


def test_another_expectation_is_ignored_where_bodies_are_read(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(request("POST", CHAT, chat(), headers={"Expect": "a-miracle"}))
        assert client.answer().status == 200
        client.send(request("GET", "/nothing", headers={"Expect": "a-miracle"}))
        check(client.answer("GET"), 400, "invalid_request")
    assert "Traceback" not in gateway.stderr


TOO_MUCH = {
    "line": (request("GET", "/" + "a" * 9000), 414, "uri_too_long"),
    "query": (request("GET", "/healthz?" + "a" * 9000), 414, "uri_too_long"),
    "header": (request("GET", "/healthz", headers={"X-Long": "a" * 9000}), 431, "header_fields_too_large"),
    "headers": (
        request("GET", "/healthz", headers={f"X-{number}": "a" for number in range(70)}),
        431,
        "header_fields_too_large",
    ),
    "no HTTP": (b"hello\r\n\r\n", 400, "invalid_request"),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400, "invalid_request"),
    "two framings": (
        request("POST", CHAT, chat(), headers={"Transfer-Encoding": "chunked"}),
        400,
        "invalid_request",
    ),
    "a bad length": (request("POST", CHAT, b"", headers={"Content-Length": "-1"}), 400, "invalid_request"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_cannot_be_read_as_a_request(gateway: Gateway, case: str) -> None:
    sent, status, code = TOO_MUCH[case]
    with wire(gateway) as client:
        client.send(sent)
        reply = client.answer()
        check(reply, status, code)
        assert reply.version == "HTTP/1.1"
        assert client.ended
    assert gateway.get("/healthz", key=None).status == 200


def test_just_small_enough(gateway: Gateway) -> None:
    with wire(gateway) as client:
        client.send(request("GET", "/healthz?" + "a" * 8000, headers={"X-Long": "a" * 8000}))
        assert client.answer("GET").status == 200
        client.send(request("GET", "/healthz", headers={f"X-{number}": "a" for number in range(60)}))
        assert client.answer("GET").status == 200


# --- the dialect of /v1/messages


@pytest.mark.parametrize(
    ("how", "status", "kind"),
    [
        ({"key": None}, 401, "authentication_error"),
        ({"body": {"max_tokens": 4}}, 400, "invalid_request_error"),
        ({"body": b"{nonsense"}, 400, "invalid_request_error"),
        ({"body": chat(messages=[{"content": "no role"}])}, 400, "invalid_request_error"),
        ({"method": "GET", "body": None}, 405, "invalid_request_error"),
        ({"headers": {"Content-Type": "text/plain"}}, 415, "invalid_request_error"),
        ({"headers": {"Content-Length": "11000000"}}, 413, "request_too_large"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic_clients_get_their_own_shape(
    gateway: Gateway, path: str, how: dict[str, Any], status: int, kind: str
) -> None:
    asked = {"method": "POST", "body": chat()} | how
    with wire(gateway) as client:
        client.send(request(asked.pop("method"), path, **asked))
        reply = client.answer()
    assert reply.status == status
    body = reply.json()
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == reply.headers["x-request-id"]


def test_anthropic_clients_send_their_key_in_their_own_header(gateway: Gateway) -> None:
    assert gateway.request("POST", "/v1/messages", chat(), key=None, headers={"x-api-key": USER}).status == 200


# --- a model that is busy, slow, broken: a stand-in for llama-server plays it


@pytest.fixture(scope="module")
def cramped(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """One place, one more may wait; everything runs out soon."""
    tight: dict[str, Any] = {
        "PARALLEL": "1",
        "MAX_QUEUE_SIZE": "1",
        "REQUEST_TIMEOUT": "0.6",
        "CLIENT_HEADER_TIMEOUT": "0.5",
        "CLIENT_BODY_TIMEOUT": "0.5",
        "MAX_REQUEST_BODY_SIZE": "2000",
    }
    folder = tmp_path_factory.mktemp("cramped")
    with running_gateway(folder, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(FAKE_LLAMA), **tight) as running:
        yield running


@contextlib.contextmanager
def busy(gateway: Gateway, requests: int) -> Iterator[None]:
    """So many requests hold the place and the queue for as long as the block runs."""
    over = threading.Event()

    def hold() -> None:
        while not over.is_set():
            gateway.chat("{{fake: tokens=8 interval=0.05}}", max_tokens=8)

    def held() -> bool:
        summary = gateway.get("/v1/queue/stats").json()["summary"]
        return bool(summary["total_processing"] + summary["total_queued"] >= requests)

    with ThreadPoolExecutor(requests) as pool:
        for _ in range(requests):
            pool.submit(hold)
        try:
            eventually(held)
            yield
        finally:
            over.set()


def test_queue_timeout(cramped: Gateway) -> None:
    with busy(cramped, 1):
        replies = [cramped.chat(headers={"X-Request-Timeout": "0.02"}) for _ in range(5)]
    refused = [reply for reply in replies if reply.status != 200]
    assert refused
    for reply in refused:
        check(reply, 503, "queue_timeout")
        assert 1 <= int(reply.headers["retry-after"]) <= 60


def test_queue_full(cramped: Gateway) -> None:
    with busy(cramped, 2):
        replies = [cramped.chat(headers={"X-Request-Timeout": "0.02"}) for _ in range(20)]
    full = [reply for reply in replies if reply.status == 503 and reply.json()["error"]["code"] == "queue_full"]
    assert full
    for reply in full:
        check(reply, 503, "queue_full")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    stats = cramped.get("/v1/queue/stats").json()["summary"]
    assert stats["total_rejected"] >= len(full)


@pytest.mark.parametrize("nonsense", ["bad_head", "garbage"])
def test_backend_error(cramped: Gateway, nonsense: str) -> None:
    check(cramped.chat("{{fake: " + nonsense + "}}"), 502, "backend_error")


def test_slow_headers(cramped: Gateway) -> None:
    with wire(cramped) as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        check(client.answer(), 408, "client_timeout")
        assert client.ended


def test_a_slow_body(cramped: Gateway) -> None:
    with wire(cramped) as client:
        client.send(request("POST", CHAT, b'{"messages"', headers={"Content-Length": "100"}))
        reply = client.answer()
        check(reply, 408, "client_timeout")
        assert reply.headers["connection"] == "close"


def test_a_chunked_body_is_bounded_as_it_comes(cramped: Gateway) -> None:
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    with wire(cramped) as client:
        client.send(request("POST", CHAT, headers={"Transfer-Encoding": "chunked"}), chunk, chunk, chunk)
        reply = client.answer()
    check(reply, 413, "payload_too_large")
    assert reply.headers["connection"] == "close"


def test_a_chunked_body_that_comes_at_once_has_the_same_bound(cramped: Gateway) -> None:
    for size in (2000, 2001):
        body = json.dumps(chat()).encode().ljust(size)
        with wire(cramped) as client:
            head = request("POST", CHAT, headers={"Transfer-Encoding": "chunked"})
            client.send(head + b"%x\r\n%s\r\n0\r\n\r\n" % (size, body))
            reply = client.answer()
        if size == 2000:
            assert reply.status == 200
        else:
            check(reply, 413, "payload_too_large")


def test_a_chunked_body(cramped: Gateway) -> None:
    body = json.dumps(chat()).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:]))
    with wire(cramped) as client:
        client.send(request("POST", CHAT, headers={"Transfer-Encoding": "chunked"}), chunks, b"0\r\n\r\n")
        assert client.answer().status == 200


def test_backend_timeout(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(
        tmp_path, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(FAKE_LLAMA), REQUEST_TIMEOUT="0.3"
    ) as gateway:
        for stream in (False, True):
            check(gateway.chat("{{fake: wedge}}", stream=stream), 504, "backend_timeout")


def test_model_loading(tmp_path: Path, chat_model: Path) -> None:
    fake = install(tmp_path, "load=never")
    with running_gateway(tmp_path, ready=False, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(fake)) as gateway:
        eventually(lambda: gateway.get("/ping", key=None).status == 200)
        ready = gateway.get("/readyz", key=None)
        assert (ready.status, ready.body) == (503, b"loading")
        reply = gateway.chat(headers={"X-Request-Timeout": "0.1"})
        check(reply, 503, "model_loading")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert gateway.get("/v1/models").json()["data"][0]["status"] in ("starting", "loading")
        assert gateway.get("/health", key=None).status == 503
