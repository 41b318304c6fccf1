"""An answer's way to an HTTP client, case by case: what stands on the wire, and in which writes."""

from __future__ import annotations

import itertools

import pytest

from gateway.errors import BackendGone
from gateway.framing import frame
from gateway.pipeline.splice import PING, Pinger
from tests import streams
from tests.clock_loop import run
from tests.splice_kit import Rig, Seen, chunked, counted, lasting

EVENTS = streams.chat()
WHOLE = b"".join(EVENTS)


async def test_the_head_and_the_first_bytes_leave_in_one_write() -> None:
    rig = Rig()
    answer = chunked(*EVENTS)
    begin = answer.index(b"\r\n\r\n") + 4
    rig.say(answer[:begin])
    await rig.turn()
    assert not rig.splice.begun and not rig.client.writes, "a head alone commits to nothing"
    rig.say(answer[begin : begin + 10])
    assert not rig.client.writes, "half a chunk"
    rig.say(answer[begin + 10 :])
    assert await rig.end() is None
    assert len(rig.client.writes) == 1 and rig.client.writes[0].startswith(b"HTTP/1.1 200")
    seen = Seen(rig.client)
    assert (seen.body, seen.ended) == (WHOLE, True)
    assert seen.raw + b"" == answer[begin:], "the chunks go on as they came"
    assert not rig.splice.was_cut and not rig.client.closing
    assert seen.headers == {
        "content-type": "text/event-stream",
        "transfer-encoding": "chunked",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }


async def test_an_answer_of_known_length_keeps_it() -> None:
    rig = Rig(stream=False)
    rig.say(counted(b'{"a":1}', kind=b"application/json"))
    assert await rig.end() is None
    seen = Seen(rig.client)
    assert seen.headers == {"content-type": "application/json", "content-length": "7"}
    assert (seen.body, len(rig.client.writes)) == (b'{"a":1}', 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_whole_answer(stream: bool) -> None:
    rig = Rig(stream=stream)
    rig.splice.whole(200, "application/json", b"{}")
    assert rig.client.writes == [b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"]
    assert rig.splice.begun and rig.splice.finished
    rig.splice.ping()
    assert len(rig.client.writes) == 1


@pytest.mark.parametrize(
    "says", [chunked(*EVENTS), lasting(*EVENTS), counted(*EVENTS)], ids=["chunked", "close", "length"]
)
async def test_an_http_1_0_client_gets_the_payload_without_chunks(says: bytes) -> None:
    rig = Rig(chunked=False)
    rig.say(says)
    rig.hang_up()
    assert await rig.end() is None
    seen = Seen(rig.client)
    assert "transfer-encoding" not in seen.headers and seen.body == WHOLE
    assert rig.splice.finished and not rig.splice.was_cut


async def test_a_body_that_ends_with_its_connection_is_framed_anew() -> None:
    rig = Rig()
    head, body = lasting(*EVENTS).split(b"\r\n\r\n", 1)
    rig.say(head + b"\r\n\r\n", body[:100], body[100:])
    await rig.turn()
    assert not rig.splice.finished
    rig.hang_up()
    assert await rig.end() is None
    seen = Seen(rig.client)
    assert (seen.body, seen.ended) == (WHOLE, True)


# --- pings


async def test_a_ping_before_the_answer_commits_a_head_and_the_answer_goes_on_behind_it() -> None:
    for says in (chunked(*EVENTS), lasting(*EVENTS), counted(*EVENTS)):
        rig = Rig()
        rig.splice.ping()
        rig.splice.ping()
        assert rig.splice.begun and rig.client.writes[0].endswith(b"\r\n\r\n" + frame(PING))
        rig.say(says)
        rig.hang_up()
        assert await rig.end() is None
        seen = Seen(rig.client)
        assert (seen.status, seen.body, seen.ended) == (200, PING * 2 + WHOLE, True)
        assert rig.client.data.count(b"HTTP/1.1") == 1


async def test_a_ping_between_the_head_and_the_first_event() -> None:
    rig = Rig()
    rig.say(chunked(end=b""))
    rig.splice.ping()
    rig.say(chunked(*EVENTS).split(b"\r\n\r\n", 1)[1])
    assert await rig.end() is None
    assert Seen(rig.client).body == PING + WHOLE


async def test_a_ping_for_an_http_1_0_client_is_not_framed() -> None:
    rig = Rig(chunked=False)
    rig.splice.ping()
    rig.say(chunked(*EVENTS))
    assert await rig.end() is None
    assert Seen(rig.client).body == PING + WHOLE


@pytest.mark.parametrize(
    ("before", "goes"),
    [(b"data: a\n\n", True), (b"data: a\n", False), (b"data: a", False), (b"data: a\n\ndata", False),
     (b"data: a\r\n\r\n", True), (b": c\n\n", True)],
)  # fmt: skip
async def test_a_ping_never_stands_inside_an_event(before: bytes, goes: bool) -> None:
    rig = Rig()
    rig.say(chunked(before, end=b""))
    await rig.turn()
    rig.splice.ping()
    assert rig.client.data.endswith(frame(PING)) is goes
    rig.hang_up()
    await rig.end()


async def test_no_ping_goes_into_a_body_of_known_length_or_to_one_who_left() -> None:
    rig = Rig()
    answer = counted(*EVENTS)
    rig.say(answer[: answer.index(EVENTS[1])])
    await rig.turn()
    before = rig.client.data
    assert before.endswith(b"\n\n")
    rig.splice.ping()
    assert rig.client.data == before
    rig.hang_up()
    assert isinstance(await rig.end(), BackendGone)
    assert rig.client.data == before and rig.client.closing, "nor an error frame, which would be data"
    gone = Rig()
    gone.client.close()
    gone.splice.ping()
    assert not gone.client.writes


@pytest.mark.parametrize("interval", [0.2, 0.4, 0.7, 1.0, 3.0])
def test_pings_of_a_short_interval_come_as_soon_as_the_tick_allows(interval: float) -> None:
    tick = 0.25

    async def main() -> None:
        silent = Rig()
        pinger = Pinger(interval)
        pinger.add(silent.splice)
        pinged: list[float] = []
        for number in range(100):
            before = len(silent.client.writes)
            pinger.tick(number * tick)
            pinged += [number * tick] * (len(silent.client.writes) - before)
        gaps = [later - earlier for earlier, later in itertools.pairwise(pinged)]
        assert len(gaps) >= 5
        assert all(interval - tick / 2 <= gap <= 1.25 * interval + 2 * tick for gap in gaps), gaps

    run(main())


def test_pings_come_after_an_interval_of_silence_and_one_timer_serves_all() -> None:
    async def main() -> None:
        busy, silent, off = Rig(), Rig(), Rig()
        pinger = Pinger(10)
        for rig in (busy, silent):
            pinger.add(rig.splice)
        Pinger(0).add(off.splice)
        pinged: list[float] = []
        busy.say(chunked(end=b""))
        for quarter in range(400):
            now = quarter / 4
            if quarter % 30 == 0:
                busy.say(frame(EVENTS[1]))
                await busy.turn()
            before = len(silent.client.writes)
            pinger.tick(now)
            pinged += [now] * (len(silent.client.writes) - before)
        gaps = [later - earlier for earlier, later in zip([0.0, *pinged], pinged, strict=False)]
        assert len(pinged) >= 8 and all(10 <= gap <= 12.5 for gap in gaps)
        assert PING not in busy.client.data and not off.client.writes
        pinger.discard(silent.splice)
        before = len(silent.client.writes)
        for now in range(200, 300):
            pinger.tick(now)
        assert len(silent.client.writes) == before
        busy.hang_up()
        await busy.end()

    run(main())


# --- a slow client, and what only the gateway asked for


async def test_a_slow_client_pauses_llama_server() -> None:
    rig = Rig()
    rig.splice.pause_writing()  # before there is an answer
    rig.say(chunked(EVENTS[0], end=b""))
    await rig.turn()
    assert rig.upstream.paused
    rig.splice.resume_writing()
    assert not rig.upstream.paused
    rig.say(frame(EVENTS[1]))
    assert not rig.upstream.paused
    rig.splice.pause_writing()
    assert rig.upstream.paused
    rig.say(frame(EVENTS[2]))  # was on its way already
    rig.splice.resume_writing()
    rig.say(chunked(*EVENTS[3:]).split(b"\r\n\r\n", 1)[1])
    assert await rig.end() is None
    assert Seen(rig.client).body == WHOLE


PROGRESS = streams.chat_chunk({"role": "assistant", "content": None}, prompt_progress={"total": 9, "processed": 5})


async def test_progress_that_the_client_did_not_ask_for_is_taken_out() -> None:
    rig = Rig()
    rig.skip_progress = True
    answer = chunked(PROGRESS, PROGRESS, *EVENTS)
    at = answer.index(frame(EVENTS[0]))
    rig.say(answer[:at])
    await rig.turn()
    assert not rig.client.writes, "it commits to nothing"
    rig.say(answer[at:])
    assert await rig.end() is None
    assert Seen(rig.client).body == WHOLE
