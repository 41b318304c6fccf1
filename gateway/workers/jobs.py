"""What becomes of a queued job that failed, and how often it is tried. Pure: a table, counts and a clock.

A job may be delivered again for three reasons:

- it failed: llama-server died under it, or could not do it.
- its worker gave it back: it was shutting down, or a limit was reached. That is nobody's fault, and never ends a job.
- nothing was said of it: its worker vanished, or somebody else refused it.

The first two are written down by the worker that lives to do so (`Attempts`); what is left of the deliveries is the
third. Failed and silent ones together are its tries, and after MOST_TRIES of them it is given up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from gateway.errors import CorralError

MOST_TRIES = 3
_PAUSES = (1.0, 5.0)  # seconds after the first and the second failure
_PATIENCE = 2.0  # seconds, for what is given back without a time of its own


class Cancelled(CorralError):
    """Somebody said that the job is not wanted any more."""

    status, type, code = 499, "cancelled", "cancelled"

    def __init__(self) -> None:
        super().__init__("the job was cancelled")


class Kind(StrEnum):
    FINAL = "final"  # the same again would end the same: the job is answered with the error
    FAILED = "failed"  # tried again, MOST_TRIES times in all
    RETURNED = "returned"  # tried again, here or by another worker, as often as it takes


# By the error's code; others by its status: below 500 final, else failed.
KINDS = {
    "rate_limit_exceeded": Kind.RETURNED,
    "tokens_exceeded": Kind.RETURNED,
    "concurrency_exceeded": Kind.RETURNED,
    "insufficient_quota": Kind.FINAL,
    "queue_full": Kind.RETURNED,
    "queue_timeout": Kind.RETURNED,
    "model_loading": Kind.RETURNED,
    "shutting_down": Kind.RETURNED,
    "model_not_found": Kind.RETURNED,  # a reload took it away from this worker, under which others go on with it
    "model_failed": Kind.FAILED,
    "insufficient_memory": Kind.FAILED,
    "not_supported": Kind.FINAL,
    "backend_error": Kind.FAILED,
    "backend_timeout": Kind.FAILED,
    "internal_error": Kind.FAILED,
}


def kind_of(error: CorralError) -> Kind:
    if error.status < 500 and error.code not in KINDS:
        return Kind.FINAL
    return KINDS.get(error.code, Kind.FAILED if error.status >= 500 else Kind.FINAL)


def pause_before_next(kind: Kind, error: CorralError, failures: int) -> float:
    """Seconds until the job is delivered again; `failures` with this one."""
    if kind is Kind.FAILED:
        return _PAUSES[min(failures, len(_PAUSES)) - 1]
    if error.code in ("shutting_down", "model_not_found"):
        return 0.0  # for another worker, at once
    return error.retry_after or _PATIENCE


class Failure(NamedTuple):
    """One failed try."""

    code: str
    message: str
    worker: str
    at: float  # unix seconds


@dataclass(frozen=True, slots=True)
class Attempts:
    """What workers have written down of one message of the stream."""

    failures: tuple[Failure, ...] = ()
    returned: int = 0
    reply_to: str | None = None  # where its answer goes; the message of a later delivery does not tell
    answer: str | None = None  # of a job that ended in an error: what was sent, so that it is the same again
    dead: str | None = None  # the reason for which it was given up

    def failed(self, error: CorralError, worker: str, at: float) -> Attempts:
        return replace(self, failures=(*self.failures, Failure(error.code, error.message[:1000], worker, at)))

    def gave_back(self) -> Attempts:
        return replace(self, returned=self.returned + 1)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)


_decoder = msgspec.json.Decoder(Attempts)


def attempts_in(data: bytes | None) -> Attempts:
    """What cannot be read counts as nothing."""
    try:
        return _decoder.decode(data) if data else Attempts()
    except (msgspec.DecodeError, RecursionError):
        return Attempts()


def given_up(attempts: Attempts, ended: int) -> str | None:
    """Why a job is not tried again of which so many deliveries have ended; None: it is."""
    failures = len(attempts.failures)
    silent = max(0, ended - failures - attempts.returned)
    if failures + silent < MOST_TRIES:
        return None
    parts = []
    if attempts.failures:
        last = attempts.failures[-1]
        parts.append(f"failed {_times(failures)}, at last with {last.code}: {last.message}")
    if silent:
        parts.append(
            f"was delivered {_times(silent)} without a word from who had it: a worker that vanished, most often"
        )
    return "; ".join(parts)


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def dead_letter(
    req_id: str, model: str, payload: bytes, reason: str, deliveries: int, attempts: Attempts
) -> dict[str, Any]:
    """What is published for a job that is given up; `job` is its payload, as JSON where it is, fit to be sent again."""
    try:
        job: object = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        job = payload.decode("utf-8", "replace")
    return {
        "req_id": req_id,
        "model": model,
        "reason": reason,
        "deliveries": deliveries,
        "failures": [failure._asdict() for failure in attempts.failures],
        "job": job,
    }
