"""No answer escapes its limits: its tokens are counted in whatever form; one that tells none takes what it reserved."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, USER, Gateway, Response, eventually, running_gateway

pytestmark = pytest.mark.real

CHAT, COMPLETIONS, NATIVE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/completion", "/v1/responses"
HI = {"messages": [{"role": "user", "content": "hi"}]}
BEGUN = {"messages": [*HI["messages"], {"role": "assistant", "content": "yes"}]}
ANSWERED = {"input": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
A = {"prompt": "a"}
PROMPTS = {"prompt": ["a", "a"]}
TPM = 1_000_000
number = itertools.count()

# path, body, tokens in and out; of a prompt 2 tokens, of a chat 22, and 3 more where its answer is begun
ANSWERS: list[tuple[str, dict[str, Any], int, int]] = [
    (NATIVE, {**A, "n_predict": 50, "return_tokens": True, "response_fields": ["content"]}, 2, 50),
    (NATIVE, {**A, "n_predict": 5, "n_probs": 2, "stop": ["zzz"], "response_fields": ["content", "tokens"]}, 2, 5),
    (NATIVE, {**PROMPTS, "n_predict": 5, "return_tokens": True, "response_fields": ["content"]}, 4, 10),
    (NATIVE, {**A, "n_predict": 0, "response_fields": ["content"]}, 2, 1),
    (NATIVE, {**A, "n_predict": 9, "stream": True, "response_fields": ["content"]}, 2, 9),
    (NATIVE, {**A, "n_predict": 400, "n_probs": 1, "return_tokens": True}, 2, 400),
    (NATIVE, {**A, "n_predict": 400, "n": 4, "return_tokens": True}, 8, 1600),
    (CHAT, {**HI, "max_tokens": 50, "n": 4, "logprobs": True}, 88, 200),
    (CHAT, {**HI, "max_tokens": 50, "n": 4, "logprobs": True, "top_logprobs": 20, "stream": True}, 88, 200),
    (CHAT, {**HI, "max_tokens": 50, "n": 2, "stream": True, "stream_options": {"include_usage": True}}, 44, 100),
    (CHAT, {**HI, "max_tokens": 50, "n": 4}, 88, 200),
    (CHAT, {**BEGUN, "max_tokens": 50, "n": 3}, 75, 150),
    (COMPLETIONS, {**A, "max_tokens": 50, "n": 3, "logprobs": 2, "stop": ["zzz"]}, 6, 150),
    (COMPLETIONS, {**A, "max_tokens": 50, "n": 4, "logprobs": 9, "stream": True}, 8, 200),
    (RESPONSES, {"input": "hi", "max_output_tokens": 5, "n": 2, "stream": True}, 44, 10),
    (RESPONSES, {"input": "hi", "max_output_tokens": 5, "n": 2}, 44, 10),
    (RESPONSES, {**ANSWERED, "max_output_tokens": 5, "n": 2}, 50, 10),
]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("counted")
    write_keys(folder)
    with running_gateway(folder, MODEL_PATH=str(chat_model)) as gateway:
        yield gateway


def write_keys(folder: Path) -> None:
    keys = folder / "api_keys.txt"
    keys.write_text(f"admin:{ADMIN} scope=infer,admin\nuser:{USER} tpm={TPM}\n")
    keys.chmod(0o600)


def asked(gateway: Gateway, path: str, body: dict[str, Any]) -> tuple[Response, dict[str, Any]]:
    """The answer and its record."""
    name = f"counted-{next(number)}"
    reply = gateway.request("POST", path, {"temperature": 0, **body}, headers={"x-request-id": name})

    def look() -> dict[str, Any] | bool:
        rows = gateway.get("/logs?limit=5", key=ADMIN).json()["logs"]
        return next((row for row in rows if row["request_id"] == name), False)

    row = eventually(look, 5)
    assert isinstance(row, dict)
    return reply, row


def left(gateway: Gateway) -> int:
    """Of the key's tokens in this minute; the request that asks takes one of them itself."""
    reply = gateway.request("POST", "/tokenize", {"content": ""})
    return int(reply.headers["x-ratelimit-remaining-tokens"])


@pytest.mark.parametrize(("path", "body", "prompt", "completion"), ANSWERS)
def test_every_token_is_counted(
    gateway: Gateway, path: str, body: dict[str, Any], prompt: int, completion: int
) -> None:
    before = left(gateway)
    reply, row = asked(gateway, path, body)
    assert reply.status == 200
    assert (row["tokens_in"], row["tokens_out"]) == (prompt, completion)
    assert before - left(gateway) >= prompt + completion


def test_what_was_not_asked_for_is_not_in_the_answer(gateway: Gateway) -> None:
    asked_for = {**A, "n_predict": 5, "return_tokens": True, "response_fields": ["content", "timings/predicted_n", "x"]}
    reply, _ = asked(gateway, NATIVE, asked_for)
    assert reply.json().keys() == {"content", "timings/predicted_n"}
    reply, _ = asked(gateway, NATIVE, asked_for | {"prompt": ["a", "b"], "response_fields": ["tokens"]})
    assert [answer.keys() for answer in reply.json()] == [{"tokens"}, {"tokens"}]
    reply, _ = asked(gateway, NATIVE, asked_for | {"response_fields": ["timings"]})
    assert reply.json()["timings"]["predicted_n"] == 5


def test_prompts_of_their_own_are_not_taken_for_the_first(gateway: Gateway) -> None:
    """llama-server tells the tokens of the first one only, and the stop word keeps the answer from being assembled."""
    body = {"prompt": ["a", "the sea " * 400], "max_tokens": 4, "logprobs": 1, "stop": ["zzz"]}
    _, row = asked(gateway, COMPLETIONS, body)
    assert row["tokens_in"] >= 800
    assert row["tokens_out"] == 8


# --- foreign servers


@contextmanager
def standing_in(answer: bytes, status: int = 200, **headers: str) -> Iterator[str]:
    """A server that gives this answer to each POST; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.say(200, b'{"status":"ok"}')

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.say(status, answer, **headers)

        def say(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            about = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
            for name, value in about.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("path", "answer", "taken"),
    [
        (CHAT, {"choices": [{"message": {"content": "much"}}]}, range(600, 700)),
        (NATIVE, {"content": "much"}, range(600, 700)),
        (NATIVE, {"content": "a", "tokens_evaluated": 5, "tokens_predicted": 4}, range(9, 10)),
        (CHAT, {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}, range(9, 10)),
    ],
)
def test_an_answer_that_tells_no_tokens_takes_what_was_reserved(
    tmp_path: Path, path: str, answer: dict[str, Any], taken: range
) -> None:
    write_keys(tmp_path)
    with standing_in(json.dumps(answer).encode()) as url, running_gateway(tmp_path, LLAMA_URL=url) as gateway:
        before = left(gateway)
        # `n_probs` with a stop word: it is not asked for as a stream
        body = HI | A | {"max_tokens": 600, "logprobs": True, "n_probs": 1, "stop": ["zzz"]}
        assert gateway.request("POST", path, body).status == 200
        assert before - left(gateway) in taken


@pytest.mark.parametrize(("told", "shown"), [({"Retry_After": "7"}, "7"), ({}, "1")])
def test_a_backend_that_limits(tmp_path: Path, told: dict[str, str], shown: str) -> None:
    refusal = b'{"error":{"code":429,"message":"slow down","type":"rate_limit_error"}}'
    with standing_in(refusal, 429, **told) as url, running_gateway(tmp_path, LLAMA_URL=url) as gateway:
        reply = gateway.chat()
        assert (reply.status, reply.headers["retry-after"]) == (429, shown)
        error = reply.json()["error"]
        assert (error["code"], error["message"]) == ("rate_limit_exceeded", "slow down")


# --- bodies that llama-server quotes when it refuses them


@pytest.mark.parametrize("stream", [b"true", b"false"])
@pytest.mark.parametrize(
    ("name", "value"),
    [(b"x", b"1" * 3_000_000), (b"tool_choice", b'"%b"' % (b"x" * 2_000_000))],
    ids=["x", "tool_choice"],
)
def test_a_long_quotation_is_the_clients_mistake(gateway: Gateway, name: bytes, value: bytes, stream: bytes) -> None:
    field = b'"%b":%b' % (name, value)
    body = b'{"messages":[{"role":"user","content":"hi"}],"max_tokens":99,"stream":%b,%b}' % (stream, field)
    reply = gateway.request("POST", CHAT, body)
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "invalid_request"), error["message"][:200]
    assert len(error["message"]) == 2000
    assert error["message"].endswith("…")
    assert gateway.chat().status == 200


def test_what_a_bare_llama_server_takes_is_taken(gateway: Gateway) -> None:
    body = b'\xef\xbb\xbf{"messages":[{"role":"user","content":"hi"}],"max_tokens":4.0,"n":2.0}'
    reply = gateway.request("POST", CHAT, body)
    assert reply.status == 200, reply.body
    assert len(reply.json()["choices"]) == 2
