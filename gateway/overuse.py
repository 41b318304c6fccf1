"""What a client is told whose key has used what it may: the words and headers of every 429, wherever it is decided."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gateway.errors import ConcurrencyExceeded, InsufficientQuota, RateLimitExceeded, TokensExceeded

Headers = Iterable[tuple[str, str]]

WHOLE_WINDOW = 60.0  # seconds


def too_many_requests(limit: int, wait: float, headers: Headers) -> RateLimitExceeded:
    """`wait`, here and below: seconds until the request will pass."""
    message = f"{limit} requests a minute are allowed for this key; the next one passes in {wait:.1f} s"
    return RateLimitExceeded(message, retry_after=wait, headers=_with_wait(headers, wait))


def too_many_tokens(limit: int, asked: int, wait: float, headers: Headers) -> TokensExceeded:
    message = f"{limit} tokens a minute are allowed for this key, and this request may use {asked}; it passes in "
    return TokensExceeded(f"{message}{wait:.1f} s", retry_after=wait, headers=_with_wait(headers, wait))


def never_so_many_tokens(limit: int, asked: int, headers: Headers) -> TokensExceeded:
    """It is larger than the limit by itself: the wait is for a shorter one, when all that was used has left."""
    return TokensExceeded(
        f"this request may use {asked} tokens, and {limit} a minute are allowed for this key: ask for a shorter answer",
        retry_after=WHOLE_WINDOW,
        headers=dict(headers) | {"x-should-retry": "false"},
    )


def too_many_at_once(limit: int, wait: float, headers: Headers) -> ConcurrencyExceeded:
    message = f"{limit} requests at once are allowed for this key, and as many run"
    return ConcurrencyExceeded(message, retry_after=wait, headers=_with_wait(headers, wait))


def too_many_held(limit: int, asked: int, wait: float, headers: Headers) -> ConcurrencyExceeded:
    """What is left of the day would do, if only running requests did not hold it; `wait` is until one has ended."""
    message = (
        f"{limit} tokens a day are allowed for this key; what its running requests may yet use of them leaves too few "
        f"for the {asked} of this one: ask again when one has ended, or for a shorter answer"
    )
    return ConcurrencyExceeded(message, retry_after=wait, headers=_with_wait(headers, wait))


def out_of_quota(limit: int, left: int, asked: int, wait: float | None, headers: Headers) -> InsufficientQuota:
    """`left`: what was not used; running requests may hold some of it."""
    return InsufficientQuota(
        f"{limit} tokens a day are allowed for this key, {max(0, left)} are left, and this request may use {asked}; "
        "the next day begins at 00:00 UTC",
        retry_after=wait,
        headers=dict(headers),
    )


def _with_wait(headers: Headers, wait: float) -> dict[str, str]:
    return dict(headers) | {"retry-after-ms": str(math.ceil(wait * 1000))}
