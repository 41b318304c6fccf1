"""However a stream's bytes are cut, framed and interrupted, the client sees exactly its payload, or its failure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import CorralError
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.splice import PING
from tests import streams
from tests.splice_kit import SSE, Rig, Seen, chunked, chunks, counted, cut, lasting

PROGRESS = streams.chat_chunk({"content": None}, prompt_progress={"total": 9, "processed": 5})


@dataclass(frozen=True)
class Case:
    """One stream on its way. `stop` is where llama-server ends it, None its own end; `pings` are counted in pieces."""

    dialect: Dialect = Dialect.CHAT
    form: str = "chunked"
    sizes: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()
    progress: int = 0
    error_at: int | None = None
    stop: int | None = None
    http11: bool = True
    pings: frozenset[int] = frozenset()

    @property
    def events(self) -> list[bytes]:
        events = streams.STREAMS[self.dialect]
        if self.error_at is None:
            return events
        return [*events[: self.error_at % len(events)], streams.error(self.dialect)]

    def bytes(self) -> bytes:
        payload = PROGRESS * self.progress + b"".join(self.events)
        if self.form == "length":
            return counted(payload)
        if self.form == "close":
            return lasting(payload)
        if self.form == "a chunk each":
            return chunked(*[PROGRESS] * self.progress, *self.events)
        body = chunks(payload, list(self.sizes))
        return SSE + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"0\r\nX-Trailer: y\r\n\r\n"


cases = st.builds(
    Case,
    dialect=st.sampled_from(list(streams.STREAMS)),
    form=st.sampled_from(["chunked", "a chunk each", "length", "close"]),
    sizes=st.lists(st.integers(1, 300), max_size=8).map(tuple),
    cuts=st.lists(st.integers(0, 10_000), max_size=12).map(tuple),
    progress=st.integers(0, 2),
    error_at=st.none() | st.none() | st.integers(0, 20),
    stop=st.none() | st.none() | st.integers(0, 10_000),
    http11=st.booleans(),
    pings=st.frozensets(st.integers(0, 12), max_size=5),
)


async def play(case: Case) -> tuple[Rig, CorralError | None]:
    rig = Rig(case.dialect, chunked=case.http11)
    rig.skip_progress = bool(case.progress)
    data = case.bytes()
    if case.stop is not None:  # not in the head: that is another matter
        begin = data.index(b"\r\n\r\n") + 4
        data = data[: begin + case.stop % (len(data) - begin)]
    for number, piece in enumerate(cut(data, list(case.cuts))):
        if number in case.pings:
            rig.splice.ping()
        rig.say(piece)
        await rig.turn()
        if rig.client.writes and case.http11:
            Seen(rig.client)  # whole chunks at every moment
    rig.hang_up()
    error = await rig.end()
    assert len(asyncio.all_tasks()) == 1
    return rig, error


async def check(case: Case) -> None:
    rig, error = await play(case)
    right = b"".join(case.events)
    if not rig.splice.begun:
        assert error is not None and not rig.client.writes
        return
    seen = Seen(rig.client)
    body = seen.body.replace(PING, b"")
    if error is None:
        assert case.error_at is None and rig.splice.finished and not rig.splice.was_cut
        assert seen.ended or not case.http11
        assert body == right
        assert seen.body.count(PING) <= len(case.pings)
        assert not [at for at in places(seen.body) if seen.body[at - 2 : at] != b"\n\n" and at]
        return
    assert rig.splice.was_cut and rig.client.closing
    if "content-length" in seen.headers:
        assert right.startswith(body)
        # An error event that comes in two pieces is not recognised: then the body may be whole, and yet has failed.
        assert len(body) < int(seen.headers["content-length"]) or case.error_at is not None
        return
    frame = case.dialect.error_frame(error.body())
    assert body.endswith(frame) and not (case.http11 and seen.ended)
    before = body.removesuffix(frame)
    assert before.endswith(b"\n\n") or not before
    started = before.removesuffix(b"\n\n")
    assert right.startswith((before, started)) or PROGRESS.startswith(started)
    if case.error_at is not None and case.stop is None and case.form == "a chunk each":
        assert before == b"".join(case.events[:-1]), "what came before the error is the client's"
        assert str(streams.ERROR["message"]) in error.message


def places(body: bytes) -> list[int]:
    """Where the pings stand."""
    found, at = [], body.find(PING)
    while at >= 0:
        found.append(at)
        at = body.find(PING, at + 1)
    return found


@settings(max_examples=250)
@given(cases)
@example(Case(Dialect.RESPONSES, "length", cuts=(4090,), error_at=1, http11=False))
@example(Case())
@example(Case(form="length", pings=frozenset({0}), cuts=(500,)))
@example(Case(form="a chunk each", error_at=3, cuts=(700,)))
@example(Case(form="close", stop=300, cuts=(200,), http11=False))
def test_any_stream_however_it_comes(case: Case) -> None:
    asyncio.run(check(case))


@pytest.mark.parametrize("progress", [0, 1])
@pytest.mark.parametrize("form", ["chunked", "length", "close"])
async def test_one_cut_at_every_boundary(form: str, progress: int) -> None:
    whole = Case(Dialect.NATIVE, form, (100, 1, 77, 300), progress=progress)
    for place in range(len(whole.bytes())):
        await check(Case(Dialect.NATIVE, form, (100, 1, 77, 300), (place,), progress, pings=frozenset({0, 1})))


@pytest.mark.parametrize("form", ["chunked", "a chunk each", "close"])
async def test_an_end_at_every_byte_is_never_a_clean_one(form: str) -> None:
    size = len(Case(form=form).bytes().partition(b"\r\n\r\n")[2])
    for stop in range(size - 2 if form == "close" else size):  # without its last line end the terminator still counts
        rig, error = await play(Case(form=form, stop=stop, cuts=(150,)))
        assert error is not None, stop
        assert not rig.splice.begun or not Seen(rig.client).ended, stop
