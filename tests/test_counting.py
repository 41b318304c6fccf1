"""Which texts of a prompt are counted, and of what it is certain that they go to the model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.models.spec import ModelSpec
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.counting import shifts, texts_of
from gateway.pipeline.dialects import Dialect

AB = "a\nb"


@pytest.mark.parametrize(
    ("dialect", "body", "certain", "other"),
    [
        (Dialect.COMPLETIONS, {"prompt": "a", "input": "b"}, "a", ""),
        (Dialect.NATIVE, {"prompt": "a"}, "a", ""),
        (Dialect.NATIVE, {"prompt": ["a", "b"]}, "", ""),
        (
            Dialect.CHAT,
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "a\nb",
            "",
        ),
        (
            Dialect.CHAT,
            {"messages": [{"role": "assistant", "content": "<think>b</think>"}, {"role": "tool", "content": "c"}]},
            "",
            "<think>b</think>\nc",
        ),
        (
            Dialect.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}, 7]}]},
            "a",
            "",
        ),
        (Dialect.CHAT, {"messages": [{"role": "user", "content": None}, {"content": 5}]}, "", ""),
        (Dialect.CHAT, {"messages": "nonsense"}, "nonsense", ""),
        (Dialect.CHAT, {"messages": [7]}, "", ""),
        (Dialect.MESSAGES, {"system": "s", "messages": [{"role": "user", "content": "a"}]}, "s\na", ""),
        (Dialect.RESPONSES, {"input": "a", "instructions": "i"}, "i\na", ""),
        (
            Dialect.RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}, {"type": "reasoning"}]},
            "a",
            "",
        ),
        (Dialect.CHAT, {}, "", ""),
    ],
)
def test_texts(dialect: Dialect, body: Any, certain: str, other: str) -> None:
    assert texts_of(parse_json_object(json.dumps(body).encode()), dialect) == (certain, other)


@pytest.mark.parametrize(
    ("spec", "extra_args", "shifting"),
    [
        (ModelSpec(id="a"), "", False),
        (ModelSpec(id="a"), "--no-context-shift -b 256", False),
        (ModelSpec(id="a"), "-b 256 --context-shift", True),
        (ModelSpec(id="a", flags=("--context-shift",)), "", True),
        (ModelSpec(id="a", url="http://elsewhere"), "", True),
    ],
)
def test_a_server_that_shifts_refuses_nothing(spec: ModelSpec, extra_args: str, shifting: bool) -> None:
    assert shifts(spec, extra_args) is shifting
