"""Every route: who may use it, what the model behind it answers, and in which shape the gateway does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, running_gateway
from tests.real.scrape import Growth

pytestmark = pytest.mark.real

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
FORM = (
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    b"RIFF....\r\n--edge--\r\n"
)
# path, body, a field of the answer
PROXIED: list[tuple[str, dict[str, Any], str]] = [
    *((path, CHAT, "choices") for path in ("/v1/chat/completions", "/chat/completions")),
    ("/v1/completions", {"prompt": "a", "max_tokens": 4}, "choices"),
    *((path, {"prompt": "a", "n_predict": 4}, "tokens_predicted") for path in ("/completion", "/completions")),
    *((path, {"input": "hi", "max_output_tokens": 4}, "output") for path in ("/v1/responses", "/responses")),
    ("/v1/messages", CHAT, "stop_reason"),
    ("/v1/messages/count_tokens", CHAT, "input_tokens"),
    *((path, {"content": "a b"}, "tokens") for path in ("/tokenize", "/v1/tokenize")),
    *((path, {"tokens": [326]}, "content") for path in ("/detokenize", "/v1/detokenize")),
    *((path, CHAT, "prompt") for path in ("/apply-template", "/v1/apply-template")),
]
UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "n_predict": 4}),
    *((path, {"input": "a"}) for path in ("/v1/embeddings", "/embeddings", "/embedding")),
    *((path, {"query": "a", "documents": ["b"]}) for path in ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")),
]
AUDIO = ("/v1/audio/transcriptions", "/audio/transcriptions")
STREAMING = [path for path, _, shape in PROXIED if shape in ("choices", "tokens_predicted", "output", "stop_reason")]


@pytest.mark.parametrize(("path", "body", "shape"), PROXIED)
def test_proxied(gateway: Gateway, path: str, body: dict[str, Any], shape: str) -> None:
    growth = Growth(gateway)
    reply = gateway.request("POST", path, body)
    assert reply.status == 200, reply.body
    assert shape in reply.json()
    assert reply.headers["content-type"].startswith("application/json")
    assert int(reply.headers["content-length"]) == len(reply.body)
    assert growth.of("gateway_requests_total", path=path, method="POST", status="200", model="tiny") == 1
    assert growth.of("gateway_requests_total", model="tiny") == 1
    assert growth.of("gateway_bytes_sent_total") == len(reply.body)


@pytest.mark.parametrize("path", STREAMING)
def test_streamed(gateway: Gateway, path: str) -> None:
    body = next(body for route, body, _ in PROXIED if route == path)
    reply = gateway.request("POST", path, body | {"stream": True})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert "content-length" not in reply.headers
    assert reply.body.count(b"data: ") >= 4
    assert b"\nid:" not in reply.body


@pytest.mark.parametrize(("path", "body"), UNSUPPORTED)
def test_what_the_model_cannot_do(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    reply = gateway.request("POST", path, body)
    assert reply.status == 501
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == "not_supported"
    assert reply.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("path", AUDIO)
def test_audio(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST", path, FORM, headers={"Content-Type": "multipart/form-data; boundary=edge"})
    assert (reply.status, reply.json()["error"]["code"]) == (501, "not_supported")


@pytest.mark.parametrize("path", [path for path, *_ in PROXIED] + [path for path, _ in UNSUPPORTED] + list(AUDIO))
def test_a_model_is_used_only_with_a_key(gateway: Gateway, path: str) -> None:
    reply = gateway.request("POST", path, {}, key=None)
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    error = reply.json()["error"]
    if path.startswith("/v1/messages"):
        assert error["type"] == "authentication_error"
    else:
        assert error["code"] == "missing_api_key"


def test_tokens_there_and_back(gateway: Gateway) -> None:
    text = "over the river and through the wood"
    tokens = gateway.request("POST", "/tokenize", {"content": text}).json()["tokens"]
    assert gateway.request("POST", "/detokenize", {"tokens": tokens}).json() == {"content": text}


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory, embedding_model: Path) -> Iterator[Gateway]:
    """The embedding model with another pooling type in its header: rank."""
    mean = b"llama.pooling_type\x04\x00\x00\x00\x01\x00\x00\x00"
    content = embedding_model.read_bytes()
    assert content.count(mean) == 1
    folder = tmp_path_factory.mktemp("ranker")
    (folder / "rank.gguf").write_bytes(content.replace(mean, mean[:-4] + b"\x04\x00\x00\x00"))
    with running_gateway(folder, MODEL_PATH=str(folder / "rank.gguf")) as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_a_reranker_is_known_by_its_header(ranker: Gateway, path: str) -> None:
    reply = ranker.request("POST", path, {"query": "a", "documents": ["b", "c"]})
    assert reply.status == 200, reply.body
    assert [row["index"] for row in reply.json()["results"]] in ([0, 1], [1, 0])


# --- answered here


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("path", "text"),
    [("/ping", "pong"), ("/healthz", "ok"), ("/readyz", "ready"), ("/health", None), ("/metrics", None)],
)
def test_public(gateway: Gateway, method: str, path: str, text: str | None) -> None:
    reply = gateway.request(method, path, key=None)
    assert reply.status == 200
    assert int(reply.headers["content-length"]) > 0
    if method == "HEAD":
        assert reply.body == b""
    elif text:
        assert reply.body.decode() == text


def test_health(gateway: Gateway) -> None:
    body = gateway.get("/health", key=None).json()
    assert (body["status"], body["state"]) == ("ok", "ready")
    assert body["models"] == {"tiny": {"state": "ready", "slots": 4}}
    assert body["queue"] == {"max_concurrent": 4, "max_queue_size": 128, "active": 0, "waiting": 0}
    assert body["authentication"]["enabled"] is True
    assert 0 < body["uptime"] < 600


ANSWERED = [
    "/v1/models",
    "/v1/models/tiny",
    "/models",
    "/status",
    "/v1/models/status",
    "/v1/models/status/tiny",
    "/v1/models/tiny/status",
    "/v1/models/failed",
    "/v1/queue/stats",
]
UPSTREAM = ["/upstream/tiny/slots", "/upstream/tiny/props", "/upstream/tiny/lora-adapters", "/upstream/tiny/metrics"]


@pytest.mark.parametrize("path", ANSWERED)
def test_answered_here_with_a_key(gateway: Gateway, path: str) -> None:
    got, head = gateway.get(path), gateway.request("HEAD", path)
    assert got.status == head.status == 200
    assert got.headers["content-type"] == head.headers["content-type"] == "application/json; charset=utf-8"
    assert head.body == b""
    assert gateway.get(path, key=None).status == 401


@pytest.mark.parametrize("path", UPSTREAM)
def test_upstream_is_for_admins(gateway: Gateway, path: str) -> None:
    assert gateway.get(path, key=ADMIN).status == 200
    refused = gateway.get(path, key=USER)
    assert (refused.status, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    assert gateway.get(path, key=None).status == 401


def test_upstream_shapes(gateway: Gateway) -> None:
    slots, props, adapters, metrics = (gateway.get(path, key=ADMIN) for path in UPSTREAM)
    assert len(slots.json()) == 4
    assert props.json()["total_slots"] == 4
    assert adapters.json() == []
    assert metrics.body.startswith(b"# HELP llamacpp:")
    assert metrics.headers["content-type"].startswith("text/plain")
    for path in ("/upstream/tiny/health", "/upstream/gpt-4o/slots"):
        assert gateway.get(path, key=ADMIN).status == 404


def test_models(gateway: Gateway) -> None:
    body = gateway.get("/v1/models").json()
    assert body.keys() == {"object", "data"}
    (model,) = body["data"]
    assert {"id": "tiny", "object": "model", "status": "ready"}.items() <= model.items()
    assert model["meta"]["n_ctx"] == 4096
    assert abs(model["created"] - time.time()) < 600
    assert gateway.get("/v1/models/tiny").json() == model
    files = gateway.get("/models").json()["models"]
    assert [row.keys() for row in files] == [{"id", "name", "path", "quant", "family"}]
    assert (files[0]["id"], files[0]["name"]) == ("tiny", "tiny.gguf")


def test_states(gateway: Gateway) -> None:
    body = gateway.get("/v1/models/status").json()
    assert body.keys() == {"server", "models", "summary"}
    assert body["server"].keys() == {"status", "started_at", "updated_at"}
    assert body["server"]["status"] == "ready"
    row = body["models"]["tiny"]
    assert row.keys() == {
        *("alias", "status", "port", "started_at", "last_used_at", "load_progress", "error_message", "vram_used_mb"),
        "updated_at",
    }
    assert (row["alias"], row["status"], row["load_progress"], row["error_message"]) == ("tiny", "ready", 1.0, None)
    assert body["summary"] == {"total": 1, "by_status": {"ready": 1}}
    assert gateway.get("/v1/models/status/tiny").json() == gateway.get("/v1/models/tiny/status").json() == row
    assert gateway.get("/v1/models/failed").json()["total"] == 0
    for path in ("/v1/models/status/gpt-4o", "/v1/models/gpt-4o/status", "/v1/models/gpt-4o"):
        reply = gateway.get(path)
        assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
        assert "tiny" in reply.json()["error"]["message"]


def test_instances(gateway: Gateway) -> None:
    gateway.chat()
    body = gateway.get("/status").json()
    assert body.keys() == {
        *("instances", "budget_mb", "used_est_mb", "margin_mb", "state", "last_error", "uptime_seconds"),
        *("server_time_unix", "evictions_total", "loads_total", "warmups_in_progress", "draining_count", "key"),
    }
    assert body["key"] == {"id": "user", "scopes": ["infer"], "expires_unix": None}
    (row,) = body["instances"]
    assert row.keys() == {
        *("model_id", "state", "last_used_unix", "est_vram_mb", "queue_len", "inflight", "max_queue_depth"),
        *("port", "pid"),
    }
    assert (row["model_id"], row["state"], row["queue_len"], row["inflight"]) == ("tiny", "ready", 0, 0)
    assert 0 <= time.time() - row["last_used_unix"] < 60
    assert Path(f"/proc/{row['pid']}/cmdline").read_bytes().split(b"\0")[0].endswith(b"llama-server")
    assert (body["state"], body["last_error"], body["loads_total"]) == ("ready", None, 1)


def test_queue_stats(gateway: Gateway) -> None:
    before = gateway.get("/v1/queue/stats").json()
    assert before.keys() == {"summary", "per_model"}
    assert before["summary"].keys() == {"total_queued", "total_processing", "total_processed", "total_rejected"}
    assert before["per_model"].keys() == {"tiny"}
    gateway.chat()
    after = gateway.get("/v1/queue/stats").json()["summary"]
    assert after["total_processed"] == before["summary"]["total_processed"] + 1
    assert (after["total_queued"], after["total_processing"], after["total_rejected"]) == (0, 0, 0)


# --- what is not there


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """Before a stand-in for llama-server that remembers what it was asked."""
    with running_gateway(
        tmp_path_factory.mktemp("watched"), MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(FAKE_LLAMA)
    ) as running:
        yield running


def seen(gateway: Gateway) -> list[dict[str, Any]]:
    backend = Gateway(gateway.model()["port"], gateway.process, gateway.folder, {})
    rows: list[dict[str, Any]] = backend.get("/fake", key=None).json()["requests"]
    return [row for row in rows if row["path"] not in ("/fake", "/health", "/props", "/metrics")]


STRANGE = [
    ("GET", "/nothing"),
    ("GET", "/v1"),
    ("GET", "/props"),
    ("GET", "/slots"),
    ("POST", "/slots/0?action=save"),
    ("POST", "/props"),
    ("POST", "/lora-adapters"),
    ("POST", "/v1/infill"),
    ("POST", "/v1/completion"),
    ("POST", "/v1/chat/completions/"),
    ("POST", "//v1/chat/completions"),
    ("POST", "/v1/./chat/completions"),
    ("POST", "/v1/chat%2Fcompletions"),
    ("POST", "/V1/chat/completions"),
    ("GET", "/cors-proxy?url=http://127.0.0.1"),
    ("PUT", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), STRANGE)
def test_any_other_path_never_reaches_llama_server(watched: Gateway, method: str, path: str) -> None:
    before = len(seen(watched))
    reply = watched.request(method, path, CHAT if method == "POST" else None)
    assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
    assert watched.request(method, path, key=None).status == 401, "strangers learn nothing"
    assert len(seen(watched)) == before


def test_what_reaches_llama_server(watched: Gateway) -> None:
    """Its own key, our trace and request id; nothing of the client's headers, nothing dangerous of its body."""
    trace = "0af7651916cd43dd8448eb211c80319c"
    mine = {
        "x-request-id": "mine-1",
        "traceparent": f"00-{trace}-b7ad6b7169203331-01",
        "Cookie": "secret=1",
        "X-Conversation-Id": "abc",
        "X-Forwarded-For": "192.0.2.7",
    }
    dangerous: dict[str, Any] = {
        "id_slot": 1,
        "lora": [{"id": 0, "scale": 1}],
        "sse_ping_interval": 1,
        "n_predict": 10**6,
    }
    before = len(seen(watched))
    assert watched.chat(headers=mine, user="me", model="gpt-4o", **dangerous).status == 200
    (row,) = seen(watched)[before:]
    assert (row["method"], row["path"]) == ("POST", "/v1/chat/completions")
    headers = row["headers"]
    assert headers["x-request-id"] == "mine-1"
    version, trace_id, span, flags = headers["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", trace, "01")
    assert span not in ("b7ad6b7169203331", "0" * 16)
    assert USER not in str(row)
    assert not headers.keys() & {"cookie", "x-conversation-id", "x-forwarded-for", "x-api-key"}
    assert row["body"]["user"] == "me"
    assert not row["body"].keys() & {"id_slot", "lora", "sse_ping_interval", "n_predict", "max_completion_tokens"}
    assert row["body"]["max_tokens"] <= 4096


@pytest.mark.parametrize(
    "given", [None, "nonsense", f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{'a' * 32}-{'0' * 16}-01"]
)
def test_a_trace_is_begun_where_none_comes(watched: Gateway, given: str | None) -> None:
    watched.chat(headers={"traceparent": given} if given else {})
    version, trace_id, span, _ = seen(watched)[-1]["headers"]["traceparent"].split("-")
    assert (version, len(trace_id), len(span)) == ("00", 32, 16)
    assert int(trace_id, 16)
    assert int(span, 16)
    assert trace_id not in (given or "")
