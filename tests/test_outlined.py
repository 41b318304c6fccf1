"""Of a long request only the outline is made into objects; what depends on it comes out as with all of it."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidJSON
from gateway.pipeline.assemblers.native import Native
from gateway.pipeline.call import MOST_DECODED_BYTES, in_full, outlined, parse_json_object
from gateway.pipeline.dialects import Dialect

LONG = "x" * MOST_DECODED_BYTES
items = st.one_of(
    st.sampled_from(["", "text", 7, -1, None, [], {}, {"role": "user", "content": "hi"}, {"content": LONG}]),
    st.builds(
        lambda role: {"content": LONG, "role": role}, st.sampled_from(["assistant", "user", None, 3, ["assistant"]])
    ),
)
values = st.one_of(st.lists(items, max_size=4), items, st.just(LONG))
requests = st.fixed_dictionaries(
    {},
    optional={
        "messages": values,
        "input": values,
        "prompt": values,
        "n": st.integers(0, 3),
        "logprobs": st.booleans(),
        "stop": st.sampled_from(["x", []]),
        "stream_options": st.sampled_from([None, {"include_usage": False, "other": 1}]),
        "response_fields": st.lists(st.sampled_from(["content", "stop"]), max_size=2),
    },
)


def fields_of(request: dict[str, Any]) -> dict[str, msgspec.Raw]:
    return parse_json_object(json.dumps(request).encode())


@given(requests, st.sampled_from([dialect for dialect in Dialect if dialect.generates]))
def test_an_outline_is_enough(request: dict[str, Any], dialect: Dialect) -> None:
    fields = fields_of(request)
    outline = outlined(fields)
    assert dialect.assembles(outline) is dialect.assembles(request)
    if dialect is Dialect.NATIVE and not (isinstance(prompt := request.get("prompt"), list) and None in prompt):
        assert Native(outline)._expected == Native(request)._expected
    sent = msgspec.json.encode(dialect.ask_stream(in_full(outline, fields)))
    assert msgspec.json.decode(sent) == dialect.ask_stream(request)


def test_a_short_request_is_its_own_outline() -> None:
    request = {"messages": [{"role": "user", "content": "hi"}], "n": 2}
    assert outlined(fields_of(request)) == request


@pytest.mark.parametrize(
    ("value", "outline"),
    [
        (LONG, ""),
        ({"a": LONG}, {}),
        ([1] * MOST_DECODED_BYTES, [0]),
        ([LONG, 5, None, ["a"], {"role": "user"}, {"role": "assistant"}], ["", 0, None, [], {}, {"role": "assistant"}]),
        (["b", "c" * MOST_DECODED_BYTES], ["", ""]),
    ],
)
def test_outlines(value: Any, outline: Any) -> None:
    assert outlined(fields_of({"prompt": value}))["prompt"] == outline


@pytest.mark.parametrize("body", [{"n": "1e400"}, {"messages": [LONG, {"role": "1e400"}]}])
def test_what_cannot_be_read(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidJSON):
        outlined(parse_json_object(json.dumps(body).replace('"1e400"', "1e400").encode()))
