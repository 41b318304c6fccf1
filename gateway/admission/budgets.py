"""Tokens a day: what is used up, and what those who run may still use. Days are days of UTC."""

from __future__ import annotations

from typing import Protocol

DAY_SECONDS = 86_400


class BudgetStore(Protocol):
    """Where used tokens outlive the process. `day` counts from 1970-01-01. Both are called on the event loop and must
    not block it: a slow store writes later, and has read what it has at its opening."""

    def load(self, key: str, day: int) -> int: ...

    def add(self, key: str, day: int, tokens: int) -> None: ...


class MemoryBudgets:
    """Budgets that a restart forgets."""

    def __init__(self) -> None:
        self._day = 0
        self._used: dict[str, int] = {}

    def load(self, key: str, day: int) -> int:
        return self._used.get(key, 0) if day == self._day else 0

    def add(self, key: str, day: int, tokens: int) -> None:
        if day > self._day:
            self._day, self._used = day, {}
        if day == self._day:
            self._used[key] = self._used.get(key, 0) + tokens


class Day:
    """One key's day. What was reserved before midnight is settled on the day of its reservation."""

    __slots__ = ("_key", "_store", "held", "number", "used")

    def __init__(self, key: str, number: int, store: BudgetStore) -> None:
        self._key = key
        self._store = store
        self.number = number
        self.used = store.load(key, number)
        self.held = 0

    def left(self, budget: int) -> int:
        return max(0, budget - self.used)

    def free(self, budget: int) -> int:
        """What is left, without what is held for those who run."""
        return max(0, budget - self.used - self.held)

    def settle(self, held: int, used: int) -> None:
        self.held -= held
        if used:
            self.used += used
            self._store.add(self._key, self.number, used)
