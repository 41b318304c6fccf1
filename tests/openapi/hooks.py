"""Hooks of schemathesis, for the process that test_conformance.py starts."""

from __future__ import annotations

import itertools
from typing import Any

import schemathesis

_numbers = itertools.count(1)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Each request from an address of its own: wrong keys are throttled per address, and would soon be 429 instead of
    401. The gateway trusts 127.0.0.1 as a proxy."""
    number = next(_numbers)
    case.headers["X-Forwarded-For"] = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
