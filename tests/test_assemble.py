import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pipeline.assemble import Assembler, StreamCut, StreamFailed, assembler
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import FrameParser
from gateway.pipeline.usage import Usage, usage_of_stream
from tests import streams

C, T, N, R, M = streams.STREAMS
GENERATING = list(streams.STREAMS)
WHOLE = Usage(streams.PROMPT, streams.GENERATED, streams.CACHED)


def fed(dialect: Dialect, events: list[bytes], request: dict[str, Any] | None = None, cut: int = 999) -> Assembler:
    parser, made = FrameParser(), assembler(dialect, request or {})
    data = b"".join(events)
    for at in range(0, len(data), cut):
        for frame in parser.feed(data[at : at + cut]):
            made.feed(frame)
    return made


def answer(dialect: Dialect, events: list[bytes], request: dict[str, Any] | None = None) -> Any:
    return json.loads(fed(dialect, events, request).result())


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 500))
def test_chat(cut: int) -> None:
    made = fed(C, streams.chat(), cut=cut)
    assert json.loads(made.result()) == {
        "choices": [
            {"finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": streams.TEXT}},
        ],
        **streams.AROUND,
        "object": "chat.completion",
        "usage": streams.USAGE,
        "timings": streams.TIMINGS,
    }
    assert made.usage == WHOLE


def test_chat_without_usage_has_it_from_the_timings() -> None:
    made = answer(C, streams.chat(usage=False))
    assert made["usage"] == streams.USAGE


def test_completions() -> None:
    assert answer(T, streams.completions()) == {
        "choices": [{"text": streams.TEXT, "index": 0, "logprobs": None, "finish_reason": "length"}],
        **streams.AROUND,
        "object": "text_completion",
        "usage": streams.USAGE,
        "timings": streams.TIMINGS,
    }


def test_native() -> None:
    final = json.loads(streams.native_final().removeprefix(b"data: "))
    settings = {**final["generation_settings"], "stream": False}
    whole = {**final, "content": streams.TEXT, "generation_settings": settings}
    assert answer(N, streams.native()) == whole
    tokens = [301 + at for at in range(streams.GENERATED)]
    assert answer(N, streams.native(), {"return_tokens": True}) == {**whole, "tokens": tokens}


def test_responses() -> None:
    told = json.loads(streams.responses()[-1].partition(b"data: ")[2])["response"]
    thought, message = told["output"]
    output = [{**thought, "status": "completed"}, message]  # only a whole answer has it in its reasoning
    assert answer(R, streams.responses()) == {**told, "output": output, "completed_at": told["created_at"]}


def test_messages() -> None:
    assert answer(M, streams.messages()) == {
        "id": "chatcmpl-1",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": streams.TEXT}],
        "model": "demo",
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"cache_read_input_tokens": 21, "input_tokens": 1, "output_tokens": streams.GENERATED},
    }


@pytest.mark.parametrize("dialect", GENERATING)
def test_a_stream_without_its_end_is_no_answer(dialect: Dialect) -> None:
    events = streams.STREAMS[dialect]
    for count in range(len(events)):
        made = fed(dialect, events[:count])
        assert not made.finished
        with pytest.raises(StreamCut):
            made.result()
    assert fed(dialect, events).finished


@pytest.mark.parametrize("dialect", GENERATING)
def test_an_error_in_the_stream_is_no_answer(dialect: Dialect) -> None:
    for count in range(len(streams.STREAMS[dialect])):
        made = fed(dialect, [*streams.STREAMS[dialect][:count], streams.error(dialect)])
        with pytest.raises(StreamFailed, match="Context size") as raised:
            made.result()
        assert raised.value.error == streams.ERROR
        assert raised.value.status == 502


@pytest.mark.parametrize(
    ("dialect", "frame"),
    [
        (C, streams.event({"error": "overloaded"})),
        (R, streams.event({"type": "error", "code": "x", "message": "overloaded"}, "error")),
        (R, streams.event({"type": "response.failed", "response": {"error": {"message": "overloaded"}}})),
        (M, streams.event({"type": "error", "error": {"type": "overloaded_error", "message": "overloaded"}}, "error")),
    ],
)
def test_errors_of_other_servers(dialect: Dialect, frame: bytes) -> None:
    with pytest.raises(StreamFailed, match="overloaded"):
        fed(dialect, [*streams.STREAMS[dialect][:2], frame, streams.DONE]).result()


@pytest.mark.parametrize("dialect", GENERATING)
@pytest.mark.parametrize("junk", [b"<html>", b'{"cut":', b"[1]", b'"x"', b"\xff", b"[" * 100_000])
def test_what_is_no_event_cuts_the_stream(dialect: Dialect, junk: bytes) -> None:
    first, *rest = streams.STREAMS[dialect]
    with pytest.raises(StreamCut, match="cannot be read"):
        fed(dialect, [first, b"data: " + junk + b"\n\n", *rest])


@pytest.mark.parametrize("dialect", [C, T, N])
@pytest.mark.parametrize("junk", [{"choices": [7]}, {"choices": 7, "index": []}])
def test_an_event_of_another_shape_cuts_the_stream(dialect: Dialect, junk: dict[str, Any]) -> None:
    with pytest.raises(StreamCut, match="cannot be read"):
        fed(dialect, [streams.event(junk)])


def test_several_choices_and_a_null_before_them() -> None:
    first, second = streams.chat(index=0), streams.chat(index=1)
    mixed = [b"data: null\n\n", *(event for pair in zip(second, first, strict=True) for event in pair)]
    made = fed(C, mixed[:-6] + second[-3:-1] + first[-3:-1] + [streams.DONE])
    whole = json.loads(made.result())
    assert [(choice["index"], choice["message"]["content"]) for choice in whole["choices"]] == [
        (0, streams.TEXT),
        (1, streams.TEXT),
    ]
    assert whole["usage"] == streams.USAGE  # as llama-server has it: of the first choice
    assert made.usage == WHOLE + WHOLE


def test_several_prompts_make_a_list_in_order() -> None:
    events = [*streams.native(index=1), *streams.native(index=0)]
    for request in ({"prompt": ["a", "b"]}, {"prompt": "a", "n_cmpl": 2}, {"prompt": [[1, 2], "b"]}):
        made = fed(N, events, request)
        assert [(told["index"], told["content"]) for told in json.loads(made.result())] == [
            (0, streams.TEXT),
            (1, streams.TEXT),
        ]
        assert made.usage == WHOLE + WHOLE
        assert not fed(N, events[:-1], request).finished
    assert fed(N, streams.native(), {"prompt": [1, "b"]}).finished  # tokens and text mixed: one prompt


def test_logprobs_are_joined() -> None:
    tokens = [{"token": "a", "logprob": -1.5}, {"token": "b", "logprob": -0.5}]
    kinds: list[dict[str, list[Any]]] = [{"content": tokens}, {"tokens": ["a", "b"], "top_logprobs": [None, {}]}]
    for content in kinds:
        parts = [{name: [values[at]] for name, values in content.items()} for at in (0, 1)]
        events = [streams.text_chunk(text, logprobs=part) for text, part in zip("ab", parts, strict=True)]
        whole = answer(T, [*events, *streams.completions()[-2:]])
        assert whole["choices"][0]["logprobs"] == content
        assert whole["choices"][0]["text"] == "ab"
    parts = [{"content": [token]} for token in tokens]
    chunks = [
        streams.event({"choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": part}], **streams.AROUND})
        for part in parts
    ]
    assert answer(C, [*chunks, *streams.chat()[-3:]])["choices"][0]["logprobs"] == {"content": tokens}


def test_probabilities_of_the_native_dialect_are_joined() -> None:
    events = [streams.native_token(text, 1, completion_probabilities=[{"token": text}]) for text in "ab"]
    whole = answer(N, [*events, streams.native_final()])
    assert whole["completion_probabilities"] == [{"token": "a"}, {"token": "b"}]


def test_progress_is_no_token() -> None:
    progress = {"total": 22, "cache": 0, "processed": 22, "time_ms": 0}
    begin = streams.native_token("", 0, prompt_progress=progress, timings=streams.TIMINGS)
    assert answer(N, [begin, *streams.native()], {"return_tokens": True})["tokens"][0] == 301
    begin = streams.chat_chunk({"role": "assistant", "content": None}, prompt_progress=progress, timings={"cache_n": 9})
    assert answer(C, [begin, *streams.chat()]) == answer(C, streams.chat())


def test_response_fields_are_applied_to_the_whole() -> None:
    fields = ["content", "timings/cache_n", "nope", "prompt/x", "generation_settings/stop"]
    assert answer(N, streams.native(), {"response_fields": fields}) == {
        "content": streams.TEXT,
        "timings/cache_n": 21,
        "generation_settings/stop": [],
    }


def test_reasoning_tool_calls_and_unknown_fields() -> None:
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "hm"},
        {"reasoning_content": "m"},
        {"content": "I ask."},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "get", "arguments": "{"}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"x":1}'}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "put"}}]},
        {"refusal": "I "},
        {"refusal": "won't", "annotations": [1], "audio": {"id": "z", "data": "ab"}},
        {"annotations": [2], "audio": {"data": "cd"}, "function_call": {"name": "f", "arguments": "{"}},
        {"function_call": {"arguments": "}"}, "flag": True},
    ]
    events = [streams.chat_chunk(delta) for delta in deltas]
    choice = answer(C, [*events, streams.chat_chunk({}, finish="tool_calls", service="x"), streams.DONE])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "I ask.",
        "reasoning_content": "hmm",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "get", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "put", "arguments": ""}},
        ],
        "refusal": "I won't",
        "annotations": [1, 2],
        "audio": {"id": "z", "data": "abcd"},
        "function_call": {"name": "f", "arguments": "{}"},
        "flag": True,
    }


def test_a_tool_call_from_far_away_does_not_fill_the_memory() -> None:
    with pytest.raises(StreamCut):
        fed(C, [streams.chat_chunk({"tool_calls": [{"index": 10**9}]})])


def test_unknown_fields_around_the_choices_are_kept() -> None:
    events = streams.chat()
    first = streams.chat_chunk({"role": "assistant", "content": None}, service_tier="default", usage=None)
    assert answer(C, [first, *events])["service_tier"] == "default"


def test_message_blocks() -> None:
    def named(name: str, **told: Any) -> bytes:
        return streams.event({"type": name, **told}, name)

    start, *_, delta, stop = streams.messages()
    tool = {"type": "tool_use", "id": "t", "name": "get"}
    events = [
        start,
        named("ping"),
        named("content_block_start", index=0, content_block={"type": "thinking", "thinking": ""}),
        named("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
        named("content_block_start", index=2, content_block=tool),
        named("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": '{"a":'}),
        named("content_block_start", index=1, content_block={"type": "text", "text": ""}),
        named("content_block_delta", index=1, delta={"type": "text_delta", "text": "so"}),
        named("content_block_delta", index=2, delta={"type": "input_json_delta", "partial_json": "[1]}"}),
        named("content_block_start", index=3, content_block=tool),
        named("content_block_delta", index=3, delta={"type": "input_json_delta", "partial_json": '{"cut'}),
        named("content_block_start", index=4, content_block=tool),
        named("content_block_start", index=5, content_block={"type": "other", "x": 1}),
        named("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "s"}),
        delta,
        stop,
    ]
    assert answer(M, events)["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "text", "text": "so"},
        {**tool, "input": {"a": [1]}},
        {**tool, "input": {}},
        {**tool, "input": {}},
        {"type": "other", "x": 1},
    ]


def test_a_message_without_its_start() -> None:
    whole = answer(M, streams.messages()[1:], {"model": "demo"})
    assert whole.pop("id").startswith("msg_")
    assert whole == {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "text", "text": streams.TEXT}],
        "model": "demo",
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 0, "output_tokens": streams.GENERATED},
    }


@pytest.mark.parametrize("dialect", GENERATING)
def test_usage_is_the_one_of_head_and_tail(dialect: Dialect) -> None:
    events = streams.STREAMS[dialect]
    data = b"".join(events)
    assert fed(dialect, events).usage == usage_of_stream(dialect, data[:4096], data[-8192:], len(events)) == WHOLE
