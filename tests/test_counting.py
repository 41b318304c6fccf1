"""Which texts of a prompt are counted, and of what it is certain that they go to the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.models.spec import ModelSpec
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.counting import beginning, shifts, texts_of, told_of
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
    fields = parse_json_object(json.dumps(body).encode())
    assert tuple("\n".join(json.loads(bytes(text)) for text in texts) for texts in texts_of(fields, dialect)) == (
        certain,
        other,
    )
    text, share, surely = told_of(fields, dialect, 1000)
    assert (text, surely) == (certain or other, bool(certain))
    assert share == (1 if not (certain and other) else pytest.approx(0.5, abs=0.5))


@given(st.text(st.sampled_from('ab\\\\"\n\u00e9\u20ac\U0001f600'), min_size=1), st.integers(1, 30), st.booleans())
def test_the_beginning_of_a_text(text: str, most: int, ascii_only: bool) -> None:
    """Wherever it is cut: between the bytes of a character, within an escape."""
    raw = json.dumps(text, ensure_ascii=ascii_only).encode()
    said, share = beginning(memoryview(raw), most)
    assert text.startswith(said) and len(said) <= most and said
    assert 0 < share <= 1
    if share == 1 or len(raw) <= most:
        assert said == text


def test_a_text_that_cannot_be_read() -> None:
    for text in ('"\\ud800"', f'"{"word " * 100}\\ud800{" word" * 100}"'):
        assert beginning(memoryview(text.encode()), 800) == ("", 0)


def test_a_long_prompt_is_told_in_part() -> None:
    """And its share says how much of all the texts that is, in bytes."""
    said = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "x" * 5000}]
    fields = parse_json_object(json.dumps({"messages": [said[0], said[0], said[1]]}).encode())
    text, share, certain = told_of(fields, Dialect.CHAT, 12_000)
    assert text == ("word " * 2000 + "\n" + "word " * 2000)[:12_000] and certain
    assert share == pytest.approx(12_000 / 25_000, rel=0.01)


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
