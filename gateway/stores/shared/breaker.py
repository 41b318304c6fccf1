"""Whether a server is worth waiting for: a circuit breaker as a value, a function of outcomes and a clock.

closed    calls are made; `FAILURES` bad ones in a row open it
open      no call is made; after a pause one probe is due, off every request's way
probing   the probe runs: a good one closes, a bad one opens for twice as long
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

FAILURES = 3
FIRST_PAUSE = 0.25  # seconds; doubled by each probe that fails
LONGEST_PAUSE = 4.0
STABLE_SECONDS = 10.0  # what was closed for less is taken to flap: its pauses go on growing


class Phase(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


@dataclass(frozen=True, slots=True)
class Breaker:
    """Times are seconds on one monotonic clock."""

    phase: Phase = Phase.CLOSED
    since: float = 0.0  # when it last opened or closed
    bad: int = 0  # calls in a row, while closed
    pause: float = 0.0  # the last one, open
    probe_at: float = 0.0  # while open

    @property
    def closed(self) -> bool:
        return self.phase is Phase.CLOSED

    def called(self, good: bool, now: float) -> Breaker:
        """After a call; what comes in late, when it is open already, says nothing new."""
        if not self.closed:
            return self
        if good:
            return replace(self, bad=0) if self.bad else self
        if self.bad + 1 < FAILURES:
            return replace(self, bad=self.bad + 1)
        return self._opened(now, 0.0 if now - self.since >= STABLE_SECONDS else self.pause)

    def due(self, now: float) -> bool:
        return self.phase is Phase.OPEN and now >= self.probe_at

    def probing(self) -> Breaker:
        assert self.phase is Phase.OPEN
        return replace(self, phase=Phase.PROBING)

    def probed(self, good: bool, now: float) -> Breaker:
        assert self.phase is Phase.PROBING
        if good:
            return Breaker(since=now, pause=self.pause)
        return replace(self._opened(now, self.pause), since=self.since)

    def _opened(self, now: float, pause: float) -> Breaker:
        pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, pause * 2))
        return Breaker(Phase.OPEN, since=now, pause=pause, probe_at=now + pause)


def unproven(now: float) -> Breaker:
    """Of a server that was never called: open, and a probe is due at once."""
    return Breaker(Phase.OPEN, since=now, probe_at=now)
