"""Answers out of the response cache: looked up before the limits are asked, shared while they are being made, kept.

The order: 1. is this request one whose answer may be cached (`cachekey`)? 2. what would it be answered from now (the
model's files and arguments)? 3. look: exactly, then by meaning; 4. what is found is replayed; 5. else the first of
several that are the same goes to the model, and the others wait for its answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gateway.admission.limits import Claim
from gateway.admission.queue import ByteBudget, Queue
from gateway.errors import ShuttingDown
from gateway.metrics import Metrics
from gateway.models.fingerprint import Stamp
from gateway.models.owner import Owner
from gateway.models.registry import ModelSpec
from gateway.pipeline.account import Record
from gateway.pipeline.cachekey import SILENT, Request, Wish, request_of
from gateway.pipeline.call import Call
from gateway.pipeline.media import Media
from gateway.pipeline.replay import Recording, replay
from gateway.pipeline.splice import Answer
from gateway.settings import Settings
from gateway.stores.cache import Answers, Stored

if TYPE_CHECKING:
    from gateway.pipeline.meaning import Meaning, Sought

MOST_FOLLOWERS = 512  # of one answer that is being made
PATIENCE = 0.5  # of the time that a request may wait: with the rest it goes to the model itself
FINGERPRINT_SECONDS = 0.5  # a disk that does not even tell a file's time is no reason to wait

Go = Callable[[Answer], Awaitable[bool]]


@dataclass(slots=True)
class Counts:
    """Since the start."""

    hits: int = 0
    misses: int = 0
    semantic: int = 0
    shared: int = 0  # those of the hits that waited for an answer that was being made
    stored: int = 0


class Flight:
    """An answer that is being made, and those who wait for it."""

    def __init__(self) -> None:
        self.followers = 0
        # What was made; None: whoever made it left, another one may; False: each has to go for itself.
        self.landed: asyncio.Future[Stored | bool | None] = asyncio.get_running_loop().create_future()

    def land(self, result: Stored | bool | None) -> None:
        if not self.landed.done():
            self.landed.set_result(result)


class ResponseCache:
    def __init__(
        self,
        answers: Answers,
        settings: Settings,
        owners: Callable[[], Mapping[str, Owner]],
        queues: Mapping[str, Queue],
        budget: ByteBudget,
        metrics: Metrics,
    ) -> None:
        self.answers = answers
        self.settings = settings
        self.counts = Counts()
        self.meaning: Meaning | None = None
        self.stamp: Stamp | None = None  # None: the owners' own, by how files lie here
        self.epoch = 0  # an answer that was begun before a `clear` is not kept
        self._owners, self._queues, self._budget = owners, queues, budget
        self._results = {name: metrics.cache_requests.labels(name) for name in ("hit", "miss", "semantic")}
        self._flights: dict[tuple[str, str], Flight] = {}
        # One thread, and one look at a model at a time: a disk that hangs must not take the threads of others.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="looking at models")
        self._looking: dict[str, asyncio.Future[About | None]] = {}

    async def seat(self, call: Call, media: Media, spec: ModelSpec) -> Seat | None:
        """What is found for `call`, or the place to put it; None where its answer may not be cached.

        Waits for a slow disk, a slow Redis, or the embedding model, each for a fraction of a second only.
        """
        request = None if media.remote else request_of(call, media.fields, self.settings)
        if request is None:
            return None
        about = await self._about(spec.id)
        if about is None:
            return None
        queue = self._queues.get(spec.id)
        if queue is not None and queue.closed:
            raise ShuttingDown("the service is shutting down", retry_after=5)
        seat = Seat(self, call, spec.id, about, request)
        await seat.look(call.cache or SILENT)
        return seat

    async def _about(self, model_id: str) -> About | None:
        owner = self._owners().get(model_id)
        if owner is None:
            return None
        looking = self._looking.get(model_id)
        if looking is None:
            looking = asyncio.wrap_future(self._thread.submit(_looked_at, owner, self.stamp))
            self._looking[model_id] = looking
            looking.add_done_callback(lambda _: self._looking.pop(model_id, None))
        await asyncio.wait((looking,), timeout=FINGERPRINT_SECONDS)
        return looking.result() if looking.done() else None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def clear(self) -> int:
        self.epoch += 1
        if self.meaning is not None:
            await self.meaning.clear()
        return await self.answers.clear()

    def stats(self) -> dict[str, Any]:
        counts, meaning = self.counts, self.meaning
        return {
            "enabled": True,
            "store": self.answers.kind,
            "ttl_seconds": self.settings.cache_ttl_seconds,
            "hits": counts.hits,
            "misses": counts.misses,
            "semantic": counts.semantic,
            "shared": counts.shared,
            "stored": counts.stored,
            **self.answers.facts(),
            "embedding": None if meaning is None else meaning.facts(),
        }

    def count(self, result: str) -> None:
        self._results[result].inc()

    def flight(self, key: tuple[str, str]) -> Flight | None:
        return self._flights.get(key)

    def take_off(self, key: tuple[str, str]) -> Flight:
        flight = self._flights[key] = Flight()
        return flight

    def land(self, key: tuple[str, str], flight: Flight, result: Stored | bool | None) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]
        flight.land(result)

    def hold(self, size: int) -> None:
        """Raises QueueFull."""
        self._budget.hold(size)

    def release(self, size: int) -> None:
        self._budget.release(size)


@dataclass(frozen=True, slots=True)
class About:
    """A model as it would be started now. `lies` is compared with what its server was started from, `known_as` stands
    in keys."""

    owner: Owner
    lies: str
    known_as: str

    @property
    def true(self) -> bool:
        """Whether the server that runs is this model as it lies there."""
        return self.owner.started_as == self.lies


class Seat:
    """One request's way through the cache."""

    def __init__(self, cache: ResponseCache, call: Call, model_id: str, about: About, request: Request) -> None:
        self._cache, self._call, self._model_id, self._about = cache, call, model_id, about
        self._request = request
        self.key = request.key(model_id, about.known_as, call.key.id)
        self._flight_key = (self.key, call.priority)  # nobody waits for one who may wait longer
        self.found: Stored | None = None
        self._sought: Sought | None = None
        self._epoch = cache.epoch
        self._how = "hit"

    async def look(self, wish: Wish) -> None:
        cache = self._cache
        if not wish.look:
            return
        self.found = _young(await cache.answers.get(self.key), wish)
        if self.found is None and cache.meaning is not None and cache.flight(self._flight_key) is None:
            about = (self._model_id, self._about.known_as, self._call.key.id)
            self._sought = await cache.meaning.sought(self._request, self._call, about)
            near = None if self._sought is None else await cache.meaning.nearest(self._sought)
            if near is not None:
                self.found = _young(await cache.answers.get(near), wish)
                self._how = "semantic"

    def claim(self, claim: Claim) -> Claim:
        """What is found counts as a request; it takes no tokens."""
        return claim if self.found is None else replace(claim, tpm=0, budget=0, tokens=0)

    async def answered(self, answer: Answer, record: Record, go: Go) -> bool:
        """Bring an answer to `answer`, by `go` where there is none; whether it came from llama-server as a stream."""
        found, wish = self.found, self._call.cache or SILENT
        if found is None and wish.look:  # it may have been kept since
            found = _young(self._cache.answers.at_hand(self.key), wish) or await self._follow()
        if found is not None:
            await self._replay(found, answer, record)
            return False
        self._tell(record, "miss")
        self._cache.counts.misses += 1
        if self._cache.flight(self._flight_key) is not None:
            return await go(answer)  # somebody makes it already, and this one waited for long enough
        return await self._lead(answer, go)

    async def _follow(self) -> Stored | None:
        """What others make meanwhile; None where this one should go itself."""
        cache, call = self._cache, self._call
        loop = asyncio.get_running_loop()
        wait = self._cache.settings.queue_timeout_seconds
        most = wait if call.max_wait is None else min(wait, call.max_wait)
        until = call.received_at + most * PATIENCE
        while (flight := cache.flight(self._flight_key)) is not None and flight.followers < MOST_FOLLOWERS:
            cache.hold(call.size)
            flight.followers += 1
            try:
                await asyncio.wait((flight.landed,), timeout=max(0.0, until - loop.time()))
            finally:
                flight.followers -= 1
                cache.release(call.size)
            if not flight.landed.done():
                return None
            result = flight.landed.result()
            if result is False:
                return None
            if isinstance(result, Stored):
                cache.counts.shared += 1
                return result
        return None

    async def _replay(self, found: Stored, answer: Answer, record: Record) -> None:
        call, cache = self._call, self._cache
        self._tell(record, self._how)
        if self._how == "semantic":
            cache.counts.semantic += 1
        else:
            cache.counts.hits += 1
        call.headers_out.append(("age", str(max(0, int(time.time() - found.made_at)))))
        call.reached = True
        await replay(found, answer, stream=call.stream)

    async def _lead(self, answer: Answer, go: Go) -> bool:
        cache = self._cache
        flight = cache.take_off(self._flight_key)
        recording = Recording(answer, too_large=lambda: cache.land(self._flight_key, flight, False))
        result: Stored | bool | None = False  # a refusal of this one is for the others to hear for themselves
        try:
            streamed = await go(recording)
            body = recording.body
            if body is not None:
                result = Stored(body, recording.content_type, time.time())
        except asyncio.CancelledError:
            result = None
            raise
        finally:
            cache.land(self._flight_key, flight, result)
        if isinstance(result, Stored) and self._about.true and self._epoch == cache.epoch:
            cache.counts.stored += 1
            cache.answers.put(self.key, result)
            if cache.meaning is not None and self._sought is not None:
                cache.meaning.keep(self._sought, self.key)
        return streamed

    def _tell(self, record: Record, result: str) -> None:
        record.cache = result
        self._call.headers_out.append(("x-cache", result))
        self._cache.count(result)


def _looked_at(owner: Owner, stamp: Stamp | None) -> About | None:
    lies = owner.lies_as()
    known_as = lies if stamp is None else owner.lies_as(stamp)
    return About(owner, lies, known_as) if lies is not None and known_as is not None else None


def _young(stored: Stored | None, wish: Wish) -> Stored | None:
    if stored is not None and wish.max_age is not None and time.time() - stored.made_at > wish.max_age:
        return None
    return stored
