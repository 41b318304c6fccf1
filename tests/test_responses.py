"""What OpenAI's responses ask for in words that llama-server does not read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.responses import check_responses
from tests.fields import decoded

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}}


def checked(**body: Any) -> dict[str, Any]:
    fields = parse_json_object(json.dumps(body).encode())
    check_responses(fields)
    return decoded(fields)


def held(**body: Any) -> Any:
    return checked(**body).get("response_format")


@pytest.mark.parametrize(
    ("text", "response_format"),
    [
        (None, None),
        ({}, None),
        ({"verbosity": "low"}, None),
        ({"format": None}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "json_object"}}, {"type": "json_object"}),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        ),
    ],
)
def test_the_format_has_the_name_that_llama_server_knows(text: Any, response_format: Any) -> None:
    assert held(input="x", text=text) == response_format


def test_llama_server_s_own_name_wins() -> None:
    mine = {"type": "json_object"}
    assert held(input="x", text={"format": {"type": "json_schema", "schema": SCHEMA}}, response_format=mine) == mine


@pytest.mark.parametrize(
    "body",
    [
        {"input": []},
        {"input": []},
        {"input": "x", "text": 5},
        {"input": "x", "text": {"format": 5}},
        {"input": "x", "text": {"format": {"type": "json_schema"}}},
        {"input": "x", "text": {"format": {"type": "json_schema", "schema": "a"}}},
    ],
)
def test_what_cannot_be_held_to_is_refused(body: Any) -> None:
    with pytest.raises(BadRequest):
        held(**body)


LONG = {"type": "message", "role": "assistant", "status": "completed"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("assistant", "assistant"),
        ([{"role": "user", "content": "hi"}], None),
        (
            [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": "ho"}],
            [
                {"role": "user", "content": "assistant"},
                LONG | {"id": "msg_1", "content": [{"type": "output_text", "text": "ho"}]},
            ],
        ),
        (
            [{"type": "message", "role": "assistant", "id": None, "phase": None, "content": [{"type": "output_text"}]}],
            [LONG | {"id": "msg_0", "content": [{"type": "output_text"}]}],
        ),
        ([LONG | {"id": "m", "status": "incomplete", "content": []}], None),
        ([{"role": "assistant", "type": "reasoning"}], None),
        (["assistant"], None),
    ],
)
def test_earlier_answers_are_spelt_out(given: Any, wanted: Any) -> None:
    assert checked(input=given)["input"] == (given if wanted is None else wanted)
