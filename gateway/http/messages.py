"""`/v1/messages` with a grammar or a JSON schema: asked for as a chat, which llama-server holds to it, and told in
Anthropic's words.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.errors import CorralError
from gateway.http.dialects import Voice
from gateway.pipeline.anthropic import (
    become_chat,
    block_start,
    endings,
    message,
    message_start,
    text_delta,
)
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.grammars import rules_of
from gateway.pipeline.plain import Told
from gateway.pipeline.usage import Usage


def held_to_form(call: Call) -> Voice | None:
    """None where nothing rules the answer: then llama-server speaks for itself. Raises BadRequest."""
    rules = rules_of(call.fields)
    if not rules:
        return None
    become_chat(call, rules)
    return Messages(f"msg_{call.request_id}", call.model or "")


class Messages(Voice):
    """Anthropic's events, or one message."""

    content_type = "text/event-stream"
    pings = True

    def __init__(self, message_id: str, model: str) -> None:
        self._id, self._model = message_id, model
        self._begun = False

    def token(self, text: str) -> bytes:
        return self._beginning() + _event(text_delta(text))

    def answer(self, told: Told, usage: Usage, seconds: float, *, streamed: bool) -> bytes:
        if not streamed:
            return msgspec.json.encode(message(self._id, self._model, told, usage))
        return self._beginning() + b"".join(_event(each) for each in endings(told, usage))

    def failure(self, error: CorralError) -> bytes:
        return Dialect.MESSAGES.error_frame(error.body())

    def _beginning(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return _event(message_start(self._id, self._model)) + _event(block_start())


def _event(told: dict[str, Any]) -> bytes:
    return f"event: {told['type']}\n".encode() + b"data: " + msgspec.json.encode(told) + b"\n\n"
