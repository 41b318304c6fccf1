import json
from typing import Any

import pytest

from gateway.errors import BackendError, InvalidKey
from gateway.pipeline.account import TAIL_BYTES
from gateway.pipeline.dialects import Dialect, error_in
from gateway.pipeline.routes import ROUTES
from tests import streams

GENERATING = list(streams.STREAMS)
C, T, N, R, M = GENERATING


def tail(data: bytes) -> bytes:
    return data[-TAIL_BYTES:]


@pytest.mark.parametrize("dialect", GENERATING)
def test_only_a_whole_stream_ended_well(dialect: Dialect) -> None:
    stream = b"".join(streams.STREAMS[dialect])
    assert dialect.ended_well(tail(stream))
    assert dialect.ended_well(tail(stream + b"\n"))
    assert dialect.ended_well(tail(stream.replace(b"\n", b"\r\n")))
    for length in range(len(stream.rstrip(b"\n"))):
        assert not dialect.ended_well(tail(stream[:length])), stream[:length][-60:]


@pytest.mark.parametrize("dialect", GENERATING)
def test_an_error_is_no_good_end(dialect: Dialect) -> None:
    for events in ([], streams.STREAMS[dialect][:-3], streams.STREAMS[dialect]):
        stream = b"".join([*events, streams.error(dialect)])
        assert error_in(tail(stream)) == streams.ERROR
        assert not dialect.ended_well(tail(stream))
        assert not dialect.ended_well(tail(stream + streams.DONE))  # as other servers do
    assert error_in(tail(b"".join(streams.STREAMS[dialect]))) is None


@pytest.mark.parametrize("dialect", GENERATING)
@pytest.mark.parametrize("error", [BackendError("it died"), InvalidKey('no "such" key')])
def test_our_own_error_frames_are_known_too(dialect: Dialect, error: BackendError) -> None:
    frame = dialect.error_frame(error.body())
    assert frame.endswith(b"\n\n")
    told = error_in(b"".join(streams.STREAMS[dialect][:2]) + frame)
    assert told is not None
    assert told["message"] == error.message


def test_error_frames() -> None:
    body = BackendError("it died").body()
    assert C.error_frame(body) == T.error_frame(body) == N.error_frame(body)
    assert json.loads(C.error_frame(body).removeprefix(b"data: ")) == body
    assert M.error_frame(body) == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"it died"}}\n\n'
    )
    assert R.error_frame(body) == (
        b'event: error\ndata: {"type":"error","code":"backend_error","message":"it died","param":null,'
        b'"sequence_number":0}\n\n'
    )


def test_an_error_that_cannot_be_read_is_still_one() -> None:
    for line in (b'data: {"error":{"mess', b'data: {"error":7}\n\n', b"event: error\ndata: \n\n", b"event: error"):
        assert error_in(line) is not None
        assert not C.ended_well(line)


@pytest.mark.parametrize("length", [9_000, 100_000])
def test_a_final_event_longer_than_the_tail(length: int) -> None:
    trap = 'x "stop_type":"" "usage":{ "message_stop" \n\n' * (length // 40)
    for stream, dialect in ((streams.native(prompt=trap), N), (streams.responses(trap), R)):
        assert dialect.ended_well(tail(b"".join(stream)))
        assert not dialect.ended_well(tail(b"".join(stream)[:-400]))
        assert not dialect.ended_well(tail(b"".join(stream[:-1])))


def test_an_event_that_looks_like_the_last_one_is_not() -> None:
    text = json.dumps({"index": 0, "content": '"stop":true', "tokens": [], "stop": False}).encode()
    assert not N.ended_well(b"data: " + text + b"\n\n")
    assert not M.ended_well(streams.event({"type": "content_block_delta", "delta": {"text": '"message_stop"'}}))


def test_what_does_not_generate_always_ends_well() -> None:
    quiet = [dialect for dialect in Dialect if not dialect.generates]
    assert len(quiet) == 7
    assert all(dialect.ended_well(b"[]") and not dialect.assembles({}) for dialect in quiet)


def test_every_dialect_has_a_route() -> None:
    assert {route.dialect for route in ROUTES.values()} == set(Dialect)


def test_asking_for_a_stream() -> None:
    request = {"prompt": "x", "stream": False, "response_fields": ["content"], "stream_options": {"a": 1}}
    for dialect in (C, T):
        asked = dialect.ask_stream(request)
        assert asked == {**request, "stream": True, "stream_options": {"a": 1, "include_usage": True}}
    assert N.ask_stream(request) == {"prompt": "x", "stream": True, "stream_options": {"a": 1}}
    assert R.ask_stream({"input": "x"}) == M.ask_stream({"input": "x"}) == {"input": "x", "stream": True}
    assert request["stream"] is False


@pytest.mark.parametrize(
    ("dialect", "request_", "assembles"),
    [
        (C, {"messages": [{"role": "user"}]}, True),
        (C, {"messages": [{"role": "user"}, {"role": "assistant", "content": "Sure"}]}, False),
        (M, {"messages": [{"role": "assistant", "content": "Sure"}]}, False),
        (R, {"input": [{"role": "assistant", "content": []}]}, False),
        (R, {"input": "hello"}, True),
        (C, {"messages": [], "logprobs": True}, False),
        (C, {"messages": [], "n_probs": 2}, False),
        (T, {"logprobs": 2}, True),
        (T, {"logprobs": 2, "stop": ["x"]}, False),
        (N, {"n_probs": 2, "stop": []}, True),
        (N, {"n_probs": 2, "stop": "x"}, False),
        (N, {"return_tokens": True}, False),
        (C, {"messages": "nonsense", "stop": 7}, True),
        (C, {"messages": [7]}, True),
    ],
)
def test_what_can_be_assembled(dialect: Dialect, request_: dict[str, Any], assembles: bool) -> None:
    assert dialect.assembles(request_) is assembles
