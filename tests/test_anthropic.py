"""Anthropic's requests as the chats that they amount to, and their answers in Anthropic's words."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import msgspec
import pytest

from gateway.errors import BackendError, BadRequest
from gateway.http.messages import Messages, held_to_form
from gateway.pipeline.anthropic import become_chat
from gateway.pipeline.call import Call, Route, parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.grammars import rules_of
from gateway.pipeline.plain import Told
from gateway.pipeline.shield import shielded
from gateway.pipeline.usage import Usage
from gateway.stores.keys.file import Key

HI = [{"role": "user", "content": "hi"}]
TEXT = {"type": "text", "text": "a"}


SCHEMA = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
FORMAT = {"type": "json_schema", "schema": SCHEMA}


def call(**fields: Any) -> Call:
    """With a grammar, if nothing else is said."""
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
    become_chat(given, rules_of(given.fields))
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
    ("fields", "more"),
    [
        ({"output_config": {"format": FORMAT, "effort": "low"}}, {}),
        ({"output_format": FORMAT, "output_config": {"format": None}}, {}),
        ({"output_format": FORMAT, "thinking": {"type": "disabled"}, "tools": []}, {}),
        (
            {"output_format": FORMAT, "thinking": {"type": "enabled", "budget_tokens": 9}},
            {"thinking_budget_tokens": 9},
        ),
    ],
)
def test_a_schema_is_the_chats_response_format(fields: dict[str, Any], more: dict[str, Any]) -> None:
    told = chat(grammar=None, **fields)
    assert told.pop("grammar") is None
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    assert told == {"messages": HI, "response_format": asked} | more


def nested(depth: int) -> Any:
    return {"type": "array", "items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize("name", ["output_config.format", "output_format"])
@pytest.mark.parametrize(
    "asked",
    [
        5,
        "json_schema",
        [],
        {},
        {"type": "json_schema"},
        {"schema": SCHEMA},
        {"type": "text", "schema": SCHEMA},
        FORMAT | {"schema": None},
        FORMAT | {"schema": [SCHEMA]},
        FORMAT | {"schema": nested(40)},
        FORMAT | {"schema": {"type": "string", "minLength": 10**6}},
    ],
)
def test_what_is_no_schema_or_too_much_of_one_is_told_by_its_name(name: str, asked: Any) -> None:
    given = call(grammar=None, **({name: asked} if name == "output_format" else {"output_config": {"format": asked}}))
    with pytest.raises(BadRequest, match=rf"^{name}") as caught:
        held_to_form(given)
    assert (caught.value.param or "").startswith(name)


@pytest.mark.parametrize("fields", [{"grammar": "g"}, {"output_config": {"format": FORMAT}}, {"output_format": FORMAT}])
def test_what_would_be_ignored_does_not_reach_llama_server(fields: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="obeys no"):
        shielded(call(**{"grammar": None} | fields))
    shielded(call(grammar=None, output_config={"effort": "low"}))


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
        {"output_config": {"format": FORMAT}},
        {"output_format": FORMAT},
        {"output_format": FORMAT, "output_config": {"format": FORMAT}, "grammar": None},
        {"output_format": FORMAT, "tools": [{"name": "f"}], "grammar": None},
        {"output_config": 5},
        {"output_format": FORMAT, "thinking": 5, "grammar": None},
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
        held_to_form(call(**fields))


@pytest.mark.parametrize(
    "fields",
    [{}, {"grammar": ""}, {"output_config": {"effort": "low"}}, {"output_config": None, "output_format": None}],
)
def test_without_rules_llama_server_speaks_for_itself(fields: dict[str, Any]) -> None:
    given = call(**{"grammar": None} | fields)
    assert held_to_form(given) is None
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
