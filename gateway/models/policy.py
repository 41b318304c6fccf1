"""What to do with a model, decided from facts and a clock: no awaiting, no logging, no side effects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

CRASH_WINDOW_SECONDS = 600.0
MAX_CRASHES = 5  # within the window; one more and the model has failed
MAX_LOAD_FAILURES = 3  # in a row, without having been ready in between
MAX_DELAY_SECONDS = 30.0


@dataclass(frozen=True)
class Crash:
    """One end that nobody asked for. `at` is in seconds on any clock."""

    at: float
    was_ready: bool


def restart_delay(crashes: Sequence[Crash], now: float) -> float | None:
    """Seconds to wait before the next start, or None where the model has failed.

    A server that had served is started again at once the first time; each further crash within the window doubles
    the wait. One that never gets ready is given up sooner: its file or its arguments are wrong.
    """
    recent = [crash for crash in crashes if now - crash.at <= CRASH_WINDOW_SECONDS]
    in_a_row = 0
    for crash in reversed(crashes):  # however long each load took
        if crash.was_ready:
            break
        in_a_row += 1
    if in_a_row >= MAX_LOAD_FAILURES or len(recent) > MAX_CRASHES:
        return None
    if len(recent) <= 1 and not in_a_row:
        return 0.0
    return min(MAX_DELAY_SECONDS, 0.5 * 2.0 ** (len(recent) - 1))


def idle_seconds_left(last_used: float, leases: int, timeout: float, now: float) -> float | None:
    """Seconds until an unused model is to be unloaded; 0 means now, None that it is not to be."""
    if not timeout or leases:
        return None
    return max(0.0, last_used + timeout - now)
