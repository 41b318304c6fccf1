"""Texts for the records: what was asked and answered, out of bytes as they went by."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pipeline import transcript
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import FrameParser
from gateway.pipeline.transcript import Transcript, detail_of, lone_lines, prompt_said
from tests import streams


def raw(**fields: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def answer(dialect: Dialect, *payloads: bytes) -> str | None:
    seen = Transcript(dialect, {})
    for payload in payloads:
        seen.see(payload)
    return seen.text()


# What was asked


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, None),
        ({"temperature": 1, "model": "m"}, None),
        ({"prompt": 'say "é"\n'}, 'say "é"\n'),
        ({"input": ["a", "b"]}, '["a","b"]'),
        ({"messages": [{"role": "user", "content": "hi"}], "seed": 1}, '[{"role":"user","content":"hi"}]'),
        ({"system": "be kind", "messages": []}, '{"system":"be kind","messages":[]}'),
        ({"query": "q", "documents": ["d"]}, '{"query":"q","documents":["d"]}'),
    ],
)
def test_prompts(fields: dict[str, Any], text: str | None) -> None:
    said = None if text is None else text.encode()
    assert prompt_said(raw(**fields)) == Transcript(Dialect.CHAT, raw(**fields)).prompt.said() == said


def test_a_broken_text_is_kept_as_it_came() -> None:
    half = "\ud800".encode(errors="surrogatepass")
    assert prompt_said({"prompt": msgspec.Raw(b'"\\ud800"')}) in (half, b'"\\ud800"')


# What was answered


@pytest.mark.parametrize("dialect", streams.STREAMS)
def test_streams(dialect: Dialect) -> None:
    events = streams.STREAMS[dialect]
    assert answer(dialect, *events) == streams.TEXT
    assert answer(dialect, b"".join(events)) == streams.TEXT


@pytest.mark.parametrize("dialect", streams.STREAMS)
@given(data=st.data())
def test_streams_in_any_pieces(dialect: Dialect, data: st.DataObject) -> None:
    whole = b"".join(streams.STREAMS[dialect])
    cuts = sorted(data.draw(st.lists(st.integers(1, len(whole)), max_size=8)))
    pieces = [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert answer(dialect, *filter(None, pieces)) == streams.TEXT


@pytest.mark.parametrize("dialect", streams.STREAMS)
def test_what_has_come_of_a_stream_that_broke_off(dialect: Dialect) -> None:
    half = streams.PIECES[: len(streams.PIECES) // 2]
    events = streams.STREAMS[dialect]
    last = next(at for at, event in enumerate(events) if b"\xe6\xbc\xa2" in event)  # that of the fourth piece
    assert answer(dialect, *events[:last], events[last][:-9]) == "".join(half)


@pytest.mark.parametrize(
    ("dialect", "body", "text"),
    [
        (Dialect.CHAT, {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}]}, "yes"),
        (Dialect.COMPLETIONS, {"choices": [{"index": 0, "text": "yes"}]}, "yes"),
        (Dialect.NATIVE, {"content": "yes", "stop": True}, "yes"),
        (Dialect.MESSAGES, {"type": "message", "content": [{"type": "text", "text": "yes"}]}, "yes"),
        (Dialect.RESPONSES, {"output": [{"type": "message", "content": [{"text": "yes"}]}]}, "yes"),
        (
            Dialect.CHAT,
            {"choices": [{"index": n, "message": {"content": f"no {n}"}} for n in (0, 1)]},
            '[{"text":"no 0"},{"text":"no 1"}]',
        ),
        (Dialect.NATIVE, [{"index": 0, "content": "a"}, {"index": 1, "content": "b"}], '[{"text":"a"},{"text":"b"}]'),
        (
            Dialect.CHAT,
            {
                "choices": [
                    {
                        "message": {
                            "content": None,
                            "reasoning_content": "hm",
                            "tool_calls": [{"function": {"name": "f", "arguments": '{"a":1}'}}],
                        }
                    }
                ]
            },
            '{"reasoning":"hm","tool_0":"f","tool_0_arguments":"{\\"a\\":1}"}',
        ),
        (
            Dialect.MESSAGES,
            {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "tool_use", "name": "f", "input": {"a": 1}}]},
            '{"reasoning":"hm","tool":"f","tool_arguments":"{\\"a\\":1}"}',
        ),
        (Dialect.EMBEDDINGS, {"data": [1.5]}, '{"data":[1.5]}'),
        (Dialect.TOKENIZE, {"tokens": [1]}, '{"tokens":[1]}'),
        (Dialect.CHAT, {"choices": "none"}, ""),
        (Dialect.CHAT, {"choices": [{"message": "none"}, 1, None]}, ""),
    ],
)
def test_whole_answers(dialect: Dialect, body: Any, text: str) -> None:
    assert answer(dialect, msgspec.json.encode(body)) == text


PIECES = st.sampled_from(
    [
        b'data: {"choices":[{"delta":{"content":"a"},"index":1}]}\n\n',
        b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n',
        b'data: {"choices":[{"delta":{"reasoning_content":"b"}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"f"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":5}}]}\n\n',
        b'data: {"choices":[]}\n\n',
        b"data: [DONE]\n\n",
        b"data: 1\ndata: 2\n\n",
        b": ping\n\n",
        b"event: x\ndata: {}\n\n",
        b"data: {}\r\n\r\n",
        b"data: \n\ndata: {",
    ]
)


@given(st.lists(PIECES, min_size=1).map(b"".join))
def test_the_short_way_reads_what_the_long_one_reads(stream: bytes) -> None:
    short = lone_lines(stream)
    assert short is None or short == [frame.data for frame in FrameParser().feed(stream)]
    one_by_one = Transcript(Dialect.CHAT, {})
    one_by_one.see(b": ")  # so that it is no stream of lone lines
    one_by_one.see(b"\n\n" + stream)
    assert (answer(Dialect.CHAT, stream) or "") == (one_by_one.text() or "")


def test_a_streamed_tool_call() -> None:
    events = [
        streams.chat_chunk({"tool_calls": [{"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}]}),
        *(streams.chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}) for part in '{"a":1}'),
        streams.chat_chunk({"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": "{}"}}]}),
    ]
    told = msgspec.json.decode(answer(Dialect.CHAT, *events) or "")
    assert told == {"tool_0": "f", "tool_0_arguments": '{"a":1}', "tool_1": "g", "tool_1_arguments": "{}"}


def test_nothing_has_come() -> None:
    assert answer(Dialect.CHAT) is None


def test_what_comes_when_it_is_over_is_not_kept() -> None:
    seen = Transcript(Dialect.CHAT, {})
    seen.see(streams.chat_chunk({"content": "yes"}))
    detail = detail_of("hit", seen)
    size = detail.size
    seen.see(streams.chat_chunk({"content": " and no"}))
    assert detail.response is seen and (detail.size, seen.text()) == (size, "yes")


@pytest.mark.parametrize("body", [b"\xff\xfe", b'{"choices"', b"<html>"])
def test_what_cannot_be_read_is_kept_as_it_came(body: bytes) -> None:
    assert answer(Dialect.CHAT, body) == body.decode(errors="replace")


@given(st.binary(max_size=300))
def test_no_stream_breaks_it(data: bytes) -> None:
    assert isinstance(answer(Dialect.CHAT, b"data: ", data), str)


def test_a_long_stream_holds_little_more_than_its_text() -> None:
    seen = Transcript(Dialect.CHAT, {})
    chunk = streams.chat_chunk({"content": "word "})
    for _ in range(5000):
        seen.see(chunk)
    assert len(chunk) * 5000 > 10 * seen.size
    assert seen.size < transcript.DIGEST_BYTES + 5 * 5000 + len(chunk)
    assert seen.text() == "word " * 5000


def test_what_has_no_end_is_cut_and_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transcript, "MOST_STREAM", 10_000)
    seen = Transcript(Dialect.CHAT, {})
    for _ in range(1000):
        seen.see(streams.chat_chunk({"content": "word "}))
    text = seen.text()
    assert text is not None and text.endswith("word … [cut]") and len(text) < 500
    monkeypatch.setattr(transcript, "MOST_BODY", 100)
    assert answer(Dialect.EMBEDDINGS, b"x" * 99, b"yz", b"never") == "x" * 99 + "yz… [cut]"
