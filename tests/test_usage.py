import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pipeline.account import HEAD_BYTES, TAIL_BYTES
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.usage import Usage, ends_of, usage_of_body, usage_of_stream, with_prefill
from tests import streams

C, T, N, R, M = streams.STREAMS
GENERATING = list(streams.STREAMS)
WHOLE = Usage(streams.PROMPT, streams.GENERATED, streams.CACHED)


def of_stream(dialect: Dialect, *events: bytes) -> Usage:
    data = b"".join(events)
    return usage_of_stream(
        dialect, data[:HEAD_BYTES], data[-TAIL_BYTES:], data.count(b"data: {") + data.count(b"data: [DONE]\n")
    )


@pytest.mark.parametrize("dialect", GENERATING)
def test_of_a_whole_stream(dialect: Dialect) -> None:
    assert of_stream(dialect, *streams.STREAMS[dialect]) == WHOLE


@pytest.mark.parametrize("dialect", GENERATING)
def test_of_a_stream_with_other_newlines(dialect: Dialect) -> None:
    assert of_stream(dialect, *(event.replace(b"\n", b"\r\n") for event in streams.STREAMS[dialect])) == WHOLE


def test_of_a_chat_that_has_only_timings() -> None:
    assert of_stream(C, *streams.chat(usage=False)) == WHOLE


def test_partial_events_with_timings_do_not_count() -> None:
    early = {**streams.TIMINGS, "predicted_n": 3}
    chat = [streams.chat_chunk({"content": "x"}, timings=early), *streams.chat(usage=False)]
    assert of_stream(C, *chat) == WHOLE
    assert of_stream(T, streams.text_chunk("x", timings=early), *streams.completions()) == WHOLE
    assert of_stream(N, streams.native_token("x", 3, timings=early), *streams.native()) == WHOLE


@pytest.mark.parametrize("dialect", GENERATING)
@pytest.mark.parametrize("left", [1, 3, 200])
def test_of_a_stream_cut_early_tokens_are_counted(dialect: Dialect, left: int) -> None:
    first = next(at for at, event in enumerate(streams.STREAMS[dialect]) if b"Say " in event)
    events = streams.STREAMS[dialect]
    told = of_stream(dialect, *events[:first], *[events[first]] * left)
    assert told.completion == left
    assert told.prompt == (streams.PROMPT if dialect in (N, M) else 0)


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (b'data: {"x":[],"prompt_progress":{"total":2020,"cache":7,"processed":519,"time_ms":4}}', Usage(519, 3, 7)),
        (b'data: {"prompt_progress":{}}', Usage(0, 3)),
        (b"", Usage(0, 3)),
    ],
)
def test_of_a_stream_cut_early_the_prompt_is_told_by_its_progress(event: bytes, told: Usage) -> None:
    assert with_prefill(Usage(0, 3), event) == told


def test_of_a_stream_that_never_began() -> None:
    for dialect in Dialect:
        assert usage_of_stream(dialect, b"", b"", 0) == Usage()
    assert of_stream(C, streams.chat()[0]) == Usage()
    assert of_stream(R, *streams.responses()[:2]) == Usage()


@pytest.mark.parametrize("usage", [True, False])
def test_several_answers_are_summed(usage: bool) -> None:
    pairs = zip(streams.chat(usage, 1)[:-1], streams.chat(usage, 0)[:-1], strict=True)
    assert of_stream(C, *(event for pair in pairs for event in pair), streams.DONE) == WHOLE + WHOLE
    both = [*streams.completions(1)[:-1], *streams.completions(0)]
    assert of_stream(T, b"data: null\n\n", *both) == WHOLE + WHOLE
    assert of_stream(N, b"data: null\n\n", *streams.native(1), *streams.native(0)) == WHOLE + WHOLE


def test_an_answer_that_ended_before_the_tail_is_counted_by_frames() -> None:
    long = [streams.chat_chunk({"content": "x"}, 1)] * 500
    told = of_stream(C, *streams.chat(False, 0)[:-1], *long, *streams.chat(False, 1)[1:])
    assert abs(told.completion - (500 + 2 * streams.GENERATED)) <= 4


def test_a_tool_call_beside_another_is_no_second_answer() -> None:
    calls = [streams.chat_chunk({"tool_calls": [{"index": 1, "function": {"arguments": "x"}}]})] * 30
    assert of_stream(C, *streams.chat()[:1], *calls, *streams.chat()[1:]) == WHOLE


@pytest.mark.parametrize("length", [3_000, 9_000])
def test_a_final_event_longer_than_the_tail(length: int) -> None:
    trap = 'x "timings":{"cache_n":7,"prompt_n":7,"predicted_n":7} "usage":{"prompt_tokens":7} ' * (length // 80)
    assert of_stream(N, *streams.native(prompt=trap)) == WHOLE
    assert of_stream(R, *streams.responses(trap)) == WHOLE


def test_messages_without_their_start() -> None:
    assert of_stream(M, *streams.messages()[1:]) == Usage(0, streams.GENERATED)


FINAL = json.loads(streams.native_final().removeprefix(b"data: "))


@pytest.mark.parametrize(
    ("dialect", "body", "usage"),
    [
        (C, {"choices": [], "usage": streams.USAGE, "timings": streams.TIMINGS}, WHOLE),
        (T, {"choices": [], "usage": streams.USAGE}, WHOLE),
        (R, {"output": [], "usage": streams.RESPONSES_USAGE}, WHOLE),
        (
            M,
            {
                "content": [{"type": "tool_use", "input": {"usage": {"input_tokens": 9}}}],
                "usage": {"cache_read_input_tokens": 21, "cache_creation_input_tokens": 4, "input_tokens": 1},
            },
            Usage(26, 0, 21),
        ),
        (N, FINAL, WHOLE),
        (N, [FINAL, FINAL], WHOLE + WHOLE),
        (N, {"tokens_predicted": 4, "tokens_evaluated": 5, "tokens_cached": 8}, Usage(5, 4, 0)),
        (N, {"content": "response_fields left it out"}, Usage()),
        (Dialect.EMBEDDINGS, {"usage": {"prompt_tokens": 9, "total_tokens": 9}, "data": []}, Usage(9)),
        (Dialect.RERANK, {"usage": {"prompt_tokens": 12, "total_tokens": 12}, "results": []}, Usage(12)),
        (Dialect.TRANSCRIPTIONS, {"text": "x", "usage": {"input_tokens": 5, "output_tokens": 2}}, Usage(5, 2)),
        (Dialect.COUNT_TOKENS, {"input_tokens": 22}, Usage()),
        (Dialect.TOKENIZE, {"tokens": [1]}, Usage()),
        (C, {"usage": {"prompt_tokens": 10**30, "completion_tokens": 1}}, Usage(0, 1)),
    ],
)
def test_of_a_body(dialect: Dialect, body: Any, usage: Usage) -> None:
    assert usage_of_body(dialect, json.dumps(body, separators=(",", ":")).encode()) == usage


@pytest.mark.parametrize("indent", [None, 1])
def test_of_a_body_in_another_hand(indent: int | None) -> None:
    def written(body: dict[str, Any]) -> bytes:
        return json.dumps(body, indent=indent).encode()

    assert usage_of_body(C, written({"usage": streams.USAGE})) == WHOLE
    assert usage_of_body(N, written({"timings": streams.TIMINGS})) == WHOLE
    assert usage_of_body(N, written({"tokens_evaluated": 5, "tokens_predicted": 4})) == Usage(5, 4)


@pytest.mark.parametrize("final", [streams.chat(usage=False)[-2], streams.native_final()])
def test_of_a_stream_in_another_hand(final: bytes) -> None:
    told = json.dumps(json.loads(final.removeprefix(b"data: ")))
    assert of_stream(C if b"choices" in final else N, b"data: %b\n\n" % told.encode()) == WHOLE


# What lies neither in the head nor in the tail


def caught(dialect: Dialect, answers: int, data: bytes, *, streamed: bool, piece: int = 999) -> Usage | None:
    ends = ends_of(dialect, answers, streamed=streamed)
    assert ends is not None
    for start in range(0, len(data), piece):
        ends.see(data[start : start + piece])
    return ends.total


@pytest.mark.parametrize("piece", [1, 7, 999, 1 << 20])
@pytest.mark.parametrize("dialect", [C, T, N, R])
def test_answers_that_end_far_apart(dialect: Dialect, piece: int) -> None:
    """Beside partial events with timings of their own."""
    one = b"".join(streams.STREAMS[dialect])
    long = streams.chat_chunk({"content": "x"}, 1, timings=streams.TIMINGS) * 100
    data = one + long + one + long
    assert caught(dialect, 2, data, streamed=True, piece=piece) == WHOLE + WHOLE
    assert caught(dialect, 2, data.replace(b"\n", b"\r\n"), streamed=True, piece=piece) == WHOLE + WHOLE
    assert caught(dialect, 3, data, streamed=True, piece=piece) is None, "one has not ended"


def test_answers_that_tell_usage_and_timings() -> None:
    final = streams.chat_chunk({}, 0, "stop", timings=streams.TIMINGS)
    assert caught(C, 2, (final + streams.chat()[-2]) * 2, streamed=True) == WHOLE + WHOLE


@pytest.mark.parametrize("piece", [1, 7, 999, 1 << 20])
def test_timings_in_the_middle_of_a_native_answer(piece: int) -> None:
    body = streams.native_final(completion_probabilities=[{"id": 1, "token": "x"}] * 1000).removeprefix(b"data: ")
    assert caught(N, 1, body, streamed=False, piece=piece) == WHOLE
    assert caught(N, 2, b"[%b,%b]" % (body, body), streamed=False, piece=piece) == WHOLE + WHOLE
    assert caught(N, 1, b'{"content":"x"}', streamed=False, piece=piece) is None


@pytest.mark.parametrize(("dialect", "answers", "streamed"), [(C, 1, True), (C, 2, False), (Dialect.RERANK, 2, True)])
def test_where_nothing_is_to_be_caught(dialect: Dialect, answers: int, streamed: bool) -> None:
    assert ends_of(dialect, answers, streamed=streamed) is None


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from([True, False]), st.lists(st.binary()))
def test_garbage_is_not_caught(streamed: bool, pieces: list[bytes]) -> None:
    ends = ends_of(N, 2, streamed=streamed)
    assert ends is not None
    for piece in pieces:
        ends.see(piece)
    assert ends.total is None


def test_of_the_head_and_tail_of_a_big_body() -> None:
    vectors = b'"data":[' + b"0.1," * 50_000 + b"0]"
    embedding = b'{"usage":{"prompt_tokens":9,"total_tokens":9},' + vectors + b"}"
    assert usage_of_body(Dialect.EMBEDDINGS, embedding[:HEAD_BYTES], embedding[-TAIL_BYTES:]) == Usage(9)
    chat = b"{" + vectors + b',"usage":' + json.dumps(streams.USAGE, separators=(",", ":")).encode() + b"}"
    assert usage_of_body(C, chat[:HEAD_BYTES], chat[-TAIL_BYTES:]) == WHOLE


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from(list(Dialect)), st.binary(), st.binary(), st.integers(0, 100))
def test_garbage_does_no_harm(dialect: Dialect, head: bytes, tail: bytes, frames: int) -> None:
    assert usage_of_stream(dialect, head, tail, frames).completion <= frames
    assert usage_of_body(dialect, head, tail) == Usage()


@settings(deadline=None)  # a busy machine is no failure
@given(st.sampled_from(GENERATING), st.data())
def test_any_piece_of_a_stream_does_no_harm(dialect: Dialect, data: st.DataObject) -> None:
    stream = b"".join(streams.STREAMS[dialect])
    begin, end = sorted((data.draw(st.integers(0, len(stream))), data.draw(st.integers(0, len(stream)))))
    told = usage_of_stream(dialect, stream[:begin], stream[begin:end], 5)
    assert 0 <= told.completion <= streams.GENERATED
    assert 0 <= told.cached <= told.prompt <= streams.PROMPT


@pytest.mark.parametrize(
    "usage", [7, "x", None, {"prompt_tokens": "x"}, {"prompt_tokens": -1}, {"prompt_tokens": True}]
)
def test_of_a_final_object_that_makes_no_sense(usage: Any) -> None:
    assert Usage.of_final({"usage": usage, "timings": []}) == Usage()
