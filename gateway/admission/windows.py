"""An exact sliding window over a minute, of requests or of tokens."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0
EXACT = 10_000  # so many marks are kept as they are; more than these are put together
GRAIN = WINDOW_SECONDS / EXACT


class Mark:
    """An amount that counts until a minute after `at`."""

    __slots__ = ("amount", "at")

    def __init__(self, at: float, amount: int) -> None:
        self.at = at
        self.amount = amount


class Window:
    """What one caller has used in the last minute. Every method wants `pass_to` to have been called for `now`.

    Up to EXACT marks it is exact. Beyond, what comes within GRAIN seconds becomes one mark at the end of these, so
    that a window never holds more than twice EXACT marks, and never lets more through than it should.
    """

    __slots__ = ("marks", "total")

    def __init__(self) -> None:
        self.marks: deque[Mark] = deque()
        self.total = 0

    def pass_to(self, now: float) -> None:
        marks, horizon = self.marks, now - WINDOW_SECONDS
        while marks and (marks[0].at <= horizon or not marks[0].amount):
            mark = marks.popleft()
            self.total -= mark.amount
            mark.amount = 0  # a refund finds nothing any more

    def add(self, now: float, amount: int) -> Mark:
        marks = self.marks
        self.total += amount
        if marks:
            last = marks[-1]
            if len(marks) >= EXACT:
                now = (now // GRAIN + 1) * GRAIN
                if last.at >= now:
                    last.amount += amount
                    return last
            elif last.at > now:
                now = last.at
        mark = Mark(now, amount)
        marks.append(mark)
        return mark

    def take_back(self, mark: Mark, amount: int) -> int:
        """How much of it still counted."""
        amount = min(amount, mark.amount)
        mark.amount -= amount
        self.total -= amount
        while self.marks and not self.marks[-1].amount:
            self.marks.pop()  # refusals behind the limits leave nothing, however many there are
        return amount

    def reset(self, now: float) -> float:
        """Seconds until the oldest mark leaves; 0 for an empty window."""
        return self.marks[0].at + WINDOW_SECONDS - now if self.marks else 0.0

    def wait(self, now: float, amount: int, limit: int) -> float:
        """Seconds until `amount` more stay within `limit`; 0 if they do now. `amount` must not exceed `limit`."""
        surplus = self.total + amount - limit
        if surplus <= 0:
            return 0.0
        for mark in self.marks:
            surplus -= mark.amount
            if surplus <= 0:
                return mark.at - (now - WINDOW_SECONDS)
        raise AssertionError("more is asked than the limit allows")
