"""RunPod's job forms and outputs, as tables."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest, CorralError, ModelNotFound, NotFound, PayloadTooLarge
from gateway.pipeline.call import Call, parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import Frame
from gateway.pipeline.routes import ROUTES
from gateway.pipeline.usage import Usage
from gateway.stores.keys.file import Key
from gateway.workers.runpod.jobs import PlainForm, Raw, failure, read_job, route_of, shape_of

MESSAGES = [{"role": "user", "content": "hi"}]
MOST = 10_000


def filled(given: Any) -> Call:
    """The call that a job becomes."""
    call = Call(
        route=ROUTES["/completion"],
        key=Key("runpod"),
        caller="runpod",
        request_id="job-1",
        traceparent="",
        received_at=0.0,
        model=None,
        fields={},
        size=0,
    )
    read_job(given, MOST).fill(call)
    return call


def body_of(call: Call) -> dict[str, Any]:
    return {name: msgspec.json.decode(value) for name, value in call.fields.items()}


@pytest.mark.parametrize(
    ("given", "template", "body"),
    [
        (
            {"openai_route": "/v1/chat/completions", "openai_input": {"messages": MESSAGES, "stream": True}},
            "/v1/chat/completions",
            {"messages": MESSAGES, "stream": True},
        ),
        ({"openai_route": "v1/embeddings", "openai_input": {"input": "a"}}, "/v1/embeddings", {"input": "a"}),
        ({"openai_route": "/completion/", "openai_input": {"prompt": "a"}}, "/completion", {"prompt": "a"}),
        (
            {"openai_route": "/v1/completions", "openai_input": {"prompt": "a", "input": "b"}},
            "/v1/completions",
            {"prompt": "a", "input": "b"},
        ),
        (
            {"openai_route": "/v1/completions", "openai_input": {"input": "hi", "params": {"top_k": 3}}},
            "/v1/completions",
            {"messages": MESSAGES, "top_k": 3, "stream": False},
        ),
        (
            {"messages": MESSAGES, "params": {"top_k": 3}},
            "/v1/chat/completions",
            {"messages": MESSAGES, "top_k": 3, "stream": False},
        ),
        (
            {"messages": MESSAGES, "sampling_params": {"top_k": 3, "repetition_penalty": 1.1}, "max_batch_size": 5},
            "/v1/chat/completions",
            {"messages": MESSAGES, "top_k": 3, "repeat_penalty": 1.1, "stream": False},
        ),
        ("hi", "/v1/completions", {"messages": MESSAGES, "stream": False}),
        ({"prompt": "hi", "stream": True}, "/v1/completions", {"messages": MESSAGES, "stream": True}),
        ({"prompt": "hi", "raw": True}, "/v1/completions", {"prompt": "hi", "stream": False}),
        ({"prompt": "hi", "sampling_params": {}}, "/v1/completions", {"prompt": "hi", "stream": False}),
        ({"prompt": "hi", "apply_chat_template": False}, "/v1/completions", {"prompt": "hi", "stream": False}),
        (
            {"prompt": "hi", "apply_chat_template": True, "params": {"seed": 1}},
            "/v1/completions",
            {"messages": MESSAGES, "seed": 1, "stream": False},
        ),
    ],
)
def test_what_a_job_becomes(given: Any, template: str, body: dict[str, Any]) -> None:
    call = filled(given)
    assert (call.route.template, body_of(call)) == (template, body)
    assert call.stream is bool(body.get("stream"))


@pytest.mark.parametrize("route", ["/v1/models", "/models", "v1/models/"])
def test_the_list_of_models(route: str) -> None:
    assert read_job({"openai_route": route, "openai_input": None}, MOST).models


@pytest.mark.parametrize(
    ("given", "error", "about"),
    [
        (None, BadRequest, "must be an object"),
        ([1], BadRequest, "must be an object"),
        ({}, BadRequest, "nothing to answer"),
        ({"prompt": "a", "messages": MESSAGES}, BadRequest, "prompt and messages"),
        ({"prompt": "a", "sampling_params": 3}, BadRequest, "sampling_params is 3"),
        ({"prompt": "a", "apply_chat_template": "yes"}, BadRequest, "apply_chat_template"),
        ({"prompt": "a", "sampling_params": {"n": 2}}, BadRequest, "n must be 1"),
        ({"openai_route": 7, "openai_input": {}}, BadRequest, "openai_route must be a string"),
        ({"openai_route": "/v1/chat/completions"}, BadRequest, "openai_input must be an object"),
        ({"openai_route": "/v1/chat/completions", "openai_input": "{}"}, BadRequest, "openai_input must be an object"),
        ({"openai_route": "/v1/files", "openai_input": {}}, NotFound, "no '/v1/files' for jobs"),
        ({"openai_route": "/slots", "openai_input": {}}, NotFound, "no '/slots' for jobs"),
        ({"openai_route": "/v1/audio/transcriptions", "openai_input": {}}, NotFound, "for jobs"),
        ({"openai_route": "/infer", "openai_input": {"prompt": "hi"}}, NotFound, "send its fields as the job's input"),
        ({"openai_route": "/v1/completions", "openai_input": {"input": 5}}, BadRequest, "input is 5"),
        ({"prompt": "a" * MOST}, PayloadTooLarge, "MAX_REQUEST_BODY_SIZE"),
        ({"prompt": "\ud800"}, BadRequest, "not valid JSON"),
    ],
)
def test_what_is_refused(given: Any, error: type[CorralError], about: str) -> None:
    with pytest.raises(error, match=about):
        read_job(given, MOST)


@pytest.mark.parametrize(
    ("given", "route"),
    [
        (None, ""),
        ([], ""),
        ({}, ""),
        ({"params": {}}, ""),
        ("hi", "/v1/completions"),
        ({"prompt": 5}, "/v1/completions"),
        ({"prompt": "hi", "messages": None}, "/v1/completions"),
        ({"messages": 5, "sampling_params": 3}, "/v1/chat/completions"),
        ({"messages": [], "input": "hi"}, "/v1/chat/completions"),
        ({"openai_route": "v1/embeddings/", "openai_input": 5}, "/v1/embeddings"),
        ({"openai_route": "/v1/files", "prompt": "hi"}, ""),
        ({"openai_route": 7, "prompt": "hi"}, ""),
        ({"openai_route": "/v1/models"}, ""),
    ],
)
def test_the_route_of_what_is_refused(given: Any, route: str) -> None:
    assert route_of(given) == route
    assert not route or route in ROUTES


NAMES = "openai_route openai_input input prompt messages params sampling_params apply_chat_template raw stream model"
KEYS = st.sampled_from(NAMES.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["hi", "/v1/embeddings", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(VALUES | st.dictionaries(KEYS, VALUES, max_size=5))
def test_whatever_a_job_holds_it_becomes_a_call_or_is_refused(given: Any) -> None:
    with contextlib.suppress(CorralError):
        asked = read_job(given, MOST)
        if not asked.models:
            filled(given)


def test_too_deep_a_job_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(BadRequest):
        read_job({"prompt": "a", "x": deep}, MOST)
    while deep:  # or taking it apart would overflow the stack, too
        deep = deep[0]


def chunk(text: str | None, finish: str | None = None) -> Frame:
    delta = {} if text is None else {"content": text}
    return Frame(None, json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode())


def test_a_plain_streams_parts_and_its_end() -> None:
    shape = PlainForm("job-1", Dialect.CHAT, stream=True)
    assert shape.take([chunk(None)]) is None, "a part without text is no part"
    assert shape.take([chunk(" a"), chunk(" b")]) == {
        "req_id": "job-1",
        "token": " a b",
        "choices": [{"tokens": [" a", " b"]}],
    }
    assert shape.take([chunk(" c"), chunk(None, "stop"), Frame(None, b"[DONE]")])["token"] == " c"
    assert shape.end(Usage(4, 3), 0.25) == {
        "req_id": "job-1",
        "text": " a b c",
        "tokens_in": 4,
        "tokens_out": 3,
        "ms": 250,
        "choices": [{"tokens": [], "finish_reason": "stop"}],
        "usage": {"input": 4, "output": 3},
    }


def test_a_plain_answer_in_one_piece() -> None:
    shape = PlainForm("job-1", Dialect.CHAT, stream=False)
    body = json.dumps({"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}).encode()
    assert shape.take([Frame(None, body)]) is None
    told = shape.end(Usage(4, 1), 0.1)
    assert told["text"] == "yes" and told["choices"] == [{"tokens": ["yes"], "finish_reason": "stop"}]


def test_a_routes_own_outputs() -> None:
    assert Raw(stream=False).take([Frame(None, b'{"a": 1}')]) == {"a": 1}
    frames = [Frame("message_start", b'{"a":1}'), Frame(None, "ä".encode())]
    assert Raw(stream=True).take(frames) == 'event: message_start\ndata: {"a":1}\n\ndata: ä\n\n'
    assert Raw(stream=True).end(Usage(), 1.0) is None
    with pytest.raises(CorralError, match="cannot be read"):
        Raw(stream=False).take([Frame(None, b"<html>")])


def test_the_shape_follows_the_form() -> None:
    given: dict[str, Any] = {"openai_route": "/v1/chat/completions", "openai_input": {"messages": MESSAGES}}
    assert isinstance(shape_of(read_job(given, MOST), filled(given)), Raw)
    assert isinstance(shape_of(read_job("hi", MOST), filled("hi")), PlainForm)


def test_a_failure_is_one_text_with_the_errors_fields() -> None:
    told = failure(ModelNotFound("no such model", param="model"))
    assert list(told) == ["error"]
    assert json.loads(told["error"]) == {
        "message": "no such model",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert parse_json_object(told["error"].encode())
