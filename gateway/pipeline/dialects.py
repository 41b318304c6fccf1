"""The dialects of the inference routes: how each is asked for a stream, how its streams end, how they tell an error.

What is said about llama-server was seen on build 11669.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import msgspec

_DONE = (b"data: [DONE]", b"data:[DONE]")
_ERROR_LINES = (b'data: {"error"', b'data:{"error"', b"event: error", b"event:error")


class Dialect(enum.Enum):
    """What a route speaks. The first five generate text; of the others nothing is ever streamed or assembled."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    NATIVE = "native"
    RESPONSES = "responses"
    MESSAGES = "messages"
    EMBEDDINGS = "embeddings"
    RERANK = "rerank"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    APPLY_TEMPLATE = "apply-template"
    COUNT_TOKENS = "count_tokens"
    TRANSCRIPTIONS = "transcriptions"

    __hash__ = object.__hash__  # each is there once; Enum's own looks its name up, and requests ask often

    def __init__(self, value: str) -> None:
        self.generates = value in ("chat", "completions", "native", "responses", "messages")

    def ask_stream(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`request` as llama-server gets it when we want a stream of it to assemble; see `assemble.assembler`."""
        asked = {**request, "stream": True}
        if self is Dialect.CHAT or self is Dialect.COMPLETIONS:
            options = request.get("stream_options")
            asked["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        elif self is Dialect.NATIVE:
            asked.pop("response_fields", None)  # would hide the final event; the assembler applies them
        return asked

    def assembles(self, request: Mapping[str, Any]) -> bool:
        """Whether an answer assembled from a stream is the one that llama-server gives without streaming.

        Where it is not, the request has to be sent as it is. The reasons are in `_differs`.
        """
        return self.generates and not _differs(self, request)

    def ended_well(self, tail: bytes) -> bool:
        """Whether a stream whose payload ends with `tail` (its last 4 KB, or all of it) came to its own end.

        True for dialects without streams. A final event that begins before the tail is known by its last fields;
        none of them can stand in a text, where their quotes would be escaped. With several answers in one native
        stream (`n_cmpl`, a list of prompts) only the last one is looked at.
        """
        if not self.generates:
            return True
        if error_in(tail) is not None:
            return False
        if self is Dialect.CHAT or self is Dialect.COMPLETIONS:
            return tail[-64:].rstrip().rpartition(b"\n")[2] in _DONE
        if not tail.endswith(b"\n"):
            return False
        last, cut = last_frame(tail)
        if self is Dialect.NATIVE:
            return b'"stop":true' in last or (cut and b'"stop_type":"' in last)
        if self is Dialect.MESSAGES:
            return b'"message_stop"' in last
        return last.startswith(_RESPONSE_ENDS) or (cut and b'"usage":{' in last)

    def error_frame(self, error_body: Mapping[str, Any]) -> bytes:
        """The event that tells a client of this dialect about an error; `error_body` is CorralError.body()."""
        error = error_body["error"]
        if self is Dialect.MESSAGES:
            shown: dict[str, Any] = {"type": "error", "error": anthropic_error(error)}
            return b"event: error\ndata: " + msgspec.json.encode(shown) + b"\n\n"
        if self is Dialect.RESPONSES:
            shown = {
                "type": "error",
                "code": error.get("code"),
                "message": error["message"],
                "param": error.get("param"),
                "sequence_number": 0,
            }
            return b"event: error\ndata: " + msgspec.json.encode(shown) + b"\n\n"
        return b"data: " + msgspec.json.encode({"error": error}) + b"\n\n"


_ANTHROPIC_TYPES = {
    "not_found": "not_found_error",
    "model_not_found": "not_found_error",
    "grammar_not_found": "not_found_error",
    "payload_too_large": "request_too_large",
    "insufficient_quota": "rate_limit_error",
    "backend_timeout": "timeout_error",
    "queue_full": "overloaded_error",
    "queue_timeout": "overloaded_error",
    "model_loading": "overloaded_error",
    "insufficient_memory": "overloaded_error",
    "shutting_down": "overloaded_error",
}
_SHARED_TYPES = frozenset({"invalid_request_error", "authentication_error", "permission_error", "rate_limit_error"})


def anthropic_error(error: Mapping[str, Any]) -> dict[str, Any]:
    """The inner error object of `/v1/messages`; `error` is that of CorralError.body()."""
    kind = _ANTHROPIC_TYPES.get(error["code"])
    if kind is None:
        kind = error["type"] if error["type"] in _SHARED_TYPES else "api_error"
    return {"type": kind, "message": error["message"]}


_RESPONSE_ENDS = (b"event: response.completed\n", b"event: response.incomplete\n", b"event: response.failed\n")


def last_frame(tail: bytes) -> tuple[bytes, bool]:
    """The last event of a stream's tail, and whether its beginning lies before the tail."""
    text = (tail.replace(b"\r\n", b"\n") if b"\r" in tail else tail).rstrip(b"\n")
    before = text.rfind(b"\n\n")
    last = text[before + 2 :] if before >= 0 else text
    return last, before < 0 and not last.startswith((b"data:", b"event:", b":"))


def error_in(tail: bytes) -> dict[str, Any] | None:
    """The error object that a stream ended with, if it did.

    llama-server sends it as `data: {"error":{…}}`, in /v1/messages as `event: error` with the bare object, and then
    ends the connection cleanly, without the dialect's terminator.
    """
    for line in _ERROR_LINES if b"error" in tail else ():
        at = tail.rfind(line)
        if at >= 0 and (at == 0 or tail[at - 1] == 0x0A):
            return _error_object(tail[tail.find(b"data:", at) + 5 :].partition(b"\n")[0])
    return None


def _error_object(data: bytes) -> dict[str, Any]:
    try:
        told = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        told = None
    inner = told.get("error", told) if isinstance(told, dict) else None
    return inner if isinstance(inner, dict) else {"message": str(inner or "unreadable error")}


def _differs(dialect: Dialect, request: Mapping[str, Any]) -> bool:
    """Where llama-server's stream lacks, or has more than, what the same request gives without streaming."""
    turns = request.get("input" if dialect is Dialect.RESPONSES else "messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        return True  # it continues that message: the stream begins behind it, the whole answer with it
    wants_probs = any(request.get(name) for name in ("logprobs", "top_logprobs", "n_probs"))
    if dialect is Dialect.CHAT:
        # Refused with tools; else lost for tokens that make no delta of their own, such as </think>.
        return wants_probs
    if dialect is Dialect.NATIVE and request.get("return_tokens"):
        return True  # the stream leaves out all but the last token of a character
    # After a stop word the whole answer lacks as many tokens' probabilities as the word has tokens of its own.
    return wants_probs and bool(request.get("stop"))
