"""How an answer to an HTTP client fails: one error frame, then a cut; or nothing at all, if nothing had begun."""

from __future__ import annotations

import json

import pytest

from gateway.errors import BackendError, BackendGone, BackendTimeout, CorralError, QueueTimeout
from gateway.framing import frame
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.splice import LINGER_SECONDS, PING
from tests import streams
from tests.clock_loop import clock, run
from tests.splice_kit import Rig, Seen, chunked, counted, lasting

EVENTS = streams.chat()
WHOLE = b"".join(EVENTS)


def told(rig: Rig) -> dict[str, object]:
    """The error in the last event of the client's stream."""
    last = Seen(rig.client).body.rstrip(b"\n").rpartition(b"\n\n")[2]
    error: dict[str, object] = json.loads(last.partition(b"data: ")[2])["error"]
    return error


@pytest.mark.parametrize("http11", [True, False])
@pytest.mark.parametrize(
    ("fed", "between"), [(EVENTS[:3], b""), ([*EVENTS[:2], EVENTS[2][:20]], b"\n\n")], ids=["between", "inside"]
)
async def test_a_stream_that_is_cut_ends_with_one_error_frame_and_never_cleanly(
    fed: list[bytes], between: bytes, http11: bool
) -> None:
    rig = Rig(chunked=http11)
    rig.say(chunked(*fed, end=b"a\r\nhal"))
    await rig.turn()
    rig.hang_up()
    error = await rig.end()
    assert isinstance(error, BackendGone)
    frame_of_it = Dialect.CHAT.error_frame(error.body())
    seen = Seen(rig.client)
    assert seen.body == b"".join(fed) + between + frame_of_it
    assert rig.client.writes[-1] == (frame(between + frame_of_it) if http11 else between + frame_of_it)
    assert rig.splice.was_cut and rig.client.closing
    assert not (http11 and seen.ended), "a clean end"
    assert told(rig)["code"] == "backend_error"


@pytest.mark.parametrize("dialect", streams.STREAMS, ids=lambda dialect: str(dialect.value))
async def test_a_stream_without_its_terminator_has_failed_in_every_dialect(dialect: Dialect) -> None:
    rig = Rig(dialect)
    events = streams.STREAMS[dialect]
    rig.say(chunked(*events[:-1]))
    error = await rig.end()
    assert isinstance(error, BackendError) and rig.splice.was_cut
    seen = Seen(rig.client)
    assert not seen.ended and seen.body == b"".join(events[:-1]) + dialect.error_frame(error.body())


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("dialect", streams.STREAMS, ids=lambda dialect: str(dialect.value))
async def test_llama_servers_error_frame_becomes_ours(dialect: Dialect, spaced: bool) -> None:
    rig = Rig(dialect)
    events = streams.STREAMS[dialect][:2]
    theirs = streams.error(dialect)
    if spaced:
        theirs = theirs.replace(b'":', b'": ')
    rig.say(chunked(*events, theirs))
    error = await rig.end()
    assert isinstance(error, BackendError) and "Context size has been exceeded." in error.message
    seen = Seen(rig.client)
    assert seen.body == b"".join(events) + dialect.error_frame(error.body())
    assert b"500" not in seen.body and not seen.ended and rig.client.closing


async def test_a_text_that_speaks_of_errors_is_no_error() -> None:
    rig = Rig()
    text = streams.chat_chunk({"content": 'data: {"error":{"code":500}}\n\nevent: error\n'})
    rig.say(chunked(EVENTS[0], text, EVENTS[-1]))
    assert await rig.end() is None
    assert Seen(rig.client).body == EVENTS[0] + text + EVENTS[-1]


async def test_an_error_before_anything_has_gone_out_leaves_the_wire_clean() -> None:
    rig = Rig()
    rig.say(chunked(end=b"5\r\nda"))
    await rig.turn()
    rig.hang_up()
    assert isinstance(await rig.end(), BackendGone)
    assert not rig.splice.begun and not rig.client.writes and not rig.client.closing


async def test_a_second_try_begins_the_answer_anew_also_behind_a_ping() -> None:
    for pinged in (False, True):
        first = Rig()
        first.say(chunked(end=b""))
        if pinged:
            first.splice.ping()
        await first.turn()
        first.hang_up()
        assert first.relaying is not None
        assert isinstance(await first.relaying, BackendGone)
        second = Rig()
        second.splice, second.client = first.splice, first.client
        second.say(counted(*EVENTS))
        assert await second.end() is None
        seen = Seen(second.client)
        assert seen.body == (PING if pinged else b"") + WHOLE and seen.ended
        assert second.client.data.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("error", [QueueTimeout("busy"), BackendTimeout("silent")])
async def test_an_error_behind_a_ping_is_told_inside_the_stream(error: CorralError) -> None:
    rig = Rig()
    rig.splice.ping()
    rig.splice.fail(error)
    assert told(rig)["code"] == error.code
    seen = Seen(rig.client)
    assert (seen.status, seen.ended, rig.client.closing) == (200, False, True)
    rig.reply.cancel()


def test_a_client_that_does_not_read_its_last_bytes_is_cut_in_the_end() -> None:
    async def main() -> None:
        rig = Rig(stream=False)
        rig.say(counted(b"some", kind=b"a/b")[:-1])
        await rig.turn()
        rig.splice.fail(BackendGone("x"))
        assert rig.client.closing and not rig.client.aborted
        assert rig.client.data.endswith(b"som"), "what is no stream gets no frame"
        assert rig.upstream.aborted, "llama-server need not go on"
        await rig.end()
        await clock().advance(LINGER_SECONDS - 0.1)
        assert not rig.client.aborted
        await clock().advance(0.2)
        assert rig.client.aborted

    run(main())


async def test_what_comes_after_a_failure_is_not_passed_on() -> None:
    rig = Rig()
    rig.say(chunked(EVENTS[0], streams.error(Dialect.CHAT), end=b""))
    await rig.turn()
    before = rig.client.data
    rig.say(frame(EVENTS[1]) + b"0\r\n\r\n")
    assert rig.client.data == before and before.endswith(frame(EVENTS[0]))
    assert await rig.end() is rig.splice.failure is not None


@pytest.mark.parametrize("says", [chunked(), chunked(streams.error(Dialect.CHAT)), lasting(), counted()])
async def test_a_stream_that_fails_before_its_first_event_leaves_the_wire_clean(says: bytes) -> None:
    rig = Rig()
    rig.say(says)
    await rig.turn()
    rig.hang_up()
    assert isinstance(await rig.end(), BackendError)
    assert not rig.splice.begun and not rig.client.writes
