"""What Redis is told beside reservations: that this gateway and its leases live, what has ended, and what it may have
lost or never heard of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from os import urandom
from typing import TYPE_CHECKING

from gateway.stores.shared.admitted import DAY_SECONDS, Admission, Admitted, Charge, Own
from gateway.stores.shared.scripts import BEAT, GATEWAYS, RENEW, SETTLE, keys_of

if TYPE_CHECKING:
    from gateway.stores.shared.calls import Answer, Calls

ENDS_KEPT = 120.0  # seconds; by then a window and a lease have ended by themselves
TOLD_AT_ONCE = 1000  # admissions in one call


@dataclass(slots=True, eq=False)
class End:
    """A settlement or refund, until Redis has confirmed it."""

    caller: str
    script: str
    arguments: tuple[str | int, ...]
    at: float
    charge: int = 0
    known: Admission | None = None  # whose new weight Redis knows with this


class News:
    """The mirror of one gateway's admissions, and its way to Redis. `lease` is in seconds."""

    def __init__(self, calls: Calls, lease: float) -> None:
        self.admitted = Admitted()
        self.unsent: list[End] = []
        self.doubtful = False  # whether Redis still holds what it was told
        self.gateways = 1  # as Redis has said last
        self.count_from = 0.0  # till then Redis may not have heard of all: one that has lost its data counts too few
        self.lease = int(lease * 1e6)
        self._calls = calls
        self._id = urandom(8).hex()
        self._numbers = 0

    def number(self) -> str:
        self._numbers += 1
        return f"{self._id}{self._numbers:x}"

    def own(self, caller: str) -> Own:
        return self.admitted.own(caller, time.monotonic(), time.time())

    def hear(self, caller: str, used: list[int]) -> None:
        if used[1]:
            self.own(caller).hear(*used)

    def beat(self, *, leaving: bool = False) -> asyncio.Future[Answer | None]:
        def heard(answer: asyncio.Future[Answer | None]) -> None:
            if told := answer.result():
                least = self.gateways if time.monotonic() < self.count_from else 1
                self.gateways = max(least, told[0])

        answer = self._calls.send(BEAT, GATEWAYS, (self._id, 0 if leaving else self.lease))
        answer.add_done_callback(heard)
        return answer

    def tell(self) -> list[asyncio.Future[Answer | None]]:
        """Renew all leases, and tell what Redis does not know."""
        if self.doubtful:
            self.doubtful = False
            self.admitted.doubt()
        now, wall = time.monotonic(), time.time()
        answers = []
        for caller, own in self.admitted.callers.items():
            own.pass_to(now, int(wall // DAY_SECONDS))
            if own.leases or own.news:
                answers += self._renew(caller, own, now)
        unsent, self.unsent = self.unsent, []
        answers += [self.send(end) for end in unsent if end.at > now - ENDS_KEPT]
        return answers

    def _renew(self, caller: str, own: Own, now: float) -> list[asyncio.Future[Answer | None]]:
        if own.alone and own.charge is None:
            own.charge = Charge(self.number(), own.alone)
        news = [admission for admission in own.window.values() if not admission.known]
        parts = [news[start : start + TOLD_AT_ONCE] for start in range(0, max(1, len(news)), TOLD_AT_ONCE)]
        return [self._renewal(caller, own, part, now, whole=not number) for number, part in enumerate(parts)]

    def _renewal(
        self, caller: str, own: Own, part: list[Admission], now: float, *, whole: bool
    ) -> asyncio.Future[Answer | None]:
        """One call: some of the window and, if `whole`, the leases and the charge."""
        leases = tuple(own.leases.values()) if whole else ()
        charge = own.charge if whole else None
        members = [(admission, admission.member) for admission in part]
        arguments: list[str | int] = [self.lease, own.day, own.used, self._id]
        arguments += [charge.number, charge.tokens] if charge else ["", 0]
        arguments += [len(leases), *(admission.lease for admission in leases)]
        for admission, member in members:
            arguments += [int((now - admission.at) * 1e6), member]
        for admission in (*leases, *part):
            admission.told = True

        def heard(answer: asyncio.Future[Answer | None]) -> None:
            if (used := answer.result()) is None:
                return
            for admission, member in members:
                if admission.member == member:
                    own.learn(admission, True)
            if charge is not None and own.charge is charge:
                own.alone, own.charge = own.alone - charge.tokens, None
            self.hear(caller, used)

        answer = self._calls.send(RENEW, keys_of(caller), arguments)
        answer.add_done_callback(heard)
        return answer

    def send(self, end: End) -> asyncio.Future[Answer | None]:
        def heard(answer: asyncio.Future[Answer | None]) -> None:
            if (used := answer.result()) is None:
                if end.script == SETTLE:  # it may have been charged
                    end.arguments = (*end.arguments[:-1], 0)
                end.known = None
                self.unsent.append(end)
                return
            own = self.own(end.caller)
            own.charged(end.charge)
            if end.known is not None:
                own.learn(end.known, True)
            self.hear(end.caller, used)

        answer = self._calls.send(end.script, keys_of(end.caller), end.arguments)
        answer.add_done_callback(heard)
        return answer


async def all_told(answers: Iterable[asyncio.Future[Answer | None]]) -> bool:
    """Whether none is missing; who stops waiting cancels none."""
    waited = tuple(answers)
    await asyncio.wait(waited)
    return None not in [answer.result() for answer in waited]
