"""Telemetry, kept texts and log levels of a running gateway with a real llama-server."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.books_kit import rows
from tests.house import ADMIN, USER, Gateway, Response, eventually, running_gateway
from tests.telemetry_kit import check_errors, check_requests, check_summary

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

PROMPT = "tell me a secret about llamas"
CHAT = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("full"), MODEL_PATH=str(chat_model), AUDIT_CONTENT="full") as gateway:
        yield gateway


def kept(gateway: Gateway, request_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | bool:
        listed = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
        return next((row for row in listed if row["request_id"] == request_id), False)

    row = eventually(look, 5)
    assert isinstance(row, dict)
    return row


def leave(
    gateway: Gateway, body: dict[str, Any], name: str, *, after: bytes = b"", when: Callable[[], bool] | None = None
) -> None:
    """A client that goes when it has read so much, or at some moment before it reads."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=8)
    headers = {"Authorization": f"Bearer {USER}", "Content-Type": "application/json", "x-request-id": name}
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if when is not None:
            eventually(when)
            return
        with contextlib.closing(connection.getresponse()) as reply:
            seen = b""
            while after not in seen:
                seen += reply.read1()


def taken(gateway: Gateway) -> int:
    """Places."""
    return int(gateway.get("/v1/queue/stats").json()["summary"]["total_processing"])


# Telemetry


def test_each_number_after_real_requests(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        for number in range(4):
            gateway.chat(f"hi {number}", max_tokens=5 + number, stream=number % 2 == 1)
        gateway.chat("hi", key=ADMIN)
        gateway.request("POST", "/tokenize", {"content": "one two"})
        gateway.chat("hi", key="sk-nobody")
        gateway.request("POST", "/v1/chat/completions", b"{not json")
        gateway.chat("a " * 5000)
        gateway.request("POST", "/v1/embeddings", {"input": "hi"})  # this model has none
        leave(gateway, CHAT | {"max_tokens": 4000, "stream": True}, "left", after=b'"content"')
        assert kept(gateway, "left")["status"] == 499
        book = tmp_path / "data" / "corral.sqlite"
        told = gateway.get("/v1/telemetry/summary", key=ADMIN).json()
        check_summary(book, told)
        assert (told["total_requests"], told["successful"], told["cancelled"], told["failed"]) == (11, 6, 1, 5)
        assert told["per_model"]["tiny"]["tokens_per_second"] > 10
        told = gateway.get("/v1/telemetry/requests", key=ADMIN).json()
        check_requests(book, told)
        told = gateway.get("/v1/telemetry/errors", key=ADMIN).json()
        check_errors(book, told)
        codes = {row["code"] for row in told["per_code"]}
        assert codes == {"invalid_api_key", "invalid_json", "context_length_exceeded", "not_supported", None}
        told = gateway.get("/v1/telemetry/summary?key=admin", key=ADMIN).json()
        check_summary(book, told, "key_id = 'admin'")
        assert told["total_requests"] == 1


def test_who_may_see_it(gateway: Gateway) -> None:
    for path in ("/v1/telemetry/summary", "/v1/telemetry/requests", "/v1/telemetry/errors", "/metrics/stream"):
        assert (gateway.get(path).status, gateway.get(path, key=None).status) == (403, 401)
        assert gateway.request("HEAD", path, key=ADMIN).status == 200
    assert gateway.get("/v1/telemetry/summary?since=soon", key=ADMIN).json()["error"]["param"] == "since"


def test_snapshots(gateway: Gateway) -> None:
    asked = urllib.request.Request(f"{gateway.url}/metrics/stream", headers={"Authorization": f"Bearer {ADMIN}"})
    with contextlib.closing(urllib.request.urlopen(asked, timeout=8)) as stream:
        assert stream.headers["Content-Type"] == "text/event-stream"

        def snapshot() -> dict[str, Any]:
            assert stream.readline() == b"event: snapshot\n"
            told: dict[str, Any] = json.loads(stream.readline().removeprefix(b"data: "))
            assert stream.readline() == b"\n"
            return told

        first = snapshot()
        assert first["state"] == "ready" and first["models"]["tiny"]["state"] == "ready"
        gateway.chat("hi", max_tokens=100, stream=True)
        later = next(told for told in iter(snapshot, None) if told["requests"]["total"] > first["requests"]["total"])
        assert later["tokens"]["out"] - first["tokens"]["out"] == 100
        assert later["models"]["tiny"]["time_to_first_token_ms"]["count"] > 0
        assert later["gateway"]["rss_mb"] > 10 and later["counters"]["loads"] == 1


# Texts


def text_of(body: Any) -> str:
    if "choices" in body:
        choice = body["choices"][0]
        return str(choice["message"]["content"] if "message" in choice else choice["text"])
    if "output" in body:
        return "".join(part["text"] for item in body["output"] for part in item.get("content", ()))
    content = body["content"]
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def streamed_text(path: str, reply: Response) -> str:
    texts = []
    for line in reply.body.decode().splitlines():
        if not line.startswith("data: {"):
            continue
        told = json.loads(line[6:])
        if "choices" in told:
            texts += [one.get("text") or one.get("delta", {}).get("content") or "" for one in told["choices"]]
        elif "messages" in path:
            texts.append((told.get("delta") or {}).get("text") or "")
        elif "responses" in path:
            texts.append(told["delta"] if told["type"] == "response.output_text.delta" else "")
        else:
            texts.append(told["content"])
    return "".join(texts)


@pytest.mark.parametrize("tokens", [12, 60], ids=["short", "assembled"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        ("/v1/completions", {"prompt": PROMPT}),
        ("/completion", {"prompt": PROMPT}),
        ("/v1/responses", {"input": PROMPT}),
        ("/v1/messages", {"messages": CHAT["messages"]}),
    ],
)
def test_what_was_said_is_kept(gateway: Gateway, path: str, body: dict[str, Any], stream: bool, tokens: int) -> None:
    name = f"said{path.replace('/', '-')}-{stream}-{tokens}"
    bound = {"max_output_tokens" if "responses" in path else "max_tokens": tokens}
    reply = gateway.request("POST", path, body | bound | {"stream": stream}, headers={"x-request-id": name})
    assert reply.status == 200
    said = streamed_text(path, reply) if stream else text_of(reply.json())
    row = kept(gateway, name)
    assert said and row["response"] == said
    assert row["prompt"] in (PROMPT, json.dumps(CHAT["messages"]))


def test_what_no_model_wrote_is_kept_as_it_is(gateway: Gateway) -> None:
    reply = gateway.request("POST", "/tokenize", {"content": PROMPT}, headers={"x-request-id": "tokenized"})
    row = kept(gateway, "tokenized")
    assert (row["prompt"], json.loads(row["response"])) == (PROMPT, reply.json())


def test_what_a_client_that_left_had_got(gateway: Gateway) -> None:
    leave(gateway, CHAT | {"max_tokens": 4000, "stream": True}, "left-early", after=b'"content":"')
    row = kept(gateway, "left-early")
    assert (row["status"], PROMPT in row["prompt"]) == (499, True)
    assert row["response"] and len(row["response"]) < 4000 * 8


def test_what_was_refused_has_a_prompt_but_no_answer(gateway: Gateway) -> None:
    gateway.chat("a " * 5000, headers={"x-request-id": "long"})
    row = kept(gateway, "long")
    assert (row["status"], row["response"]) == (400, None) and "a a a" in row["prompt"]


def test_secrets_are_masked(gateway: Gateway) -> None:
    gateway.chat(f"my key is {ADMIN} and Bearer abc123", headers={"x-request-id": "blurted"})
    row = kept(gateway, "blurted")
    assert "abc123" not in row["prompt"] and "***" in row["prompt"]


@pytest.mark.parametrize("content", ["hash", "off"])
def test_without_texts(tmp_path: Path, chat_model: Path, content: str) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), AUDIT_CONTENT=content) as gateway:
        reply = gateway.request("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 12})
        said = text_of(reply.json())
        log = {"X-Log-Level": "debug", "X-Log-Infer": "1"}
        gateway.request("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 3}, key=ADMIN, headers=log)
        assert gateway.stop() == 0
    book = tmp_path / "data" / "corral.sqlite"
    ((prompt, response), _) = rows(book, "SELECT prompt, response FROM requests ORDER BY id")
    hashes = tuple(hashlib.sha256(text.encode()).hexdigest() for text in (PROMPT, said))
    assert (prompt, response) == (hashes if content == "hash" else (None, None))
    for file in (tmp_path / "data").rglob("*"):
        if file.is_file():
            assert PROMPT.encode() not in file.read_bytes(), file
    assert PROMPT not in gateway.stderr


# The log


@pytest.mark.parametrize(
    ("key", "path", "headers", "lines", "full"),
    [
        (ADMIN, "", {}, 1, False),
        (ADMIN, "", {"X-Log-Level": "off"}, 0, False),
        (ADMIN, "?log=off", {}, 0, False),
        (ADMIN, "?log=off", {"X-Log-Level": "info"}, 1, False),
        (ADMIN, "", {"X-Log-Level": "error"}, 0, False),
        (ADMIN, "", {"X-Log-Level": "debug"}, 1, True),
        (ADMIN, "?log=debug", {}, 1, True),
        (ADMIN, "", {"X-Log-Infer": "1"}, 1, True),
        (USER, "", {"X-Log-Level": "off"}, 1, False),
        (USER, "?log=debug", {"X-Log-Level": "loud", "X-Log-Infer": "1"}, 1, False),
    ],
)
def test_how_much_is_logged(
    gateway: Gateway, key: str, path: str, headers: dict[str, str], lines: int, full: bool
) -> None:
    name = f"log-{abs(hash((key, path, *headers.items())))}"
    asked = headers | {"x-request-id": name}
    reply = gateway.request("POST", f"/v1/chat/completions{path}", CHAT | {"temperature": 0.25}, key=key, headers=asked)
    assert reply.status == 200
    gateway.chat("hi", headers={"x-request-id": f"after-{name}"})
    eventually(lambda: f"request_id=after-{name} " in gateway.stderr, 5)
    found = [line for line in gateway.stderr.splitlines() if f"request_id={name} " in line]
    assert len(found) == lines
    if full:
        assert '"temperature":0.25' in found[0] and "first token" in found[0] and PROMPT in found[0]
    elif found:
        assert "temperature" not in found[0]


def test_a_failure_is_logged_where_only_failures_are_asked_for(gateway: Gateway) -> None:
    headers = {"X-Log-Level": "error", "x-request-id": "log-failed"}
    assert gateway.chat("a " * 5000, key=ADMIN, headers=headers).status == 400
    line = eventually(lambda: next((x for x in gateway.stderr.splitlines() if "=log-failed " in x), False), 5)
    assert isinstance(line, str) and "context_length_exceeded" in line


def test_a_level_that_does_not_exist(gateway: Gateway) -> None:
    reply = gateway.chat("hi", key=ADMIN, headers={"X-Log-Level": "loud"})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "log")


# Time at the model


def test_a_client_that_left_in_the_prefill_had_the_model(tmp_path: Path, slow_model: Path) -> None:
    with running_gateway(
        tmp_path, MODEL_PATH=str(slow_model), CTX="16384", PARALLEL="1", EXTRA_ARGS="-b 256"
    ) as gateway:
        long = CHAT | {"messages": [{"role": "user", "content": "a b c d " * 2000}], "stream": True}
        leave(gateway, long, "prefill", when=lambda: taken(gateway) == 1)
        row = kept(gateway, "prefill")
        assert (row["status"], row["ttft_ms"]) == (499, None)
        used = gateway.get("/v1/usage", key=ADMIN).json()["total"]
        assert 0 < used["seconds"] <= row["duration_ms"] / 1000
        assert used["seconds"] == pytest.approx((row["duration_ms"] - row["queue_ms"]) / 1000, abs=0.1)
