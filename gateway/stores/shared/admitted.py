"""What this gateway has let in itself: the mirror by which it decides alone, at its share, while Redis is away, and
from which Redis learns afterwards what it has lost or never heard of."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import islice
from typing import Protocol

from gateway.errors import TooManyRequests
from gateway.overuse import (
    never_so_many_tokens,
    out_of_quota,
    too_many_at_once,
    too_many_held,
    too_many_requests,
    too_many_tokens,
)

WINDOW_SECONDS = 60.0
DAY_SECONDS = 86_400
LEASE_WAIT = 1.0  # told to whom only a running request's end can help; when that is nobody knows

Headers = tuple[tuple[str, str], ...]


class Claim(Protocol):
    """What a request wants to use and may. Of the limits, 0 means none."""

    @property
    def caller(self) -> str: ...
    @property
    def rpm(self) -> int: ...
    @property
    def tpm(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def budget(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class Limit(IntEnum):
    """What an answer of Redis says a request has met."""

    NONE = 0
    REQUESTS = 1
    TOKENS = 2
    CONCURRENCY = 3
    BUDGET = 4
    HELD = 5  # the budget would do, but requests that run may need it yet


@dataclass(frozen=True, slots=True)
class Standing:
    """How a caller stands after a decision. `wait` (seconds) is till the request will pass, None for never."""

    limit: Limit
    wait: float | None
    requests: int  # counted in the window
    tokens: int
    reset: float  # seconds until the window's oldest leaves
    used: int  # tokens of the day
    gateways: int = 1  # among which each limit is divided

    def without(self, claim: Claim) -> Standing:
        """As it was without this one, which was let in."""
        requests = self.requests - _counts(claim)
        tokens = self.tokens - (claim.tokens if claim.tpm else 0)
        return replace(self, requests=requests, tokens=tokens, reset=self.reset if requests else 0.0)

    def headers(self, claim: Claim) -> Headers:
        told: Headers = ()
        for what, most, counted in (("requests", claim.rpm, self.requests), ("tokens", claim.tpm, self.tokens)):
            if most:
                share = max(1, most // self.gateways)
                told += (
                    (f"x-ratelimit-limit-{what}", str(most)),
                    (f"x-ratelimit-remaining-{what}", str(max(0, share - counted))),
                    (f"x-ratelimit-reset-{what}", f"{math.ceil(self.reset)}s"),
                )
        return told

    def refusal(self, claim: Claim) -> TooManyRequests:
        """The error for a client whose request met `limit`."""
        told = self.headers(claim)
        if self.limit is Limit.BUDGET:
            return out_of_quota(claim.budget, claim.budget - self.used, claim.tokens, self.wait, told)
        if self.wait is None:
            return never_so_many_tokens(claim.tpm, claim.tokens, told)
        if self.limit is Limit.REQUESTS:
            return too_many_requests(claim.rpm, self.wait, told)
        if self.limit is Limit.TOKENS:
            return too_many_tokens(claim.tpm, claim.tokens, self.wait, told)
        if self.limit is Limit.HELD:
            return too_many_held(claim.budget, claim.tokens, self.wait, told)
        return too_many_at_once(claim.concurrency, self.wait, told)


@dataclass(slots=True, eq=False)
class Admission:
    """A request that was let in."""

    id: str
    caller: str
    at: float
    counted: bool  # in the window
    leased: bool
    weight: int  # tokens that count in the window
    held: int  # tokens held of the day's budget
    told: bool = False  # Redis may know of it
    known: bool = False  # Redis does, with the present weight
    reserved: int = field(init=False)  # the weight that it had at first

    def __post_init__(self) -> None:
        self.reserved = self.weight

    @classmethod
    def of(cls, claim: Claim, number: str, now: float) -> Admission:
        return cls(
            id=number,
            caller=claim.caller,
            at=now,
            counted=_counts(claim),
            leased=bool(claim.concurrency or claim.budget),
            weight=claim.tokens if claim.tpm else 0,
            held=claim.tokens if claim.budget else 0,
        )

    @property
    def member(self) -> str:
        return f"{self.id}:{self.weight}"

    @property
    def lease(self) -> str:
        return f"{self.id}:{self.held}"


@dataclass(slots=True)
class Charge:
    """Tokens that were used while Redis could not be told; it takes the same `number` once only."""

    number: str
    tokens: int


class Own:
    """One caller's requests at this gateway."""

    __slots__ = ("alone", "charge", "day", "held", "leases", "pending", "tokens", "unknown", "used", "window")

    def __init__(self) -> None:
        self.window: OrderedDict[str, Admission] = OrderedDict()  # of the last minute, by id, the oldest first
        self.tokens = 0
        self.leases: dict[str, Admission] = {}  # of those that run
        self.held = 0
        self.unknown = 0  # of the window, to Redis
        self.day = 0
        self.used = 0  # tokens of that day, of all gateways, as Redis has said last
        self.pending = 0  # tokens of that day that Redis has been told of and has not confirmed
        self.alone = 0  # tokens of that day that it has not been told of
        self.charge: Charge | None = None  # the part of them that is on its way

    def pass_to(self, now: float, day: int) -> None:
        window = self.window
        while window and (oldest := next(iter(window.values()))).at <= now - WINDOW_SECONDS:
            self._leave(oldest)
        if day > self.day:
            self.day, self.used, self.pending, self.alone, self.charge = day, 0, 0, 0, None

    def add(self, admission: Admission) -> None:
        if admission.counted:
            self.window[admission.id] = admission
            self.tokens += admission.weight
            self.unknown += not admission.known
        if admission.leased:
            self.leases[admission.id] = admission
            self.held += admission.held

    def settle(self, admission: Admission, weight: int) -> None:
        if admission.id in self.window:
            self.tokens += weight - admission.weight
        admission.weight = weight
        self.release(admission)

    def drop(self, admission: Admission) -> None:
        if admission.id in self.window:
            self._leave(admission)
        self.release(admission)

    def release(self, admission: Admission) -> None:
        if self.leases.pop(admission.id, None) is not None:
            self.held -= admission.held

    def learn(self, admission: Admission, known: bool) -> None:
        if admission.id in self.window and admission.known is not known:
            self.unknown += -1 if known else 1
        admission.known = known

    def _leave(self, admission: Admission) -> None:
        del self.window[admission.id]
        self.tokens -= admission.weight
        self.unknown -= not admission.known

    def hear(self, day: int, used: int) -> None:
        """What Redis says of a day's budget; less than before means that it has lost something."""
        if day == self.day:
            self.used = max(self.used, used)

    def charged(self, tokens: int) -> None:
        """Redis has them now."""
        self.pending = max(0, self.pending - tokens)

    @property
    def spent(self) -> int:
        return self.used + self.pending + self.alone

    @property
    def news(self) -> bool:
        """Whether there is anything that Redis does not know."""
        return bool(self.unknown or self.alone)

    @property
    def idle(self) -> bool:
        return not (self.window or self.leases or self.alone or self.used)


class Admitted:
    """All callers of this gateway. `now` is monotonic, `wall` unix time; both in seconds."""

    def __init__(self) -> None:
        self.callers: dict[str, Own] = {}

    def own(self, caller: str, now: float, wall: float) -> Own:
        own = self.callers.get(caller)
        if own is None:
            own = self.callers[caller] = Own()
        own.pass_to(now, int(wall // DAY_SECONDS))
        return own

    def sweep(self, now: float, wall: float) -> None:
        """Forget those of whom nothing counts any more."""
        day = int(wall // DAY_SECONDS)
        for caller, own in tuple(self.callers.items()):
            own.pass_to(now, day)
            if own.idle:
                del self.callers[caller]

    def doubt(self) -> None:
        """Redis may have lost everything."""
        for own in self.callers.values():
            for admission in own.window.values():
                own.learn(admission, False)

    def news(self) -> Iterator[Own]:
        return (own for own in self.callers.values() if own.news)


def alone(claim: Claim, own: Own, gateways: int, now: float, wall: float) -> Standing:
    """The decision without Redis: what of the caller's limits is this gateway's part, and at least one request.

    `own` must have been passed to `now`.
    """
    requests, tokens = len(own.window), own.tokens

    def standing(limit: Limit, wait: float | None) -> Standing:
        oldest = next(iter(own.window.values()), None)
        reset = oldest.at + WINDOW_SECONDS - now if oldest else 0.0
        return Standing(limit, wait, requests, tokens, reset, own.spent, gateways)

    if claim.budget and not _affordable(claim, own, gateways, held=0):
        return standing(Limit.BUDGET, DAY_SECONDS - wall % DAY_SECONDS)
    if claim.tpm and claim.tokens > claim.tpm:
        return standing(Limit.TOKENS, None)
    request_wait = _request_wait(own, max(1, claim.rpm // gateways), now) if claim.rpm else 0.0
    token_wait = _token_wait(own, claim.tokens, claim.tpm // gateways, now) if claim.tpm and claim.tokens else 0.0
    if request_wait > 0 and request_wait >= token_wait:
        return standing(Limit.REQUESTS, request_wait)
    if token_wait > 0:
        return standing(Limit.TOKENS, token_wait)
    if claim.concurrency and len(own.leases) >= max(1, claim.concurrency // gateways):
        return standing(Limit.CONCURRENCY, LEASE_WAIT)
    if claim.budget and not _affordable(claim, own, gateways, held=own.held):
        return standing(Limit.HELD, LEASE_WAIT)
    requests += _counts(claim)
    tokens += claim.tokens if claim.tpm else 0
    return standing(Limit.NONE, 0.0)


def _counts(claim: Claim) -> bool:
    """Whether it has a place in the window."""
    return bool(claim.rpm or (claim.tpm and claim.tokens))


def _affordable(claim: Claim, own: Own, gateways: int, held: int) -> bool:
    """Whether this gateway's part of the day's budget will do, with `held` tokens kept for those that run."""
    mine, left = own.pending + own.alone + held, claim.budget - own.used
    return left > 0 and mine + claim.tokens <= (left // gateways if mine else left)


def _request_wait(own: Own, share: int, now: float) -> float:
    over = len(own.window) - share
    if over < 0:
        return 0.0
    return next(islice(own.window.values(), over, None)).at + WINDOW_SECONDS - now


def _token_wait(own: Own, tokens: int, share: int, now: float) -> float:
    """A request larger than the share passes when nothing else counts."""
    surplus, counted = own.tokens + tokens - share, own.tokens
    if surplus <= 0 or not counted:
        return 0.0
    for admission in own.window.values():
        surplus -= admission.weight
        counted -= admission.weight
        if surplus <= 0 or not counted:
            return admission.at + WINDOW_SECONDS - now
    raise AssertionError("the sum is not that of its parts")
