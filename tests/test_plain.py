"""The plain form: what it asks for, and its answers."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.errors import BackendError, BadRequest, QueueFull
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import Frame
from gateway.pipeline.plain import (
    Plain,
    Text,
    Told,
    infer_answer,
    infer_failure,
    infer_token,
    is_plain,
    plain_answer,
    plain_failure,
    plain_job,
    plain_token,
    told_in,
    trace_of,
)
from gateway.pipeline.usage import Usage
from tests import streams
from tests.fields import decoded

SAID = [{"role": "user", "content": "hi"}]
TRACE = "0af7651916cd43dd8448eb211c80319c"


def job(body: Any, **how: Any) -> Plain:
    return plain_job(parse_json_object(json.dumps(body).encode()), **how)


@pytest.mark.parametrize(
    ("body", "template", "upstream", "fields"),
    [
        ({"input": "hi"}, "/v1/completions", "/v1/chat/completions", {"messages": SAID}),
        ({"prompt": "hi"}, "/v1/completions", "/v1/chat/completions", {"messages": SAID}),
        ({"input": "hi", "prompt": None}, "/v1/completions", "/v1/chat/completions", {"messages": SAID}),
        ({"input": "hi", "raw": False}, "/v1/completions", "/v1/chat/completions", {"messages": SAID}),
        ({"input": "hi", "raw": True}, "/v1/completions", "/v1/completions", {"prompt": "hi"}),
        ({"messages": SAID}, "/v1/chat/completions", "/v1/chat/completions", {"messages": SAID}),
        (
            {"input": "hi", "params": {"max_tokens": 4, "stop": ["x"]}, "temperature": 0},
            "/v1/completions",
            "/v1/chat/completions",
            {"messages": SAID, "max_tokens": 4, "stop": ["x"], "temperature": 0},
        ),
        (
            {"input": "hi", "params": {"max_tokens": 4}, "max_tokens": 9},
            "/v1/completions",
            "/v1/chat/completions",
            {"messages": SAID, "max_tokens": 4},
        ),
        ({"input": "hi", "params": None}, "/v1/completions", "/v1/chat/completions", {"messages": SAID}),
        ({"input": 'a "b" \n\u2028 ☃'}, "/v1/completions", "/v1/chat/completions", None),
    ],
)
def test_what_it_amounts_to(body: Any, template: str, upstream: str, fields: Any) -> None:
    plain = job(body)
    route = plain.route()
    assert (route.template, route.upstream) == (template, upstream)
    assert route.dialect is (Dialect.CHAT if upstream == "/v1/chat/completions" else Dialect.COMPLETIONS)
    wanted = {"messages": [{"role": "user", "content": body.get("input")}]} if fields is None else fields
    assert decoded(plain.fields) == wanted


def test_a_door_may_take_texts_as_they_stand() -> None:
    assert job({"prompt": "hi"}, raw=True).route().upstream == "/v1/completions"
    assert job({"prompt": "hi", "raw": False}, raw=True).chat
    assert job({"messages": SAID}, raw=True).chat


def test_the_envelope() -> None:
    plain = job(
        {"input": "hi", "model": "a", "stream": True, "req_id": "r-1", "trace_id": TRACE, "reply_to": "in.box", "x": 1}
    )
    assert (plain.model, plain.stream, plain.req_id, plain.trace_id, plain.reply_to) == (
        "a",
        True,
        "r-1",
        TRACE,
        "in.box",
    )
    assert decoded(plain.fields) == {"messages": SAID, "x": 1}
    bare = job({"input": "hi", "req_id": "not \n sane", "trace_id": "0" * 32, "model": None, "stream": None})
    assert (bare.model, bare.stream, bare.req_id, bare.trace_id, bare.reply_to) == (None, None, None, None, None)
    assert job({"input": "hi"}).stream is None
    told = job({"input": "hi", "params": {"stream": True}})
    assert told.stream
    assert decoded(told.fields) == {"messages": SAID}
    assert plain.route("/infer").template == "/infer"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"params": {"max_tokens": 1}}, "input"),
        ({"input": None}, "input"),
        ({"input": "a", "prompt": "b"}, "prompt"),
        ({"input": "a", "messages": SAID}, "messages"),
        ({"input": 5}, "input"),
        ({"input": ["a"]}, "input"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"input": "a", "params": []}, "params"),
        ({"input": "a", "params": {"messages": SAID}}, "params.messages"),
        ({"input": "a", "params": {"model": "b"}}, "params.model"),
        ({"input": "a", "params": {"stream": 1}}, "stream"),
        ({"input": "a", "params": {"n": 2}}, "n"),
        ({"input": "a", "n": 2}, "n"),
        ({"input": "a", "raw": "yes"}, "raw"),
        ({"messages": SAID, "raw": True}, "raw"),
        ({"input": "a", "req_id": 7}, "req_id"),
        ({"input": "a", "model": 7}, "model"),
        ({"input": "a", "stream": "yes"}, "stream"),
    ],
)
def test_what_is_refused(body: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        job(body)
    assert caught.value.param == param


def test_openai_s_own_form_is_told_apart() -> None:
    def plain(body: Any) -> bool:
        return is_plain(parse_json_object(json.dumps(body).encode()))

    assert plain({"input": "x"})
    assert plain({"input": "x", "params": {}})
    assert not plain({"prompt": "x"})
    assert not plain({"prompt": "x", "input": "y"})


@pytest.mark.parametrize(
    ("said", "trace_id"),
    [
        (TRACE, TRACE),
        (TRACE.upper(), TRACE),
        ("0AF76519-16CD-43DD-8448-EB211C80319C", TRACE),
        ("0" * 32, None),
        ("00000000-0000-0000-0000-000000000000", None),
        (TRACE + "-1", None),
        ("trace of mine", None),
        ("", None),
        (None, None),
    ],
)
def test_a_trace_in_any_of_its_spellings(said: str | None, trace_id: str | None) -> None:
    assert job({"input": "hi", "trace_id": said}).trace_id == trace_id


def test_a_trace_of_its_own() -> None:
    ours = "00-" + "1" * 32 + "-00f067aa0ba902b7-01"
    assert trace_of(TRACE, ours) == f"00-{TRACE}-00f067aa0ba902b7-01"


# --- answers


@pytest.mark.parametrize("dialect", [Dialect.CHAT, Dialect.COMPLETIONS])
def test_a_text_event_by_event(dialect: Dialect) -> None:
    text = Text(dialect)
    pieces = [
        text.take(Frame(None, line[6:].strip()))
        for event in streams.STREAMS[dialect]
        for line in event.splitlines()
        if line.startswith(b"data: ")
    ]
    told = text.told()
    assert told.text == "".join(pieces) != ""
    assert told.finish_reason == {Dialect.CHAT: "stop", Dialect.COMPLETIONS: "length"}[dialect]
    assert [piece for piece in pieces if piece]


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"message": {"content": "hi"}, "finish_reason": "stop"}, Told("hi", "stop")),
        ({"message": {"content": None, "tool_calls": []}, "finish_reason": "tool_calls"}, Told("", "tool_calls")),
        ({"text": "hi", "finish_reason": "length"}, Told("hi", "length")),
    ],
)
def test_a_whole_answer(choice: Any, told: Told) -> None:
    assert told_in(msgspec.json.encode({"choices": [choice]})) == told


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{}]}', b"[" * 100_000])
def test_an_answer_that_cannot_be_read(body: bytes) -> None:
    with pytest.raises(BackendError):
        told_in(body)


def test_the_words_of_each_form() -> None:
    told, usage = Told("a b", "stop"), Usage(5, 2, 1)
    assert plain_token("r", "a") == {"req_id": "r", "token": "a"}
    assert plain_answer("r", told, usage, 1.2346) == {
        "req_id": "r",
        "text": "a b",
        "tokens_in": 5,
        "tokens_out": 2,
        "ms": 1235,
    }
    assert infer_token("a") == {"token": "a", "done": False}
    assert infer_answer(told, usage, 0.5) == {
        "done": True,
        "content": "a b",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        "stats": {"duration_ms": 500},
    }
    error = QueueFull("too many", retry_after=3)
    assert infer_failure(error) == {"error": "too many", "code": "queue_full"}
    assert plain_failure("r", error, 0.0, "a") == {
        "req_id": "r",
        "text": "a",
        "tokens_in": 0,
        "tokens_out": 0,
        "ms": 0,
        "error": {"message": "too many", "type": "server_error", "param": None, "code": "queue_full"},
    }
