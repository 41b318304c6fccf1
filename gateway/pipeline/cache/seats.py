"""Answers out of the response cache: looked up before the limits are asked, shared while they are being made, kept.

The order: 1. May this request's answer be cached (`cachekey`)? 2. What would it be answered from now (the model's files
and arguments)? 3. Look. Then the limits are asked, and: 4. what was found is replayed; 5. else the first of several
that are the same goes on, and the others wait for what it finds by meaning, or for its answer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.admission.limits import Claim
from gateway.admission.queue import ByteBudget, Queue
from gateway.errors import ShuttingDown
from gateway.metrics import Metrics
from gateway.models.fingerprint import Stamp
from gateway.models.owner import Owner
from gateway.models.registry import ModelSpec
from gateway.pipeline.account import Record
from gateway.pipeline.cache.flights import Flights
from gateway.pipeline.cache.key import SILENT, Request, request_of
from gateway.pipeline.cache.replay import Recording, replay
from gateway.pipeline.call import Call
from gateway.pipeline.media.find import Media
from gateway.pipeline.splice import Answer
from gateway.settings import Settings
from gateway.stores.cache.answers import Answers, Stored

if TYPE_CHECKING:
    from gateway.pipeline.cache.meaning import Meaning, Sought

log = logging.getLogger("corral.cache")

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
        self._owners, self._queues = owners, queues
        self._results = {name: metrics.cache_requests.labels(name) for name in ("hit", "miss", "semantic")}
        self.flights = Flights(budget)
        # One thread, and one look at a model at a time: a disk that hangs must not take the threads of others.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="looking at models")
        self._looking: dict[str, asyncio.Future[About | None]] = {}
        self._stale: dict[str, str] = {}  # of which models it was said that they have changed, and to what

    async def seat(self, call: Call, media: Media, spec: ModelSpec) -> Seat | None:
        """What is found for `call`, or the place to put it; None where its answer may not be cached.

        Waits for a slow disk or a slow Redis for a fraction of a second only.
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
        await seat.look()
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

    def is_true(self, about: About) -> bool:
        """Whether the server that runs is this model as it lies there; else its answers are not kept."""
        owner = about.owner
        if self._owners().get(owner.id) is not owner:
            return False
        if owner.started_as != about.lies and self._stale.get(owner.id) != about.lies:
            self._stale[owner.id] = about.lies
            log.warning(
                "%s has changed since its server was started: until it is loaded again, nothing is cached", owner.id
            )
        return owner.started_as == about.lies

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


@dataclass(frozen=True, slots=True)
class About:
    """A model as it would be started now: `lies` tells what from, `known_as` stands in keys."""

    owner: Owner
    lies: str
    known_as: str


class Seat:
    """One request's way through the cache."""

    def __init__(self, cache: ResponseCache, call: Call, model_id: str, about: About, request: Request) -> None:
        self._cache, self._call, self._model_id, self._about = cache, call, model_id, about
        self._request = request
        self._wish = call.cache or SILENT
        self.key = request.key(model_id, about.known_as, call.key.id)
        self._flight_key = (self.key, call.priority)
        self._epoch = cache.epoch
        self.found: Stored | None = None

    async def look(self) -> None:
        if self._wish.look:
            self.found = self._young(await self._cache.answers.get(self.key))

    def claim(self, claim: Claim) -> Claim:
        """What is found counts as a request; it takes no tokens, and passes where none are left."""
        return claim if self.found is None else msgspec.structs.replace(claim, budget=0, tokens=0)

    async def answered(self, answer: Answer, record: Record, go: Go) -> bool:
        """Bring an answer to `answer`, by `go` where there is none; whether it came from llama-server as a stream.

        What costs more than a look comes here, after the limits were asked.
        """
        cache, found, how = self._cache, self.found, "hit"
        if found is None and self._wish.look:
            found = self._young(cache.answers.at_hand(self.key))  # it may have been kept since
            if found is None and (made := await cache.flights.follow(self._flight_key, self._call.size, self._until())):
                found, how = self._young(made[0]), made[1]
                cache.counts.shared += 1
        if found is not None:
            return await self._replay(found, how, answer, record)
        if self._flight_key in cache.flights:  # somebody makes it already, and this one waited for long enough
            self._miss(record)
            return await go(answer)
        return await self._lead(answer, record, go)

    async def _lead(self, answer: Answer, record: Record, go: Go) -> bool:
        flights, key = self._cache.flights, self._flight_key
        flight = flights.take_off(key)
        made: Stored | bool | None = False  # a refusal of this one is for the others to hear for themselves
        try:
            sought = await self._sought()
            near = None if sought is None else await self._near(sought)
            if near is not None:
                flight.how = "semantic"
                flights.land(key, flight, near)
                return await self._replay(near, "semantic", answer, record)
            self._miss(record)
            recording = Recording(answer, too_large=lambda: flights.land(key, flight, False))
            streamed = await go(recording)
            made = recording.made(time.time()) or False
        except asyncio.CancelledError:
            made = None
            raise
        finally:
            flights.land(key, flight, made)
        if isinstance(made, Stored) and self._epoch == self._cache.epoch and self._cache.is_true(self._about):
            self._keep(made, sought)
        return streamed

    def _keep(self, made: Stored, sought: Sought | None) -> None:
        cache = self._cache
        cache.counts.stored += 1
        cache.answers.put(self.key, made)
        if cache.meaning is not None and sought is not None:
            cache.meaning.keep(sought, self.key)

    async def _sought(self) -> Sought | None:
        meaning = self._cache.meaning
        if meaning is None or not self._wish.look:
            return None
        return await meaning.sought(
            self._request, self._call, (self._model_id, self._about.known_as, self._call.key.id)
        )

    async def _near(self, sought: Sought) -> Stored | None:
        meaning = self._cache.meaning
        key = None if meaning is None else await meaning.nearest(sought)
        return None if key is None else self._young(await self._cache.answers.get(key))

    async def _replay(self, found: Stored, how: str, answer: Answer, record: Record) -> bool:
        call, counts = self._call, self._cache.counts
        self._tell(record, how)
        if how == "semantic":
            counts.semantic += 1
        else:
            counts.hits += 1
        call.headers_out.append(("age", str(max(0, int(time.time() - found.made_at)))))
        call.reached = True
        await replay(found, answer, stream=call.stream)
        record.replayed = answer.meter.usage(call.route.dialect, call.stream)
        return False

    def _miss(self, record: Record) -> None:
        self._tell(record, "miss")
        self._cache.counts.misses += 1

    def _tell(self, record: Record, result: str) -> None:
        record.cache = result
        self._call.headers_out.append(("x-cache", result))
        self._cache.count(result)

    def _until(self) -> float:
        """How long it waits for others, on the loop's clock."""
        wait, call = self._cache.settings.queue_timeout_seconds, self._call
        return call.received_at + (wait if call.max_wait is None else min(wait, call.max_wait)) * PATIENCE

    def _young(self, stored: Stored | None) -> Stored | None:
        most = self._wish.max_age
        return None if stored is None or (most is not None and time.time() - stored.made_at > most) else stored


def _looked_at(owner: Owner, stamp: Stamp | None) -> About | None:
    lies = owner.lies_as()
    known_as = lies if stamp is None else owner.lies_as(stamp)
    return About(owner, lies, known_as) if lies is not None and known_as is not None else None
