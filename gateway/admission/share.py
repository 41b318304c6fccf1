"""Who gives way when the waiting room is full: no key may keep all others out of it.

A key that has fewer waiting than another gets in, and the newest of the one that has most goes, until both have as
many. So each of several keys that fill the room ends with its share of it, and one alone may have it all. Nobody
gives way to a request of lower priority than its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from gateway.admission.order import Entry

E = TypeVar("E", bound=Entry)


def gives_way(newest_first: Iterable[E], held: Counter[str], key: str, level: int) -> E | None:
    """Which of those who wait goes for one of `key` that comes; None if that one itself is to be refused.

    `held`: how many wait of each key. O(keys) where it is refused.
    """
    most = max(held.values(), default=0)
    if held[key] + 1 >= most:
        return None
    for entry in newest_first:
        if held[entry.key] == most and entry.level >= level:
            return entry
    return None
