"""The books of a running gateway with a real llama-server: every request in them, and what is told out of them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.books_kit import count, rows
from tests.house import ADMIN, ROOT, USER, Gateway, eventually, running_gateway

pytestmark = pytest.mark.real

METER = "sk-meter-0123456789abcdefghijABCDEFGHI"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("books")
    keys = folder / "api_keys.txt"
    keys.write_text(f"admin:{ADMIN} scope=infer,admin\nuser:{USER}\nmeter:{METER} scope=metrics\n")
    keys.chmod(0o600)
    with running_gateway(folder, MODEL_PATH=str(chat_model)) as gateway:
        yield gateway


def found(gateway: Gateway, request_id: str) -> dict[str, Any]:
    """The record of a request, as soon as there is one."""

    def look() -> dict[str, Any] | bool:
        listed = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
        return next((row for row in listed if row["request_id"] == request_id), False)

    row = eventually(look, 5)
    assert isinstance(row, dict)
    return row


def test_an_answer(gateway: Gateway) -> None:
    reply = gateway.chat("hi", headers={"x-request-id": "books-1"})
    row = found(gateway, "books-1")
    usage = reply.json()["usage"]
    assert (row["status"], row["error"], row["key_id"], row["transport"]) == (200, None, "user", "http")
    assert (row["tokens_in"], row["tokens_out"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (row["route"], row["model"], row["stream"]) == ("/v1/chat/completions", "tiny", False)
    assert 0 < row["ttft_ms"] <= row["duration_ms"] < 10_000
    assert row["prompt"] is None and row["response"] is None and len(row["trace_id"]) == 32


def test_a_stream(gateway: Gateway) -> None:
    gateway.chat("hi", stream=True, headers={"x-request-id": "books-2"})
    row = found(gateway, "books-2")
    assert row["stream"] is True and row["tokens_out"] == 8


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, 400, "context_length_exceeded"),
        ({"messages": "none"}, 400, "invalid_request"),
        (b"{not json", 400, "invalid_json"),
    ],
)
def test_what_was_rejected(gateway: Gateway, body: Any, status: int, code: str) -> None:
    name = f"books-{code}"
    reply = gateway.request("POST", "/v1/chat/completions", body, headers={"x-request-id": name})
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    row = found(gateway, name)
    assert (row["status"], row["error"], row["key_id"], row["tokens_out"]) == (status, code, "user", 0)


@pytest.mark.parametrize(
    ("name", "how", "status", "code", "key"),
    [
        ("stranger", {"key": "sk-nobody"}, 401, "invalid_api_key", ""),
        ("nobody", {"key": None}, 401, "missing_api_key", ""),
        ("large", {"key": None, "body": b"x" * 10_485_761}, 413, "payload_too_large", ""),
        ("text", {"headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type", "user"),
        ("got", {"method": "GET"}, 405, "method_not_allowed", "user"),
        ("meter", {"key": METER}, 403, "insufficient_scope", "meter"),
    ],
)
def test_what_was_refused_at_the_door(
    gateway: Gateway, name: str, how: dict[str, Any], status: int, code: str, key: str
) -> None:
    method = how.get("method", "POST")
    body = None if method == "GET" else how.get("body", {"messages": []})
    headers = {"x-request-id": f"books-{name}", **how.get("headers", {})}
    reply = gateway.request(method, "/v1/chat/completions", body, headers=headers, key=how.get("key", USER))
    assert reply.status == status
    row = found(gateway, f"books-{name}")
    assert (row["status"], row["error"], row["key_id"]) == (status, code, key)
    assert (row["route"], row["model"], row["ttft_ms"]) == ("/v1/chat/completions", "", None)


@pytest.mark.parametrize("query", ["", "?x=1"])  # the second one goes aiohttp's way
def test_a_client_that_leaves_while_it_sends(gateway: Gateway, query: str) -> None:
    head = f"POST /v1/chat/completions{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
    name = f"books-left{len(query)}"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(f'{head}x-request-id: {name}\r\nContent-Length: 100\r\n\r\n{{"messages": '.encode())
        eventually(lambda: gateway.get("/health").json()["queue"]["active"] == 0)
    row = found(gateway, name)
    assert (row["status"], row["error"], row["key_id"], row["model"]) == (499, None, "user", "")


def test_a_browsers_question_is_no_request(gateway: Gateway) -> None:
    before = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert gateway.request("OPTIONS", "/v1/chat/completions", headers=asked, key=None).status == 204
    gateway.chat("hi", headers={"x-request-id": "books-asked"})
    found(gateway, "books-asked")
    after = gateway.get("/logs?limit=50", key=ADMIN).json()["logs"]
    assert len(after) == len(before) + 1


def test_who_may_read(gateway: Gateway) -> None:
    assert gateway.get("/logs").status == 403
    assert gateway.get("/logs", key=None).status == 401
    assert gateway.get("/v1/usage", key=None).status == 401
    assert gateway.get("/v1/usage?key=admin").status == 403


def test_usage_is_what_the_answers_said(gateway: Gateway) -> None:
    before = gateway.get("/v1/usage").json()["total"]
    gateway.chat("hi", key=ADMIN)
    spent = [gateway.chat(text, max_tokens=count).json()["usage"] for text, count in (("one", 3), ("two words", 5))]

    def grown() -> dict[str, Any] | bool:
        total: dict[str, Any] = gateway.get("/v1/usage").json()["total"]
        return total if total["requests"] == before["requests"] + 2 else False

    after = eventually(grown, 5)
    assert isinstance(after, dict)
    assert after["tokens_in"] - before["tokens_in"] == sum(usage["prompt_tokens"] for usage in spent)
    assert after["tokens_out"] - before["tokens_out"] == 8
    assert after["seconds"] > before["seconds"]
    assert {line["key"] for line in gateway.get("/v1/usage").json()["data"]} == {"user"}
    assert {line["key"] for line in gateway.get("/v1/usage", key=ADMIN).json()["data"]} >= {"user", "admin"}


def test_corral_logs(gateway: Gateway) -> None:
    gateway.chat("hi", headers={"x-request-id": "books-cli"})
    found(gateway, "books-cli")
    command = [sys.executable, "-m", "gateway", "logs", "--since", "1h", "--key", "user", "--json"]
    environment = {"PYTHONPATH": str(ROOT), "CORRAL_URL": gateway.url, "CORRAL_API_KEY": ADMIN}
    done = subprocess.run(command, cwd=gateway.folder, env=environment, capture_output=True, text=True, check=True)
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert listed[-1]["request_id"] == "books-cli" and {row["key_id"] for row in listed} == {"user"}


@pytest.mark.timeout(30)
def test_the_books_go_on_after_a_restart_and_hold_its_events(tmp_path: Path, chat_model: Path) -> None:
    books = tmp_path / "data" / "corral.sqlite"
    for turn in (1, 2):
        with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
            gateway.chat("hi")
            assert gateway.stop() == 0
        assert count(books) == turn
    codes = [row[0] for row in rows(books, "SELECT code FROM events ORDER BY id")]
    assert codes.count("startup") == codes.count("server.ready") == codes.count("server.draining") == 2
    assert codes.count("model.loaded") == 2
    assert rows(books, "SELECT requests FROM usage") == [(2,)]
    text = b"".join(file.read_bytes() for file in books.parent.glob("corral.sqlite*"))
    assert USER.encode() not in text and ADMIN.encode() not in text


@pytest.mark.timeout(30)
def test_the_service_goes_on_without_its_books(tmp_path: Path, chat_model: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    audit_db = str(tmp_path / "file" / "corral.sqlite")
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), AUDIT_DB=audit_db) as gateway:
        assert gateway.chat("hi").status == 200
        reply = gateway.get("/logs", key=ADMIN)
        assert reply.status == 503 and "there are no records" in reply.json()["error"]["message"]
        assert gateway.stderr.count("no records are written, the service goes on") == 1
        assert gateway.stop(signal.SIGTERM) == 0
