"""Limits per key: requests a minute in an exact sliding window, reserved before and refunded after a rejection."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gateway.errors import RateLimitExceeded

WINDOW_SECONDS = 60.0


@dataclass(slots=True)
class Reservation:
    """One request that counts against a limit. `headers` tell the client what is left."""

    _window: deque[float] | None
    _at: float
    limit: int
    remaining: int
    reset: float  # seconds until the oldest counted request leaves the window

    def refund(self) -> None:
        """The request was rejected later and has cost nothing; a second call does nothing."""
        window, self._window = self._window, None
        if window is not None:
            try:
                window.remove(self._at)
            except ValueError:
                return  # it has left the window by itself
            self.remaining += 1

    def headers(self) -> tuple[tuple[str, str], ...]:
        if not self.limit:
            return ()
        return _headers(self.limit, self.remaining, self.reset)


def _headers(limit: int, remaining: int, reset: float) -> tuple[tuple[str, str], ...]:
    return (
        ("x-ratelimit-limit-requests", str(limit)),
        ("x-ratelimit-remaining-requests", str(remaining)),
        ("x-ratelimit-reset-requests", f"{math.ceil(reset)}s"),
    )


class RequestLimits:
    """Sliding windows of request times by key id (or address, where there are no keys)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, deque[float]] = {}
        self._swept_at = clock()

    def reserve(self, who: str, per_minute: int) -> Reservation:
        """Count one request of `who`; `per_minute` 0 means no limit.

        Raises RateLimitExceeded with the true time until a request will pass.
        """
        now = self._clock()
        if not per_minute:
            return Reservation(None, now, 0, 0, 0.0)
        if now - self._swept_at > WINDOW_SECONDS:
            self._sweep(now)
        window = self._windows.get(who)
        if window is None:
            window = self._windows[who] = deque()
        horizon = now - WINDOW_SECONDS
        while window and window[0] <= horizon:
            window.popleft()
        if len(window) >= per_minute:
            # the limit may have been lowered since: it is the per_minute-th youngest that must leave
            wait = window[len(window) - per_minute] - horizon
            raise RateLimitExceeded(
                f"{per_minute} requests a minute are allowed for this key; the next one passes in {wait:.1f} s",
                retry_after=wait,
                headers=dict(_headers(per_minute, 0, wait)) | {"retry-after-ms": str(math.ceil(wait * 1000))},
            )
        window.append(now)
        return Reservation(window, now, per_minute, per_minute - len(window), window[0] - horizon)

    def _sweep(self, now: float) -> None:
        """Forget those who have not come for a minute, so that many addresses cost no memory."""
        self._swept_at = now
        horizon = now - WINDOW_SECONDS
        self._windows = {who: window for who, window in self._windows.items() if window and window[-1] > horizon}
