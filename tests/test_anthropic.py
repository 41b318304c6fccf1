"""Anthropic's requests as the chats that they amount to, and their answers in Anthropic's words."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import msgspec
import pytest

from gateway.errors import BackendError, BadRequest
from gateway.http.messages import Messages, held_to_grammar
from gateway.pipeline.anthropic import become_chat
from gateway.pipeline.call import Call, Route, parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.plain import Told
from gateway.pipeline.usage import Usage
from gateway.stores.keyfile import Key

HI = [{"role": "user", "content": "hi"}]
TEXT = {"type": "text", "text": "a"}


def call(**fields: Any) -> Call:
    body = json.dumps({"grammar": "g", "messages": HI} | fields).encode()
    return Call(
        route=Route("/v1/messages", "/v1/messages", Dialect.MESSAGES),
        key=Key(id="k"),
        caller="k",
        request_id="r",
        traceparent="",
        received_at=0.0,
        model="claude",
        fields=parse_json_object(body),
        size=len(body),
    )


def chat(**fields: Any) -> dict[str, Any]:
    given = call(**fields)
    become_chat(given)
    assert given.route == Route("/v1/messages", "/v1/chat/completions", Dialect.CHAT)
    return {name: msgspec.json.decode(value) for name, value in given.fields.items()}


def test_what_both_know_stays_and_what_chat_does_not_know_goes() -> None:
    asked = {"max_tokens": 5, "temperature": 0.5, "top_k": 3, "stream": True, "model": "claude", "seed": 7}
    gone = {
        "metadata": {"user_id": "u"},
        "thinking": {"type": "disabled"},
        "tools": [],
        "tool_choice": {"type": "auto"},
    }
    added = {"grammar": "g", "messages": HI, "reasoning_format": "none"}
    assert chat(**asked, **gone) == asked | added
    assert chat(stop_sequences=["x"]) == added | {"stop": ["x"]}


@pytest.mark.parametrize(
    ("system", "turn"),
    [
        ("be brief", [{"role": "system", "content": "be brief"}]),
        ([TEXT, TEXT | {"cache_control": {"type": "ephemeral"}}], [{"role": "system", "content": "aa"}]),
        ("", []),
        ([], []),
        (None, []),
    ],
)  # fmt: skip
def test_the_system_prompt(system: Any, turn: list[Any]) -> None:
    assert chat(system=system)["messages"] == turn + HI


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "user", "content": [TEXT]}, [{"role": "user", "content": [TEXT]}]),
        ({"role": "assistant", "content": "{"}, [{"role": "assistant", "content": "{"}]),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, TEXT, TEXT]},
            [{"role": "assistant", "content": "aa"}],
        ),
        (
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]},
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
                }
            ],
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [TEXT]}, TEXT]},
            [{"role": "tool", "tool_call_id": "t", "content": "a"}, {"role": "user", "content": [TEXT]}],
        ),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]},
            [{"role": "tool", "tool_call_id": "t", "content": "r"}],
        ),
        (
            {
                "role": "user",
                "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAA"}},
                    {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                ],
            },
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA"}},
                        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                    ],
                }
            ],
        ),
        ({"content": "no role"}, [{"content": "no role"}]),
    ],
)
def test_a_turn(turn: dict[str, Any], expected: list[Any]) -> None:
    assert chat(messages=[turn])["messages"] == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"name": "f"}]},
        {"output_config": {"format": {"type": "json_schema"}}},
        {"output_format": {"type": "json_schema"}},
        {"messages": "hi"},
        {"messages": [1]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": ["x"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "document"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
        {"system": 5},
        {"system": [5]},
        {"stop_sequences": "x"},
        {"stop_sequences": [1]},
    ],
)
def test_what_cannot_be_told_as_a_chat(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        become_chat(call(**fields))


@pytest.mark.parametrize("grammar", [None, ""])
def test_without_a_grammar_llama_server_speaks_for_itself(grammar: Any) -> None:
    given = call(grammar=grammar)
    assert held_to_grammar(given) is None
    assert given.route.dialect is Dialect.MESSAGES


# --- answers

USAGE = Usage(prompt=22, completion=3, cached=20)


@pytest.mark.parametrize(("finish", "stop"), [("stop", "end_turn"), ("length", "max_tokens"), (None, "end_turn")])
def test_a_whole_answer_is_a_message_to_anthropics_client(finish: str | None, stop: str) -> None:
    body = Messages("msg_1", "m").answer(Told("ab", finish), USAGE, 1.0, streamed=False)
    told = anthropic.types.Message.model_validate_json(body)
    assert (told.id, told.model, told.role, told.stop_reason) == ("msg_1", "m", "assistant", stop)
    assert [block.to_dict() for block in told.content] == [TEXT | {"text": "ab"}]
    usage = told.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 20, 3)


@pytest.mark.parametrize("pieces", [["a", "b"], []])
def test_a_stream_has_anthropics_events_in_order(pieces: list[str]) -> None:
    voice = Messages("msg_1", "m")
    data = b"".join(voice.token(piece) for piece in pieces)
    data += voice.answer(Told("".join(pieces), "length"), USAGE, 1.0, streamed=True)
    events = []
    for event in data.decode().split("\n\n")[:-1]:
        name, told = event.split("\n")
        events.append(json.loads(told.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * len(pieces),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"] == pieces
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == 3


def test_a_failure_is_told_in_anthropics_words() -> None:
    said = Messages("msg_1", "m").failure(BackendError("it died"))
    assert said == Dialect.MESSAGES.error_frame(BackendError("it died").body())
    assert said.startswith(b"event: error\n")
