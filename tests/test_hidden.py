"""What `response_fields` would hide is asked for, and what was not asked for is taken out again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gateway.pipeline.dialects import Dialect
from gateway.pipeline.hidden import keep_end, without_timings


@pytest.mark.parametrize(
    ("dialect", "fields", "of_stream", "of_whole"),
    [
        (Dialect.NATIVE, ["content"], ["content", "stop", "timings"], ["content", "timings"]),
        (Dialect.NATIVE, ["timings", "stop"], ["timings", "stop"], ["timings", "stop"]),
        (
            Dialect.NATIVE,
            ["timings/prompt_n"],
            ["timings/prompt_n", "stop", "timings"],
            ["timings/prompt_n", "timings"],
        ),
        (Dialect.NATIVE, [], [], []),
        (Dialect.NATIVE, None, None, None),
        (Dialect.NATIVE, "content", "content", "content"),
        (Dialect.NATIVE, ["content", 5], ["content", 5], ["content", 5]),
        (Dialect.COMPLETIONS, ["content"], ["content"], ["content"]),
    ],
)
def test_the_end_is_kept(dialect: Dialect, fields: Any, of_stream: Any, of_whole: Any) -> None:
    for streamed, sent in ((True, of_stream), (False, of_whole)):
        asked = {"response_fields": msgspec.Raw(msgspec.json.encode(fields))}
        assert keep_end(dialect, asked, streamed=streamed) is (sent != fields and not streamed)
        assert msgspec.json.decode(asked["response_fields"]) == sent


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (b'{"content":"a","timings":{"prompt_n":1},"x":1.50}', b'{"content":"a","x":1.50}'),
        (b'[{"timings":{}},{"content":"\\u00e9"}]', b'[{},{"content":"\\u00e9"}]'),
        (b'{"error":1}', b'{"error":1}'),
        (b"nonsense", b"nonsense"),
        (b"[1]", b"[1]"),
        (b"[" * 100_000, b"[" * 100_000),
    ],
)
def test_timings_are_taken_out(body: bytes, left: bytes) -> None:
    assert without_timings(body) == left
