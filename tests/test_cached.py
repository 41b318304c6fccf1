"""Flights through the response cache: who makes an answer, who waits for it, what is kept of it, how it is replayed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from gateway.admission.limits import Claim
from gateway.admission.queue import ByteBudget, Queue
from gateway.connection import Reply
from gateway.errors import BackendError, CorralError, QueueFull, ShuttingDown
from gateway.framing import Framing
from gateway.metrics import Metrics
from gateway.models.owner import Owner
from gateway.models.spec import ModelSpec
from gateway.pipeline.account import Meter, Record
from gateway.pipeline.cache.key import wish_of
from gateway.pipeline.cache.meaning import Meaning, Sought
from gateway.pipeline.cache.replay import PIECE, Replay, replay
from gateway.pipeline.cache.seats import ResponseCache, Seat
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.events import Collected, Events
from gateway.pipeline.media.find import Media
from gateway.pipeline.splice import Answer
from gateway.settings import Settings
from gateway.stores.cache.answers import MOST_ENTRY, AtHand, Stored
from tests.cache_kit import GREEDY, call_of
from tests.house import soon


class Shelf:
    """Answers in memory alone; `slowly` makes every look wait."""

    kind = "shelf"

    def __init__(self) -> None:
        self.held = AtHand(3600)
        self.slowly: asyncio.Event | None = None
        self.looks = 0

    def at_hand(self, key: str) -> Stored | None:
        return self.held.get(key, time.time())

    async def get(self, key: str) -> Stored | None:
        found = self.at_hand(key)
        self.looks += 1
        if self.slowly is not None:
            await self.slowly.wait()
        return found

    def put(self, key: str, stored: Stored) -> None:
        self.held.put(key, stored)

    async def clear(self) -> int:
        self.held.clear()
        return 1

    def facts(self) -> dict[str, int | None]:
        return {}

    async def close(self) -> None: ...


class Model:
    """As much of an Owner as the cache asks for."""

    def __init__(self) -> None:
        self.id = "m"
        self.started_as: str | None = "file 1"
        self.lies: str | None = "file 1"

    def lies_as(self, stamp: object = None) -> str | None:
        return self.lies


class Told:
    """An Answer that keeps what it is given."""

    def __init__(self) -> None:
        self.meter = Meter(time.monotonic)
        self.failure: CorralError | None = None
        self.payload = b""
        self.raw = b""
        self.ended = False
        self.reply: Reply | None = None
        self.paused_after = 0  # pieces; 0: never

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self.reply = reply

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        self.raw += raw
        self.payload += payload
        self.ended = last
        if self.paused_after and self.reply is not None:
            self.paused_after -= 1
            if not self.paused_after:
                self.reply.pause()

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.payload, self.ended = body, True


class House:
    def __init__(self, **settings: Any) -> None:
        self.model, self.shelf = Model(), Shelf()
        self.budget = ByteBudget(10_000)
        self.queues = {"m": Queue(4, 8, self.budget)}
        self.cache = ResponseCache(
            self.shelf,
            Settings(**settings),
            lambda: {"m": cast(Owner, self.model)},
            self.queues,
            self.budget,
            Metrics(),
        )
        self.runs = 0

    async def seat(self, call: Call) -> Seat:
        found = await self.cache.seat(call, Media(fields=call.fields), ModelSpec(id="m"))
        assert found is not None
        return found

    async def ask(self, go: Callable[[Answer], Awaitable[bool]], call: Call | None = None) -> tuple[str | None, bytes]:
        """How it was answered, and with what."""
        call = call or greedy()
        seat, told, record = await self.seat(call), Told(), record_of(call)
        await seat.answered(told, record, go)
        return record.cache, told.payload

    def go(self, body: bytes = b"made", gate: asyncio.Event | None = None) -> Callable[[Answer], Awaitable[bool]]:
        async def go(answer: Answer) -> bool:
            self.runs += 1
            if gate is not None:
                await gate.wait()
            answer.begin(Replay({"content-type": "text/plain"}, Framing.LENGTH))
            answer.feed(body, body, True)
            return False

        return go


def greedy(**fields: Any) -> Call:
    call = call_of({**GREEDY, **fields})
    call.received_at = asyncio.get_running_loop().time()
    return call


def record_of(call: Call) -> Record:
    return Record(0.0, "r", "t", "k", call.route.template, "POST", "http", call.stream)


async def refuse(answer: Answer) -> bool:
    raise BackendError("no")


async def test_made_once_then_replayed() -> None:
    house = House()
    assert await house.ask(house.go()) == ("miss", b"made")
    call = greedy()
    assert await house.ask(house.go(b"another"), call) == ("hit", b"made")
    assert house.runs == 1
    assert call.reached, "it counts as a request"
    assert dict(call.headers_out) == {"x-cache": "hit", "age": "0"}
    assert (house.cache.counts.hits, house.cache.counts.misses, house.cache.counts.stored) == (1, 1, 1)


async def test_a_hit_takes_no_tokens_from_the_limits() -> None:
    house = House()
    claim = Claim("k", rpm=10, tpm=100, concurrency=2, budget=1000, tokens=50)
    assert (await house.seat(greedy())).claim(claim) is claim
    await house.ask(house.go())
    hit = (await house.seat(greedy())).claim(claim)
    assert (hit.caller, hit.rpm, hit.concurrency) == ("k", 10, 2)
    assert (hit.tpm, hit.budget, hit.tokens) == (100, 0, 0), "it is told how many remain"


async def test_those_that_come_meanwhile_share_the_flight() -> None:
    house, gate = House(), asyncio.Event()
    asked = [asyncio.create_task(house.ask(house.go(gate=gate))) for _ in range(5)]
    await soon(lambda: house.budget.held > 0)
    await soon(lambda: house.runs == 1)
    gate.set()
    results = await asyncio.gather(*asked)
    assert sorted(results) == [("hit", b"made")] * 4 + [("miss", b"made")]
    assert house.runs == 1
    assert house.cache.counts.shared == 4
    assert house.budget.held == 0


async def test_whoever_leaves_leaves_the_flight_to_the_next() -> None:
    house, gate = House(), asyncio.Event()
    leader = asyncio.create_task(house.ask(house.go(gate=gate)))
    await soon(lambda: house.runs == 1)
    others = [asyncio.create_task(house.ask(house.go(gate=gate))) for _ in range(3)]
    await soon(lambda: house.budget.held > 0)
    leader.cancel()
    await soon(lambda: house.runs == 2)
    gate.set()
    assert sorted(await asyncio.gather(*others)) == [("hit", b"made")] * 2 + [("miss", b"made")]
    assert house.runs == 2
    assert leader.cancelled()


async def test_a_refusal_is_for_everyone_to_hear() -> None:
    house, gate = House(), asyncio.Event()

    async def fail(answer: Answer) -> bool:
        house.runs += 1
        await gate.wait()
        raise BackendError("no")

    asked = [asyncio.create_task(house.ask(fail)) for _ in range(4)]
    await soon(lambda: house.runs == 1)
    gate.set()
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [BackendError] * 4
    assert house.cache.counts.stored == 0
    assert house.shelf.held.bytes == 0
    assert house.budget.held == 0


async def test_a_follower_waits_no_longer_than_half_of_its_time() -> None:
    house, gate = House(), asyncio.Event()
    leader = asyncio.create_task(house.ask(house.go(gate=gate)))
    await soon(lambda: house.runs == 1)
    call = greedy()
    call.max_wait = 0.1
    began = time.monotonic()
    assert await house.ask(house.go(b"its own"), call) == ("miss", b"its own")
    assert 0.04 < time.monotonic() - began < 1
    gate.set()
    assert await leader == ("miss", b"made")


async def test_nobody_waits_for_one_of_lower_priority() -> None:
    house, gate = House(), asyncio.Event()
    low, high = greedy(), greedy()
    low.priority, high.priority = "low", "high"
    leader = asyncio.create_task(house.ask(house.go(gate=gate), low))
    await soon(lambda: house.runs == 1)
    assert await house.ask(house.go(b"at once"), high) == ("miss", b"at once")
    gate.set()
    await leader


async def test_followers_are_bounded_by_bytes() -> None:
    house, gate = House(), asyncio.Event()
    leader = asyncio.create_task(house.ask(house.go(gate=gate), greedy(x="a" * 4000)))
    await soon(lambda: house.runs == 1)
    waiting = [asyncio.create_task(house.ask(house.go(), greedy(x="a" * 4000))) for _ in range(2)]
    await soon(lambda: house.budget.held > 8000)
    with pytest.raises(QueueFull):
        await house.ask(house.go(), greedy(x="a" * 4000))
    gate.set()
    await asyncio.gather(leader, *waiting)


async def test_who_waits_for_an_answer_that_is_too_large_goes_at_once() -> None:
    house, gate = House(), asyncio.Event()

    async def long(answer: Answer) -> bool:
        house.runs += 1
        answer.begin(Replay({"content-type": "text/plain"}, Framing.LENGTH))
        while house.runs == 1 and not gate.is_set():
            piece = b"x" * (MOST_ENTRY // 8)
            answer.feed(piece, piece, False)
            await asyncio.sleep(0)
        answer.feed(b"", b"", True)
        return False

    leader = asyncio.create_task(house.ask(long))
    await soon(lambda: house.runs == 1)
    assert (await house.ask(house.go(b"mine")))[0] == "miss"
    gate.set()
    await leader
    assert house.runs == 2


async def test_what_has_not_come_to_its_end_is_not_kept() -> None:
    house = House()

    async def cut(answer: Answer) -> bool:
        answer.begin(Replay({}, Framing.LENGTH))
        answer.feed(b"half", b"half", False)
        return False

    assert await house.ask(cut) == ("miss", b"half")
    assert house.cache.counts.stored == 0
    assert (await house.ask(house.go()))[0] == "miss"


async def test_an_answer_that_failed_inside_is_not_kept() -> None:
    house, told = House(), Told()
    call = greedy()
    seat = await house.seat(call)

    async def fails(answer: Answer) -> bool:
        await house.go()(answer)
        told.failure = BackendError("an error event")
        return False

    await seat.answered(told, record_of(call), fails)
    assert house.cache.counts.stored == 0


async def test_what_another_owner_made_is_not_kept() -> None:
    """A reload has put a foreign server in the place of ours, while the request waited."""
    house = House()

    async def go(answer: Answer) -> bool:
        house.model = Model()
        return await house.go()(answer)

    assert (await house.ask(go))[0] == "miss"
    assert house.cache.counts.stored == 0


async def test_a_changed_file_finds_nothing_and_keeps_nothing_until_it_is_loaded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    house = House()
    await house.ask(house.go(b"old"))
    house.model.lies = "file 2"
    assert await house.ask(house.go(b"old server")) == ("miss", b"old server")
    assert await house.ask(house.go(b"old server")) == ("miss", b"old server"), "the server that runs is the old one"
    assert [record.getMessage()[:13] for record in caplog.records] == ["m has changed"], "said once"
    house.model.started_as = "file 2"
    assert await house.ask(house.go(b"new")) == ("miss", b"new")
    assert await house.ask(house.go(b"never")) == ("hit", b"new")
    house.model.lies = house.model.started_as = "file 1"
    assert await house.ask(house.go(b"never")) == ("hit", b"old"), "it is the old one again"


@pytest.mark.parametrize("lies", [None, "file 1"])
async def test_a_model_of_which_nothing_is_known_is_not_cached(lies: str | None) -> None:
    house = House()
    house.model.lies = lies
    call = greedy()
    assert (await house.cache.seat(call, Media(fields=call.fields), ModelSpec(id="m")) is None) is (lies is None)


async def test_a_clear_is_not_undone_by_what_is_being_made() -> None:
    house, gate = House(), asyncio.Event()
    leader = asyncio.create_task(house.ask(house.go(gate=gate)))
    await soon(lambda: house.runs == 1)
    assert await house.cache.clear() == 1
    gate.set()
    await leader
    assert house.cache.counts.stored == 0
    assert (await house.ask(house.go()))[0] == "miss"


async def test_what_was_kept_while_it_looked_is_found() -> None:
    """A slow look that came back empty does not send the request to the model, if the answer is there by then."""
    house = House()
    key = await _key(house)
    house.shelf.slowly, house.shelf.looks = asyncio.Event(), 0
    late = asyncio.create_task(house.ask(house.go()))
    await soon(lambda: house.shelf.looks)  # and finds nothing
    house.shelf.put(key, Stored(b"meanwhile", "text/plain", time.time()))
    house.shelf.slowly.set()
    assert await late == ("hit", b"meanwhile")
    assert house.runs == 0


async def _key(house: House) -> str:
    return (await house.seat(greedy())).key


async def test_no_cache_makes_it_anew_and_keeps_it() -> None:
    house = House()
    await house.ask(house.go(b"old"))
    call = greedy()
    call.cache = wish_of("no-cache")
    assert await house.ask(house.go(b"new"), call) == ("miss", b"new")
    assert await house.ask(house.go(b"never")) == ("hit", b"new")


async def test_max_age() -> None:
    house = House()
    house.shelf.put(await _key(house), Stored(b"old", "text/plain", time.time() - 100))
    young, old = greedy(), greedy()
    young.cache, old.cache = wish_of("max-age=50"), wish_of("max-age=200")
    assert await house.ask(house.go(b"never"), old) == ("hit", b"old")
    assert await house.ask(house.go(b"new"), young) == ("miss", b"new")


async def test_a_service_that_ends_answers_nothing_out_of_the_cache() -> None:
    house = House()
    await house.ask(house.go())
    house.queues["m"].close()
    with pytest.raises(ShuttingDown):
        await house.seat(greedy())


async def test_a_disk_that_hangs_is_looked_at_by_one_thread_and_waited_for_no_longer_than_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.pipeline.cache.seats.FINGERPRINT_SECONDS", 0.05)
    house, hangs, looks = House(), threading.Event(), 0

    def hung(stamp: object = None) -> str:
        nonlocal looks
        looks += 1
        hangs.wait(5)
        return "file 1"

    house.model.lies_as = hung  # type: ignore[method-assign]
    calls = [greedy() for _ in range(20)]
    try:
        seats = await asyncio.gather(
            *(house.cache.seat(call, Media(fields=call.fields), ModelSpec(id="m")) for call in calls)
        )
        assert seats == [None] * 20, "they go their way without the cache"
        assert looks == 1
    finally:
        hangs.set()
        house.cache.close()


async def test_doors_of_other_formats_replay_too() -> None:
    """All at once, and event by event."""
    whole, events = Collected(Meter(time.monotonic)), Events(Dialect.CHAT, Meter(time.monotonic))
    await replay(Stored(b'{"a":1}', "application/json", 0.0), whole, stream=False)
    assert (whole.body, whole.content_type) == (b'{"a":1}', "application/json")
    stream = b"".join(b'data: {"number":%d}\n\n' % number for number in range(3 * PIECE // 16)) + b"data: [DONE]\n\n"
    playing = asyncio.create_task(replay(Stored(stream, "text/event-stream", 0.0), events, stream=True))
    playing.add_done_callback(lambda _: events.end(None))
    taken = [frame.data async for frame in events]
    assert taken[-1] == b"[DONE]"
    assert len(taken) == 3 * PIECE // 16 + 1, "they were taken as fast as they came, and none was lost"


class Alike:
    """As much of a Meaning as the cache asks for: everything means the same as `key`."""

    def __init__(self, key: str) -> None:
        self.key: str | None = key
        self.asked = 0
        self.kept: list[str] = []
        self.gate = asyncio.Event()

    async def sought(self, request: object, call: Call, about: object) -> Sought:
        self.asked += 1
        await self.gate.wait()
        return Sought("text", "kin", None)

    async def nearest(self, sought: Sought) -> str | None:
        return self.key

    def keep(self, sought: Sought, key: str) -> None:
        self.kept.append(key)


async def test_what_means_the_same_is_looked_for_once_by_those_that_are_the_same() -> None:
    house = House()
    house.shelf.put("near", Stored(b"near", "text/plain", time.time()))
    alike = Alike("near")
    house.cache.meaning = cast(Meaning, alike)
    asked = [asyncio.create_task(house.ask(house.go())) for _ in range(3)]
    await soon(lambda: house.budget.held > 0)
    alike.gate.set()
    assert await asyncio.gather(*asked) == [("semantic", b"near")] * 3
    assert (alike.asked, house.runs) == (1, 0)
    alike.key = "gone"
    assert await house.ask(house.go()) == ("miss", b"made")
    assert len(alike.kept) == 1
    call = greedy()
    await house.seat(call)
    assert alike.asked == 2, "what is known exactly is not looked for, and nothing is before the limits were asked"


async def test_a_replay_stops_for_a_slow_client() -> None:
    told = Told()
    told.paused_after = 2
    body = bytes(range(256)) * (PIECE // 64)
    playing = asyncio.create_task(replay(Stored(body, "text/event-stream", 0.0), told, stream=True))
    await soon(lambda: told.paused_after == 0)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(told.payload) == 2 * PIECE
    assert told.reply is not None
    told.reply.resume()
    await playing
    assert told.payload == body
    assert told.ended
    assert told.reply.framing is Framing.CHUNKED


async def test_a_replay_that_is_left_ends() -> None:
    told = Told()
    told.paused_after = 1
    playing = asyncio.create_task(replay(Stored(b"x" * PIECE * 3, "a/b", 0.0), told, stream=False))
    await soon(lambda: told.paused_after == 0)
    playing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await playing
    assert not told.ended
