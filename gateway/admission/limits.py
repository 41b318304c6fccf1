"""Limits per key: requests and tokens a minute, requests at once, tokens a day; reserved, settled or refunded.

A reservation is all or nothing, and nobody else comes in between: what is refused has cost nothing.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from gateway.admission.budgets import DAY_SECONDS, BudgetStore, Day, MemoryBudgets
from gateway.admission.windows import WINDOW_SECONDS, Mark, Window
from gateway.overuse import (
    never_so_many_tokens,
    out_of_quota,
    too_many_at_once,
    too_many_held,
    too_many_requests,
    too_many_tokens,
)

Headers = tuple[tuple[str, str], ...]
SWEPT_AT_ONCE = 4  # idle callers looked at per request: more than come in, so that they cannot pile up


class Claim(msgspec.Struct, eq=False, gc=False):
    """What a request wants to use and may. Of the limits, 0 means none."""

    caller: str  # the key's id, or an address where there are no keys
    rpm: int = 0  # requests a minute
    tpm: int = 0  # tokens a minute
    concurrency: int = 0  # requests at once
    budget: int = 0  # tokens a day
    tokens: int = 0  # expected: the prompt and the bound of each answer


class _Caller:
    """What counts for one key or address."""

    __slots__ = ("day", "held_seconds", "leases", "requests", "seen", "tokens")

    def __init__(self) -> None:
        self.requests = Window()
        self.tokens: Window | None = None  # most callers have no such limit
        self.leases: dict[int, float] = {}  # of running requests, since when; the oldest first
        self.held_seconds = 1.0  # moving mean of how long a lease lasts
        self.day: Day | None = None
        self.seen = 0.0

    def pass_to(self, now: float) -> None:
        self.requests.pass_to(now)
        if self.tokens is not None:
            self.tokens.pass_to(now)

    def likely_wait(self, now: float) -> float:
        """Seconds until one that runs will have ended. When that will be nobody knows: a likely time is told."""
        oldest = next(iter(self.leases.values()))
        return min(WINDOW_SECONDS, max(1.0, self.held_seconds - (now - oldest)))

    def idle(self, now: float) -> bool:
        return self.seen <= now - WINDOW_SECONDS and not self.leases and not (self.day and self.day.held)


class Reservation:
    """One request that counts against its caller's limits, until it is settled or refunded.

    One that is lost on the way is settled as it was reserved: a lease ends with its reservation at the latest.
    """

    __slots__ = ("_at", "_caller", "_clock", "_day", "_mark", "_open", "_request", "claim", "told")

    def __init__(self, caller: _Caller | None, claim: Claim, now: float, clock: Callable[[], float]) -> None:
        self._caller = caller
        self._clock = clock
        self._at = now
        self._open = caller is not None
        self._request: Mark | None = None
        self._mark: Mark | None = None
        self._day: Day | None = None
        self.claim = claim
        self.told: Headers = ()
        if caller is None:
            return
        if claim.rpm:
            self._request = caller.requests.add(now, 1)
        if claim.tpm and claim.tokens and caller.tokens:
            self._mark = caller.tokens.add(now, claim.tokens)
        if claim.concurrency or claim.budget:
            caller.leases[id(self)] = now
        if claim.budget and caller.day:
            self._day = caller.day
            self._day.held += claim.tokens
        if claim.rpm or claim.tpm:
            self.told = _headers(claim, caller, now)

    def headers(self) -> Headers:
        """`x-ratelimit-*`, as it was when the request was let in; after a refund, as it is without it."""
        return self.told

    def settle(self, used: int) -> None:
        """It is over, and took `used` tokens. Only the first of all calls of `settle` and `refund` does anything."""
        if not self._open or self._caller is None:
            return
        self._open = False
        claim, caller = self.claim, self._caller
        if self._mark is not None and caller.tokens:
            if used < claim.tokens:
                caller.tokens.take_back(self._mark, claim.tokens - used)
            elif used > claim.tokens:
                caller.tokens.add(self._clock(), used - claim.tokens)
        if claim.concurrency or self._day is not None:
            self._close(caller, used)

    def refund(self) -> None:
        """It was rejected later, and has cost nothing."""
        if not self._open or self._caller is None:
            return
        self._open = False
        if self._request is not None:
            self._caller.requests.take_back(self._request, 1)
        if self._mark is not None and self._caller.tokens:
            self._caller.tokens.take_back(self._mark, self.claim.tokens)
        self._close(self._caller, 0)
        if self.told:
            now = self._clock()
            self._caller.pass_to(now)
            self.told = _headers(self.claim, self._caller, now)

    def _close(self, caller: _Caller, used: int) -> None:
        begun = caller.leases.pop(id(self), None)
        if begun is not None:
            caller.held_seconds += 0.2 * (self._clock() - begun - caller.held_seconds)
        if self._day is not None:
            self._day.settle(self.claim.tokens, used)

    def __del__(self) -> None:
        if self._open:
            self.settle(self.claim.tokens)


class Limits:
    """The limits of all callers of one gateway. `clock` is monotonic; `wall` tells the day, as unix time."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        budgets: BudgetStore | None = None,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._budgets = budgets or MemoryBudgets()
        self._callers: OrderedDict[str, _Caller] = OrderedDict()  # who came last stands last

    def reserve(self, claim: Claim) -> Reservation:
        """Count a request on every limit of its caller, or on none.

        Raises InsufficientQuota, RateLimitExceeded, TokensExceeded, ConcurrencyExceeded, with the true time until the
        request will pass.
        """
        now = self._clock()
        if not (claim.rpm or claim.tpm or claim.concurrency or claim.budget):
            return Reservation(None, claim, now, self._clock)
        caller = self._callers.get(claim.caller)
        if caller is None:
            self._sweep(now)
            caller = self._callers[claim.caller] = _Caller()
        else:
            self._callers.move_to_end(claim.caller)
        caller.seen = now
        if claim.tpm and caller.tokens is None:
            caller.tokens = Window()
        caller.pass_to(now)
        free = self._check_budget(caller, claim, now) if claim.budget else None
        if (claim.rpm and caller.requests.total >= claim.rpm) or claim.tpm:
            _check_windows(caller, claim, now)
        if claim.concurrency and len(caller.leases) >= claim.concurrency:
            raise too_many_at_once(claim.concurrency, caller.likely_wait(now), _headers(claim, caller, now))
        if free is not None and (claim.tokens > free or not free):
            raise too_many_held(claim.budget, claim.tokens, caller.likely_wait(now), _headers(claim, caller, now))
        return Reservation(caller, claim, now, self._clock)

    def __len__(self) -> int:
        """How many callers are remembered."""
        return len(self._callers)

    def _check_budget(self, caller: _Caller, claim: Claim, now: float) -> int:
        """How many of the day's tokens nobody holds. Raises InsufficientQuota where the held ones would not help."""
        wall = self._wall()
        number = int(wall // DAY_SECONDS)
        if caller.day is None or caller.day.number != number:
            caller.day = Day(claim.caller, number, self._budgets)
        left = caller.day.left(claim.budget)
        if claim.tokens > left or not left:
            midnight = (number + 1) * DAY_SECONDS - wall
            raise out_of_quota(claim.budget, left, claim.tokens, midnight, _headers(claim, caller, now))
        return caller.day.free(claim.budget)

    def _sweep(self, now: float) -> None:
        """Forget some who have not come for a minute, so that many addresses cost no memory, and no pause."""
        for _ in range(min(SWEPT_AT_ONCE, len(self._callers))):
            name, caller = next(iter(self._callers.items()))
            if caller.seen > now - WINDOW_SECONDS:
                return
            if caller.idle(now):
                del self._callers[name]
            else:
                self._callers.move_to_end(name)
                caller.seen = now  # a long request; it is looked at again in a minute


def _check_windows(caller: _Caller, claim: Claim, now: float) -> None:
    """Of two that are full, the one that is full longer is told of, for only then the request will pass."""
    requests = caller.requests.wait(now, 1, claim.rpm) if claim.rpm else 0.0
    tokens = 0.0
    if claim.tpm and claim.tokens > claim.tpm:
        raise never_so_many_tokens(claim.tpm, claim.tokens, _headers(claim, caller, now))
    if claim.tpm and claim.tokens and caller.tokens:
        tokens = caller.tokens.wait(now, claim.tokens, claim.tpm)
    if requests > 0 and requests >= tokens:
        raise too_many_requests(claim.rpm, requests, _headers(claim, caller, now))
    if tokens > 0:
        raise too_many_tokens(claim.tpm, claim.tokens, tokens, _headers(claim, caller, now))


def _headers(claim: Claim, caller: _Caller, now: float) -> Headers:
    told: Headers = ()
    if claim.rpm:
        requests = caller.requests
        told = (
            ("x-ratelimit-limit-requests", str(claim.rpm)),
            ("x-ratelimit-remaining-requests", str(max(0, claim.rpm - requests.total))),
            ("x-ratelimit-reset-requests", f"{math.ceil(requests.reset(now))}s"),
        )
    if claim.tpm and caller.tokens:
        tokens = caller.tokens
        told += (
            ("x-ratelimit-limit-tokens", str(claim.tpm)),
            ("x-ratelimit-remaining-tokens", str(max(0, claim.tpm - tokens.total))),
            ("x-ratelimit-reset-tokens", f"{math.ceil(tokens.reset(now))}s"),
        )
    return told
