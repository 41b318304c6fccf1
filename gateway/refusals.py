"""llama-server's own errors as ours: the only place that knows them (CONTRACT 6, the errors table)."""

from __future__ import annotations

import json
import re
from typing import Any

from gateway.errors import (
    BackendError,
    BackendReply,
    BadRequest,
    ContextLengthExceeded,
    CorralError,
    ModelLoading,
    NotSupported,
    RateLimitExceeded,
)

# Seen on build 11669: bad input that llama-server reports as its own failure, status 500.
_BAD_INPUT = re.compile(
    r"image|audio|mmproj|multimodal|role|content|message|template|json\.exception|tool|schema|grammar|parse|invalid"
    r"|unsupported|unknown|must be|expected|missing|range_check",
    re.IGNORECASE,
)
_TOO_LARGE = re.compile(r"too large to process")  # an embedding's input, status 500 as well
_SECONDS = re.compile(r"[0-9]{1,9}")
MAX_MESSAGE = 2000  # characters of one; llama-server quotes what it refuses, megabytes of it
_MOST_CUT = 12  # bytes at the end of a text that may be half a character: two escapes of six


def translate_error(status: int, body: bytes, retry_after: str | None = None) -> CorralError:
    """The error of a whole reply; its message is kept, and codes are strings, as OpenAI's clients expect.

    `body` may break off in its message, where that is long; `retry_after` is the reply's header.
    """
    try:
        error = _read(body)["error"]
        message, kind = str(error["message"]), str(error.get("type", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        if status == 429:
            return _busy("the backend takes no more requests now", retry_after)
        if status in (400, 413, 414, 415, 416, 431):  # its HTTP library refuses, in words of its own or none
            return BadRequest(f"llama-server could not read the request (status {status})")
        return BackendError(f"llama-server answered {status} with a body that is not its error format")
    return _named(status, message, kind, retry_after)


def _read(body: bytes) -> Any:
    """As far as it goes, where it breaks off in the error's message. Raises ValueError, RecursionError."""
    try:
        return json.loads(body)
    except ValueError:
        for cut in range(_MOST_CUT):
            try:
                return json.loads(body[: len(body) - cut] + b'"}}')
            except ValueError:
                continue
        raise


def _busy(message: str, retry_after: str | None) -> CorralError:
    seconds = _SECONDS.fullmatch(retry_after or "")  # it may be a date instead
    return RateLimitExceeded(message, retry_after=int(seconds[0]) if seconds else 1)


def _named(status: int, message: str, kind: str, retry_after: str | None = None) -> CorralError:
    if len(message) > MAX_MESSAGE:
        message = message[: MAX_MESSAGE - 1] + "…"
    if kind == "exceed_context_size_error" or _TOO_LARGE.search(message):
        return ContextLengthExceeded(message)
    if status in (401, 403):
        return BackendError("llama-server refused the gateway's own key")
    if status in (404, 501):
        return NotSupported(f"this model or this llama-server cannot do that: {message}")
    if status == 503:
        return ModelLoading(message, retry_after=2)
    if status == 429:
        return _busy(message, retry_after)
    if status < 500 or (status == 500 and _BAD_INPUT.search(message)):
        client = status if 400 <= status < 500 else 400
        return BackendReply(message, status=client, type="invalid_request_error", code="invalid_request")
    return BackendError(f"llama-server failed: {message}")


def translate_event(error: dict[str, object]) -> CorralError:
    """The error that llama-server put into a stream; bad input may come up only there."""
    code = error.get("code")
    message, kind = str(error.get("message", "it did not say why")), str(error.get("type", ""))
    return _named(code if isinstance(code, int) else 500, message, kind)
