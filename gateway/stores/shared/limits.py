"""Limits that several gateways share over Redis; each goes on alone, at its share, while Redis is slow or away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.errors import ConfigError
from gateway.stores.shared.admitted import (
    WINDOW_SECONDS,
    Admission,
    Claim,
    Headers,
    Limit,
    Standing,
    alone,
)
from gateway.stores.shared.breaker import unproven
from gateway.stores.shared.news import End, News, all_told
from gateway.stores.shared.scripts import REFUND, RESERVE, SETTLE, keys_of

if TYPE_CHECKING:
    from gateway.stores.shared.calls import Calls, Outcome

log = logging.getLogger("corral.redis")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds."""

    call: float = 0.05  # the longest wait for Redis, and for a connection to it
    slow: float = 0.04  # an answer that took longer is used, but counts as a bad one
    beat: float = 2.0  # between renewals of leases
    lease: float = 10.0  # how long those of a gateway that was killed outlive it


@dataclass(frozen=True, slots=True)
class Told:
    """Who hears what: `up` 1 or 0 at each change, `alone` each time that a decision is made without Redis."""

    up: Callable[[float], Any] = lambda _: None
    alone: Callable[[], Any] = lambda: None


class SharedReservation:
    """One request that counts against its caller's limits at all gateways, until it is settled or refunded.

    Neither waits for Redis. One that is lost on the way is settled as it was reserved.
    """

    __slots__ = ("_admission", "_limits", "_standing", "claim")

    def __init__(
        self, limits: SharedLimits | None, claim: Claim, admission: Admission | None, standing: Standing | None
    ) -> None:
        self._limits = limits
        self._admission = admission
        self._standing = standing
        self.claim = claim

    def headers(self) -> Headers:
        """`x-ratelimit-*`, as it was when the request was let in; after a refund, as it was without it."""
        return self._standing.headers(self.claim) if self._standing else ()

    def settle(self, used: int) -> None:
        """It is over, and took `used` tokens. Only the first of all calls of `settle` and `refund` does anything."""
        admission, self._admission = self._admission, None
        if admission is not None and self._limits is not None:
            self._limits.settle(self.claim, admission, used)

    def refund(self) -> None:
        """It was rejected later, and has cost nothing."""
        admission, self._admission = self._admission, None
        if admission is not None and self._limits is not None:
            self._limits.refund(admission)
            if self._standing is not None:
                self._standing = self._standing.without(self.claim)

    def __del__(self) -> None:
        if self._admission is not None and self._limits is not None:
            self._limits.settle(self.claim, self._admission, self.claim.tokens, later=True)


class SharedLimits:
    """The limits of all callers of all gateways at one Redis. Made by `sharing`."""

    def __init__(self, calls: Callable[[Callable[[Outcome], None]], Calls], told: Told, timing: Timing) -> None:
        self._calls = calls(self._judge)
        self._news = News(self._calls, timing.lease)
        self._told = told
        self._timing = timing
        self._clock = time.monotonic
        self._wall = time.time
        self._breaker = unproven(self._clock())
        self._changed_at = self._wall()
        self._wake = asyncio.Event()
        told.up(0)

    async def reserve(self, claim: Claim) -> SharedReservation:
        """Count a request on every limit of its caller, or on none.

        Raises InsufficientQuota, RateLimitExceeded, TokensExceeded, ConcurrencyExceeded, with the true time until the
        request will pass. Waits for Redis for two round trips at most, and not at all while the breaker is open.
        """
        if not (claim.rpm or claim.tpm or claim.concurrency or claim.budget):
            return SharedReservation(None, claim, None, None)
        admission = Admission.of(claim, self._news.number(), self._clock())
        if self._breaker.closed:
            standing = await self._reserve_there(claim, admission)
            if standing is not None:
                if standing.limit:
                    raise standing.refusal(claim)
                admission.known = True
                self._news.own(claim.caller).add(admission)
                return SharedReservation(self, claim, admission, standing)
        return self._reserve_here(claim, admission)

    async def _reserve_there(self, claim: Claim, admission: Admission) -> Standing | None:
        limits = (claim.rpm, claim.tpm, claim.concurrency, claim.budget)
        arguments = (admission.id, *limits, claim.tokens, self._news.lease)
        admission.told = True
        try:
            answer = await self._calls.send(RESERVE, keys_of(claim.caller), arguments)
        except asyncio.CancelledError:
            self.refund(admission)
            raise
        if answer is None:
            return None
        kind, wait, requests, tokens, reset, *used = answer
        self._news.hear(claim.caller, used)
        return Standing(Limit(kind), None if wait < 0 else wait / 1e6, requests, tokens, reset / 1e6, used[1])

    def _reserve_here(self, claim: Claim, admission: Admission) -> SharedReservation:
        self._told.alone()
        own = self._news.own(claim.caller)
        standing = alone(claim, own, self._news.gateways, self._clock(), self._wall())
        if standing.limit:
            if admission.told:  # Redis may yet count it
                self.refund(admission)
            raise standing.refusal(claim)
        own.add(admission)
        if self._breaker.closed:
            self._wake.set()
        return SharedReservation(self, claim, admission, standing)

    def settle(self, claim: Claim, admission: Admission, used: int, *, later: bool = False) -> None:
        """For a reservation. `later`: with the next heartbeat, for the caller may be no task of the loop."""
        own = self._news.own(admission.caller)
        before, charge = admission.member, used if claim.budget else 0
        own.settle(admission, used if claim.tpm else 0)
        changed, known = admission.member != before, admission.known
        if not admission.told:
            own.alone += charge
            return
        if changed:
            own.learn(admission, False)
        if not (changed or admission.leased):
            return
        # A charge of a settlement that was never sent goes with the next renewal, which never counts twice.
        now = self._breaker.closed and not later
        arguments = (before, admission.member, admission.lease, charge if now else 0, 1)
        end = End(admission.caller, SETTLE, arguments, self._clock(), charge if now else 0)
        end.known = admission if known else None
        if now:
            own.pending += charge
            self._news.send(end)
        else:
            own.alone += charge
            self._news.unsent.append(end)

    def refund(self, admission: Admission) -> None:
        """For a reservation."""
        self._news.own(admission.caller).drop(admission)
        if not admission.told:
            return
        end = End(admission.caller, REFUND, (admission.member, admission.lease), self._clock())
        if self._breaker.closed:
            self._news.send(end)
        else:
            self._news.unsent.append(end)

    def view(self) -> dict[str, Any]:
        """For `/health`; `since` is unix time."""
        return {"up": self._breaker.closed, "since": self._changed_at, "gateways": self._news.gateways}

    async def probe(self) -> bool:
        """Call Redis though the breaker is open; if it answers in time, tell it all that it may not know, and close."""
        self._breaker = self._breaker.probing()
        self._news.count_from = self._clock() + self._timing.lease
        good = await all_told([self._news.beat()])  # connects
        if good:
            began = self._clock()
            good = await all_told([self._news.beat()]) and self._clock() - began <= self._timing.slow
        if good:
            good = await all_told([self._news.beat(), *self._news.tell()])
        self._breaker = self._breaker.probed(good, self._clock())
        if good:
            self._news.tell()  # what came meanwhile: it goes out before any request asks
            self._changed()
        return good

    async def keep(self) -> None:
        """Renew leases while Redis is there, probe it while it is not; runs as long as the limits do."""
        swept_at = self._clock()
        while True:
            now = self._clock()
            if now - swept_at > WINDOW_SECONDS:
                swept_at = now
                self._news.admitted.sweep(now, self._wall())
            if self._breaker.closed:
                await all_told([self._news.beat(), *self._news.tell()])
            elif self._breaker.due(now):
                await self.probe()
            pause = self._timing.beat if self._breaker.closed else self._breaker.probe_at - self._clock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, pause)):
                    await self._wake.wait()
            self._wake.clear()

    async def leave(self) -> None:
        """The last word to Redis: what it has not been told, and that this gateway's share is free."""
        if self._breaker.closed:
            await all_told([*self._news.tell(), self._news.beat(leaving=True)])
        self._breaker = unproven(self._clock())
        await self._calls.close()

    def _judge(self, outcome: Outcome) -> None:
        if outcome.fresh or outcome.seconds is None:
            self._news.doubtful = True
        good = outcome.seconds is not None and outcome.seconds <= self._timing.slow
        before = self._breaker
        self._breaker = before.called(good, self._clock())
        if not before.closed:
            return
        if self._news.doubtful:
            self._wake.set()
        if not self._breaker.closed:
            self._calls.abandon()
            self._wake.set()
            self._changed(outcome.reason or f"it took {outcome.seconds or 0:.3f} s")

    def _changed(self, reason: str = "") -> None:
        up = self._breaker.closed
        self._changed_at = self._wall()
        self._told.up(float(up))
        if up:
            log.info("Redis answers: the limits hold across %d gateways", self._news.gateways)
        else:
            share = f"1/{self._news.gateways} of each limit"
            log.warning("Redis is slow or away (%s): this gateway keeps to %s", reason, share)


@contextlib.asynccontextmanager
async def sharing(url: str, told: Told | None = None, timing: Timing | None = None) -> AsyncIterator[SharedLimits]:
    """Limits over the Redis at `url`. Raises ConfigError; that Redis is away is none, and delays nothing."""
    try:
        from gateway.stores.shared.calls import Calls, connect  # 120 ms: only where it is used
    except ImportError:
        problem = "REDIS_URL: needs the redis package; install it with: pip install 'corral[redis]'"
        raise ConfigError([problem]) from None
    timing = timing or Timing()
    client = connect(url, timing.call)
    limits = SharedLimits(lambda judge: Calls(client, timing.call, judge), told or Told(), timing)
    if not await limits.probe():
        log.warning("Redis does not answer yet: this gateway keeps to its limits alone")
    keeper = asyncio.create_task(limits.keep(), name="shared limits")
    try:
        yield limits
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await limits.leave()
