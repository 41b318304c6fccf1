"""`/infer` and `/v1/completions` with `input`: text in, text out, as any other request through the spine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, eventually, running_gateway
from tests.real.scrape import Growth
from tests.real.wire import Answer, request, wire

pytestmark = pytest.mark.real

SEED = {"temperature": 0.0, "seed": 3}
LIMITED = "sk-limited-0123456789abcdefghijABCDEFGHIJ"
STRANGER = "sk-stranger-0123456789abcdefghijABCDEFGHIJ"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("plain")
    keys = [f"admin:{ADMIN}:0 scope=admin", f"user:{USER}:0", f"limited:{LIMITED}:1"]
    (folder / "api_keys.txt").write_text("\n".join([*keys, f"stranger:{STRANGER}:0 models=qwen-*"]) + "\n")
    with running_gateway(folder, MODEL_PATH=str(chat_model)) as running:
        yield running


def infer(gateway: Gateway, body: Any, **how: Any) -> Answer:
    with wire(gateway) as client:
        client.send(request("POST", "/infer", body, **how))
        return client.answer()


def lines(answer: Answer) -> list[dict[str, Any]]:
    assert answer.body.endswith(b"\n")
    return [json.loads(line) for line in answer.body.splitlines()]


@pytest.fixture(scope="module")
def chat_text(gateway: Gateway) -> str:
    """What the model answers to "hi" through its chat template."""
    message = gateway.chat("hi", max_tokens=12, **SEED).json()["choices"][0]["message"]
    return str(message["content"])


# --- /infer


def test_infer_streams_lines(gateway: Gateway, chat_text: str) -> None:
    answer = infer(gateway, {"prompt": "hi", "max_tokens": 12, "model": "tiny", **SEED})
    assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
    assert answer.whole
    *tokens, last = lines(answer)
    assert len(tokens) == 12
    assert all(line.keys() == {"token", "done"} and line["done"] is False for line in tokens)
    assert "".join(line["token"] for line in tokens) == last["content"] == chat_text
    prompt = last["usage"]["prompt_tokens"]
    assert prompt > 10, "through the chat template"
    assert last == {
        "done": True,
        "content": chat_text,
        "finish_reason": "length",
        "usage": {"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12},
        "stats": {"duration_ms": last["stats"]["duration_ms"]},
    }
    assert 0 <= last["stats"]["duration_ms"] < 5000


@pytest.mark.parametrize("length", [12, 80])
def test_infer_in_one_piece(gateway: Gateway, length: int) -> None:
    asked = {"prompt": "hi", "max_tokens": length, **SEED}
    whole = infer(gateway, asked | {"stream": False})
    assert (whole.status, whole.headers["content-type"]) == (200, "application/json")
    (only,) = lines(infer(gateway, asked))[-1:]
    said = whole.json()
    assert said["stats"].keys() == {"duration_ms"}
    assert {**said, "stats": None} == {**only, "stats": None}


def test_what_an_infer_request_may_say(gateway: Gateway) -> None:
    asked = {"prompt": "hi", "max_tokens": 30, "top_p": 0.9, "top_k": 40, "repeat_penalty": 1.1, **SEED}
    text = infer(gateway, asked | {"stream": False}).json()["content"]
    word = text.split()[3]
    stopped = infer(gateway, asked | {"stream": False, "stop": [f" {word}"]}).json()
    assert stopped["finish_reason"] == "stop"
    assert text.startswith(stopped["content"])
    assert word not in stopped["content"].split()


def test_a_raw_prompt_is_continued(gateway: Gateway) -> None:
    told = infer(gateway, {"prompt": "hi", "raw": True, "max_tokens": 8, "stream": False, **SEED}).json()
    wanted = gateway.request("POST", "/v1/completions", {"prompt": "hi", "max_tokens": 8, **SEED}).json()
    assert told["content"] == wanted["choices"][0]["text"]
    assert told["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"] < 5


@pytest.mark.parametrize(
    ("body", "how", "status", "code"),
    [
        ({"prompt": "hi"}, {"key": None}, 401, "missing_api_key"),
        ({"prompt": "hi"}, {"key": USER + "x"}, 401, "invalid_api_key"),
        ({"prompt": "hi"}, {"key": STRANGER}, 403, "model_not_allowed"),
        (b"{", {}, 400, "invalid_json"),
        ({}, {}, 400, "invalid_request"),
        ({"prompt": ["hi"]}, {}, 400, "invalid_request"),
        ({"prompt": "hi", "max_tokens": -1}, {}, 400, "invalid_request"),
        ({"prompt": "hi", "temperature": "hot"}, {}, 400, "invalid_request"),
        ({"prompt": "x" * 5000}, {}, 400, "context_length_exceeded"),
        ({"prompt": "hi", "grammar": "nobody"}, {}, 404, "grammar_not_found"),
        ({"prompt": "hi"}, {"headers": {"Content-Type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"prompt": "hi"}, {"headers": {"Content-Length": "11000000"}}, 413, "payload_too_large"),
    ],
)
def test_infer_tells_errors_in_its_own_words(
    gateway: Gateway, body: Any, how: dict[str, Any], status: int, code: str
) -> None:
    answer = infer(gateway, body, **how)
    assert answer.status == status, answer.body
    assert answer.headers["content-type"].startswith("application/json")
    told = answer.json()
    assert told.keys() == {"error", "code"}
    assert (told["code"], type(told["error"])) == (code, str)


def test_infer_by_another_method(gateway: Gateway) -> None:
    answer = gateway.get("/infer")
    assert (answer.status, answer.json()["code"], answer.headers["allow"]) == (405, "method_not_allowed", "POST")


def test_infer_meets_the_key_s_limit(gateway: Gateway) -> None:
    first = infer(gateway, {"prompt": "hi", "max_tokens": 1}, key=LIMITED)
    assert (first.status, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    second = infer(gateway, {"prompt": "hi", "max_tokens": 1}, key=LIMITED)
    assert (second.status, second.json()["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(second.headers["retry-after"]) <= 60


# --- /v1/completions with input and params


def test_input_and_params(gateway: Gateway, chat_text: str) -> None:
    answer = gateway.request("POST", "/v1/completions", {"input": "hi", "params": {"max_tokens": 12, **SEED}})
    assert answer.status == 200
    told = answer.json()
    assert told.keys() == {"req_id", "text", "tokens_in", "tokens_out", "ms"}
    assert (told["req_id"], told["text"], told["tokens_out"]) == (answer.headers["x-request-id"], chat_text, 12)
    assert told["tokens_in"] > 10
    assert isinstance(told["ms"], int)


def test_input_and_params_as_a_stream(gateway: Gateway, chat_text: str) -> None:
    with wire(gateway) as client:
        body = {"input": "hi", "params": {"max_tokens": 12, **SEED}, "stream": True, "req_id": "mine-1"}
        client.send(request("POST", "/v1/completions", body))
        answer = client.answer()
    assert (answer.headers["content-type"], answer.whole) == ("text/event-stream", True)
    *events, done = answer.events
    assert done == "[DONE]"
    *tokens, last = map(json.loads, events)
    assert all(event.keys() == {"req_id", "token"} for event in tokens)
    assert "".join(event["token"] for event in tokens) == last["text"] == chat_text
    assert (last["req_id"], last["tokens_out"]) == ("mine-1", 12)
    assert answer.headers["x-request-id"] == "mine-1"


def test_the_client_s_header_names_the_request_first(gateway: Gateway) -> None:
    body = {"input": "hi", "params": {"max_tokens": 1}, "req_id": "in-the-body"}
    answer = gateway.request("POST", "/v1/completions", body, headers={"x-request-id": "in-the-head"})
    assert answer.json()["req_id"] == answer.headers["x-request-id"] == "in-the-head"


def test_its_errors_are_those_of_the_route(gateway: Gateway) -> None:
    answer = gateway.request("POST", "/v1/completions", {"input": ["hi"]})
    assert answer.status == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.json()["error"]["param"] == "input"


def test_openai_s_own_form_is_left_alone(gateway: Gateway) -> None:
    answer = gateway.request("POST", "/v1/completions", {"prompt": "hi", "input": "no", "max_tokens": 1})
    assert answer.json()["object"] == "text_completion"


# --- in the books


def test_records_name_the_real_route(gateway: Gateway) -> None:
    growth = Growth(gateway)
    about = {"x-request-id": "plain-records"}
    infer(gateway, {"prompt": "hi", "max_tokens": 3}, headers=about)
    gateway.request("POST", "/v1/completions", {"input": "hi", "params": {"max_tokens": 3}}, headers=about)
    infer(gateway, {"prompt": 7}, headers=about)
    assert growth.of("gateway_requests_total", path="/infer", status="200", model="tiny") == 1
    assert growth.of("gateway_requests_total", path="/v1/completions", status="200", model="tiny") == 1
    assert growth.of("gateway_tokens_total", direction="out", model="tiny") == 6

    def records() -> list[dict[str, Any]]:
        logs = gateway.get("/logs?limit=100", key=ADMIN).json()["logs"]
        return [row for row in logs if row["request_id"] == "plain-records"]

    rows = eventually(lambda: len(found := records()) == 3 and found)
    seen = {
        (row["route"], row["transport"], row["status"], bool(row["stream"]), row["tokens_out"], row["key_id"])
        for row in rows
    }
    assert seen == {
        ("/infer", "http", 200, True, 3, "user"),
        ("/v1/completions", "http", 200, False, 3, "user"),
        ("/infer", "http", 400, False, 0, "user"),
    }


# --- the models file's prompt template


def test_the_models_file_s_template_stands_around_a_prompt(tmp_path: Path, chat_model: Path) -> None:
    template = {"user_prefix": "Q: ", "user_suffix": "\n", "model_prefix": "A:", "model_suffix": "\n"}
    models = {"tiny": {"model_path": str(chat_model), "prompt_template": template}}
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    with running_gateway(tmp_path, CONFIG_PATH=str(tmp_path / "config.json")) as gateway:
        told = infer(gateway, {"prompt": "why", "max_tokens": 8, "stream": False, **SEED}).json()
        plain = gateway.request("POST", "/v1/completions", {"input": "why", "params": {"max_tokens": 8, **SEED}})
        wanted = gateway.request("POST", "/v1/completions", {"prompt": "Q: why\nA:", "max_tokens": 8, **SEED}).json()
    assert told["content"] == plain.json()["text"] == wanted["choices"][0]["text"]
    assert told["usage"]["prompt_tokens"] == wanted["usage"]["prompt_tokens"]


# --- the response cache


def test_a_remembered_answer_is_said_in_the_same_words(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), CACHE_ENABLED="true") as gateway:
        for body in ({"prompt": "hi", "stream": True}, {"prompt": "hi", "stream": False}):
            first, again = (infer(gateway, {**body, "max_tokens": 40, **SEED}) for _ in range(2))
            assert (first.headers["x-cache"], again.headers["x-cache"]) == ("miss", "hit")
            for one, other in zip(lines(first), lines(again), strict=True):
                assert {**one, "stats": None} == {**other, "stats": None}


# --- answers that pause and break: a stand-in for llama-server plays them


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("moody")
    with running_gateway(
        folder, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(FAKE_LLAMA), SSE_PING_SECONDS="1", PARALLEL="8"
    ) as running:
        yield running


@pytest.mark.parametrize("end", ["error", "cut", "die", "end"])
def test_an_error_in_the_middle_is_a_line_and_a_cut(moody: Gateway, end: str) -> None:
    answer = infer(moody, {"prompt": "{{fake: " + f"{end}=3 tokens=6 interval=0.05" + "}}", "max_tokens": 6})
    assert (answer.status, answer.whole) == (200, False)
    *tokens, last = lines(answer)
    assert 0 < len(tokens) <= 3
    assert all(line["done"] is False for line in tokens)
    assert last.keys() == {"error", "code"}
    assert last["code"] == "backend_error"


@pytest.mark.parametrize("end", ["error", "cut", "die", "end"])
def test_an_error_in_the_middle_of_events(moody: Gateway, end: str) -> None:
    with wire(moody) as client:
        body = {"input": "{{fake: " + f"{end}=3 tokens=6 interval=0.05" + "}}", "stream": True}
        client.send(request("POST", "/v1/completions", body))
        answer = client.answer()
    assert (answer.status, answer.whole) == (200, False)
    *tokens, last = map(json.loads, answer.events)
    assert 0 < len(tokens) <= 3
    assert last["error"]["code"] == "backend_error"


@pytest.mark.parametrize("way", ["split=7", "one_chunk", ""])
def test_however_the_bytes_come(moody: Gateway, way: str) -> None:
    answer = infer(moody, {"prompt": "{{fake: tokens=9 " + way + "}}", "max_tokens": 9})
    assert answer.whole
    *tokens, last = lines(answer)
    assert len(tokens) == 9
    assert last["content"] == "".join(line["token"] for line in tokens)


def test_lines_know_no_comments_and_events_do(moody: Gateway) -> None:
    prompt = "{{fake: prefill=1.6 tokens=2}}"
    answer = infer(moody, {"prompt": prompt, "max_tokens": 2})
    assert len(lines(answer)) == 3
    with wire(moody) as client:
        client.send(request("POST", "/v1/completions", {"input": prompt, "stream": True}))
        assert client.answer().body.startswith(b": ping\n\n")


def test_an_old_client_gets_lines_without_framing(moody: Gateway) -> None:
    with wire(moody) as client:
        client.send(request("POST", "/infer", {"prompt": "{{fake: tokens=3}}", "max_tokens": 3}, version="1.0"))
        answer = client.answer()
    assert "transfer-encoding" not in answer.headers
    assert [line["done"] for line in lines(answer)] == [False, False, False, True]


def test_a_client_that_leaves_frees_its_place(moody: Gateway) -> None:
    with wire(moody) as client:
        client.send(request("POST", "/infer", {"prompt": "{{fake: tokens=5000 interval=0.05}}", "max_tokens": 5000}))
        client.first_bytes()
        eventually(lambda: moody.get("/v1/queue/stats").json()["summary"]["total_processing"] == 1)
    eventually(lambda: moody.get("/v1/queue/stats").json()["summary"]["total_processing"] == 0)
