"""The plain form of a job, as NATS, RunPod, `/infer` and `/v1/completions` take it, and its answers.

A plain job is `{input | prompt | messages, params, raw, stream, req_id, trace_id, reply_to}` with any further fields
of OpenAI's beside them. It becomes the OpenAI request that it amounts to; nothing here waits or sends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from gateway.errors import BackendError, BadRequest, CorralError
from gateway.pipeline.call import Call, Fields, Route, take_model, take_places, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.events import text_in
from gateway.pipeline.frames import Frame
from gateway.pipeline.identity import sane_id
from gateway.pipeline.usage import Usage

_PROMPTS = ("input", "prompt", "messages")
_ENVELOPE = frozenset({*_PROMPTS, "params", "raw", "stream", "req_id", "trace_id", "reply_to", "model"})
_TRACE = re.compile(r"(?!0{32})[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain job as the OpenAI request that it amounts to; `fields` has neither its envelope nor model and stream."""

    template: str  # what records and metrics call its route
    chat: bool  # it goes through the model's chat template
    fields: Fields
    model: str | None
    stream: bool | None  # None: it does not say
    req_id: str | None
    trace_id: str | None  # 32 hexadecimal digits
    reply_to: str | None

    def route(self, template: str | None = None) -> Route:
        """`template`: of a door whose route has a name of its own."""
        if self.chat:
            return Route(template or self.template, "/v1/chat/completions", Dialect.CHAT)
        return Route(template or self.template, "/v1/completions", Dialect.COMPLETIONS)


def is_plain(fields: Fields) -> bool:
    """Whether a body sent to `/v1/completions` is in the plain form: OpenAI's has a prompt, and no input."""
    return "input" in fields and "prompt" not in fields


def template_of(given: Iterable[str]) -> str:
    """The route that a plain body amounts to, told by the names in it that are not null, if the body is wrong
    otherwise; empty where not even that can be told.
    """
    names = set(given)
    if "messages" in names:
        return "/v1/chat/completions"
    return "/v1/completions" if names.intersection(_PROMPTS) else ""


def plain_job(fields: Fields, *, raw: bool = False) -> Plain:
    """What a plain body asks for. A text is the user's message to the model, through its chat template, unless `raw`
    says that it is to be continued as it stands; `raw` here is for bodies that do not say.

    Fields of `params` win over those beside it. Raises BadRequest.
    """
    prompt = _only_prompt(fields)
    params = _params(fields)
    stream = typed_field(fields | params, "stream", bool, "true or false")
    beside = {name: value for name, value in fields.items() if name not in _ENVELOPE}
    asked = beside | {name: value for name, value in params.items() if name != "stream"}
    said = typed_field(fields, "raw", bool, "true or false")
    chat = prompt == "messages" or not (raw if said is None else said)
    if prompt == "messages":
        if said:
            raise BadRequest("raw takes a text in input or prompt, not messages", param="raw")
        asked["messages"] = fields["messages"]
    else:
        text = typed_field(fields, prompt, str, "a string")
        asked |= _encoded({"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text})
    if take_places(asked) != 1:
        raise BadRequest("n must be 1: the answer holds one text", param="n")
    return Plain(
        template="/v1/chat/completions" if prompt == "messages" else "/v1/completions",
        chat=chat,
        fields=asked,
        model=take_model(fields),
        stream=stream,
        req_id=sane_id(_text(fields, "req_id")),
        trace_id=_trace_in(fields),
        reply_to=_text(fields, "reply_to"),
    )


def fill_call(call: Call, plain: Plain, *, stream: bool, template: str | None = None) -> None:
    """`call` becomes the one for a plain job."""
    call.route = plain.route(template)
    call.fields = dict(plain.fields) | _encoded({"stream": stream})
    if plain.model is not None:
        call.fields |= _encoded({"model": plain.model})
    call.model, call.stream, call.places = plain.model, stream, 1


def trace_of(trace_id: str, traceparent: str) -> str:
    """`traceparent` with another trace's id, its span kept."""
    return f"00-{trace_id}-{traceparent[36:]}"


# --- answers


class Told(NamedTuple):
    """An answer that is complete: its text, and why it ended (`stop`, `length`, …)."""

    text: str
    finish_reason: str | None


@dataclass(slots=True)
class Text:
    """Follows an answer event by event, and keeps its text."""

    dialect: Dialect
    finish_reason: str | None = None
    _pieces: list[str] = field(default_factory=list)

    def take(self, frame: Frame) -> str:
        """The text that this event brings, most often a token, or "". Raises BackendError."""
        piece = text_in(self.dialect, frame)
        if piece:
            self._pieces.append(piece)
        if b'"finish_reason"' in frame.data:
            self.finish_reason = _finish_reason(frame.data) or self.finish_reason
        return piece

    def told(self) -> Told:
        return Told("".join(self._pieces), self.finish_reason)


def told_in(body: bytes) -> Told:
    """The text in a whole answer of OpenAI's chat or completions. Raises BackendError."""
    try:
        choice = msgspec.json.decode(body)["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        return Told(text if isinstance(text, str) else "", choice.get("finish_reason"))
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise BackendError(f"llama-server sent an answer that cannot be read: {error}") from None


def plain_token(req_id: str, text: str) -> dict[str, Any]:
    return {"req_id": req_id, "token": text}


def plain_answer(req_id: str, told: Told, usage: Usage, seconds: float) -> dict[str, Any]:
    return {
        "req_id": req_id,
        "text": told.text,
        "tokens_in": usage.prompt,
        "tokens_out": usage.completion,
        "ms": round(seconds * 1000),
    }


def plain_failure(req_id: str, error: CorralError, seconds: float, text: str = "") -> dict[str, Any]:
    """The answer of a job that failed, where there is no status to tell it by; `text` is what had come until then."""
    return plain_answer(req_id, Told(text, None), Usage(), seconds) | error.body()


def infer_token(text: str) -> dict[str, Any]:
    return {"token": text, "done": False}


def infer_answer(told: Told, usage: Usage, seconds: float) -> dict[str, Any]:
    return {
        "done": True,
        "content": told.text,
        "finish_reason": told.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
        },
        "stats": {"duration_ms": round(seconds * 1000)},
    }


def infer_failure(error: CorralError) -> dict[str, Any]:
    return {"error": error.message, "code": error.code}


# --- parts of a body


def _only_prompt(fields: Fields) -> str:
    given = [name for name in _PROMPTS if name in fields and bytes(fields[name]) != b"null"]
    if not given:
        raise BadRequest("there is nothing to answer: send input, prompt or messages", param="input")
    if len(given) > 1:
        raise BadRequest(f"{' and '.join(given)} are given: send one of them", param=given[1])
    return given[0]


def _params(fields: Fields) -> Fields:
    params = typed_field(fields, "params", Fields, "an object") or {}
    for name in (_ENVELOPE - {"stream"}).intersection(params):
        raise BadRequest(f"{name} belongs beside params, not in it", param=f"params.{name}")
    return params


def _text(fields: Fields, name: str) -> str | None:
    return typed_field(fields, name, str, "a string")


def _trace_in(fields: Fields) -> str | None:
    """Also as a UUID, or in upper case; what is no trace is none."""
    digits = (_text(fields, "trace_id") or "").replace("-", "").lower()
    return digits if _TRACE.fullmatch(digits) else None


def _encoded(values: dict[str, Any]) -> Fields:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


def _finish_reason(data: bytes) -> str | None:
    try:
        reason = msgspec.json.decode(data)["choices"][0].get("finish_reason")
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError):
        return None
    return reason if isinstance(reason, str) else None
