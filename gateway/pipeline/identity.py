"""The names that a request goes by: its id, and its place in a trace."""

from __future__ import annotations

import re
from os import urandom

_SANE = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_AT_ONCE = 64  # a system call for so many requests
_DIGITS = 72  # 16 of a span, 32 of a trace, 24 of a request
_unused: list[str] = []
_PARENT = r"-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
# A higher version than 00 is read as far as it is known: it begins the same, and may have more behind it.
_TRACEPARENT = re.compile(rf"00{_PARENT}|(?!00|ff)[0-9a-f]{{2}}{_PARENT}(?:-.*)?")


def new_request_id() -> str:
    return f"req_{urandom(12).hex()}"


def sane_id(given: str | None) -> str | None:
    """A request's own name for itself, where it can be used as one."""
    return given if given and _SANE.fullmatch(given) else None


def identity(given_id: str | None, given_trace: str | None) -> tuple[str, str]:
    """The request's id, which is the client's own where it is sane, and its W3C `traceparent`: the same trace with a
    span of ours, or a new one."""
    if not _unused:
        digits = urandom(_AT_ONCE * _DIGITS // 2).hex()
        _unused.extend(digits[at : at + _DIGITS] for at in range(0, len(digits), _DIGITS))
    fresh = _unused.pop()
    request_id = given_id if given_id and _SANE.fullmatch(given_id) else f"req_{fresh[48:]}"
    if given_trace and _TRACEPARENT.fullmatch(given_trace):
        return request_id, f"00{given_trace[2:36]}{fresh[:16]}{given_trace[52:55]}"
    return request_id, f"00-{fresh[16:48]}-{fresh[:16]}-01"
