"""Events of /v1/responses get the places that OpenAI's clients look for, however their bytes come."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.backend import Backend
from gateway.connection import Connection, Reply
from gateway.errors import BackendError
from gateway.pipeline.account import Meter
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.numbering import NumberedSplice, Numbering
from tests import streams
from tests.splice_kit import Seen, Wire, chunked, head

STREAM = b"".join(streams.STREAMS[Dialect.RESPONSES])


def events(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in data.splitlines() if line.startswith(b"data: ")]


def named(name: str, **told: Any) -> bytes:
    return streams.event({"type": name, **told}, name)


@pytest.mark.parametrize("size", [1, 7, 1000, len(STREAM)])
def test_every_event_has_its_number_however_the_bytes_come(size: int) -> None:
    numbering = Numbering()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    out = b"".join(numbering.pass_on(piece, at == len(pieces)) for at, piece in enumerate(pieces, 1))
    told = events(out)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    plain = events(STREAM)
    assert len(told) == len(plain)
    for event, before in zip(told, plain, strict=True):
        more = event.keys() - before.keys()
        assert more <= {"sequence_number", "output_index", "content_index", "logprobs"}
        if "response" not in before:
            assert {name: event[name] for name in before} == before
    assert Dialect.RESPONSES.ended_well(out[-8192:])


def test_only_whole_events_go_out() -> None:
    numbering = Numbering()
    for at in range(len(STREAM) - 1):
        out = numbering.pass_on(STREAM[at : at + 1], False)
        assert out == b"" or out.endswith(b"\n\n")


def test_items_and_parts_have_their_places() -> None:
    """A thought, a message and a call, whose ends come in another order than their beginnings."""
    stream = [
        named("response.created", response={"id": "r"}),
        named("response.output_item.added", item={"id": "rs", "type": "reasoning"}),
        named("response.reasoning_text.delta", item_id="rs", delta="a"),
        named("response.output_item.added", item={"id": "msg", "type": "message"}),
        named("response.content_part.added", item_id="msg", part={}),
        named("response.output_text.delta", item_id="msg", delta="b"),
        named("response.output_item.added", item={"call_id": "fc", "type": "function_call"}),
        named("response.function_call_arguments.delta", item_id="fc", delta="{"),
        named("response.output_item.done", item={"id": "rs", "type": "reasoning"}),
        named("response.output_text.done", item_id="msg", text="b"),
        named("response.content_part.done", item_id="msg", part={}),
        named("response.output_item.done", item={"id": "msg", "type": "message"}),
        named("response.output_item.done", item={"call_id": "fc", "type": "function_call"}),
        named("response.completed", response={"id": "r", "output": [1]}),
    ]
    told = events(Numbering().pass_on(b"".join(stream), True))
    assert [event.get("output_index") for event in told] == [None, 0, 0, 1, 1, 1, 2, 2, 0, 1, 1, 1, 2, None]
    assert [event.get("content_index") for event in told] == [None, None, 0, None, 0, 0, *[None] * 3, 0, 0, *[None] * 3]
    assert told[0]["response"] == {"output": [], "id": "r"}
    assert told[-1]["response"] == {"id": "r", "output": [1]}


def test_what_is_there_is_not_put_in_again() -> None:
    numbered = Numbering().pass_on(STREAM, True)
    assert Numbering().pass_on(numbered, True) == numbered


@pytest.mark.parametrize(
    "data",
    [
        b": ping\n\n",
        b'event: error\ndata: {"code":500,"message":"x"}\n\n',
        b'data: {"type":"response.created"}\n\n',
        STREAM.replace(b"\n", b"\r\n"),
        b'event: response.output_item.added\ndata: {"item":7}\n\n',
    ],
)
def test_what_it_does_not_know_passes(data: bytes) -> None:
    out = Numbering().pass_on(data, True)
    assert out == data or b'"output_index":0' in out


def test_a_text_that_looks_like_an_event_is_none() -> None:
    trap = 'event: response.created\ndata: {"sequence_number":9,"item_id":"x"'
    (told,) = events(Numbering().pass_on(named("response.output_text.delta", item_id="m", delta=trap), True))
    assert (told["sequence_number"], told["delta"]) == (0, trap)


def test_our_own_error_has_the_next_place() -> None:
    numbering = Numbering()
    numbering.pass_on(STREAM, False)
    (told,) = events(numbering.error(Dialect.RESPONSES.error_frame(BackendError("it died").body())))
    assert told["sequence_number"] == len(events(STREAM))


@pytest.mark.parametrize("how", ["cut", "error"])
async def test_a_stream_that_breaks_says_so_with_the_next_number(how: str) -> None:
    wire, begun = Wire(), streams.STREAMS[Dialect.RESPONSES][:5]
    meter = Meter(asyncio.get_running_loop().time)
    splice = NumberedSplice(wire, head, Dialect.RESPONSES, meter, stream=True, chunked=True)
    connection = Connection(Backend("http://127.0.0.1:1"))
    connection.connection_made(Wire())
    asked: asyncio.Future[Reply] = connection.send("POST", b"POST", b"{}")
    broken = [] if how == "cut" else [streams.error(Dialect.RESPONSES)]
    connection.data_received(chunked(*begun, *broken))
    reply = await asked
    splice.begin(reply)
    await reply.relay(splice)
    assert splice.failure is not None
    splice.fail(splice.failure)
    seen = Seen(wire)
    *told, last = events(seen.body)
    assert not seen.ended
    assert len(told) == len(begun)
    assert (last["type"], last["code"], last["sequence_number"]) == ("error", "backend_error", len(begun))
