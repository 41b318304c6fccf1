"""RunPod's jobs as requests, and answers as RunPod's clients know them. Pure: nothing here waits or sends.

A job's input has one of three forms:

- OpenAI's, by its route: `{"openai_route": "/v1/chat/completions", "openai_input": {…}}`. The output is what the route
  answers: its object, or the stream's own lines as text.
- plain, as at the other doors (pipeline/plain.py): `{"input" | "prompt" | "messages", "params": {…}, "stream"}`; also
  as the body of /v1/completions, as over HTTP.
- plain, as RunPod's vLLM worker takes it: `{"prompt" | "messages", "sampling_params": {…}, "apply_chat_template"}`.

Both plain forms get the same outputs, which hold what clients of either look for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import BackendError, BadRequest, CorralError, NotFound, PayloadTooLarge
from gateway.pipeline.call import Call, Fields, parse_json_object, read_fields, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import Frame
from gateway.pipeline.plain import (
    Plain,
    Text,
    Told,
    fill_call,
    is_plain,
    plain_answer,
    plain_job,
    plain_token,
    template_of,
    told_in,
)
from gateway.pipeline.routes import INFER, ROUTES
from gateway.pipeline.usage import Usage

MODELS_ROUTE = "/v1/models"
_OF_VLLM = ("sampling_params", "apply_chat_template")
_BATCHING = ("max_batch_size", "min_batch_size", "batch_size_growth_factor", "use_openai_format")
_LLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}  # vLLM's name → llama-server's


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job asks for. One of the first three is set."""

    size: int  # bytes of its input, as JSON
    models: bool = False  # the list of models
    plain: Plain | None = None
    template: str | None = None  # OpenAI's form: the route, with its body
    body: bytes = b""

    def fill(self, call: Call) -> None:
        """`call` becomes the one for this job. Raises BadRequest, InvalidJSON."""
        if self.plain is not None:
            fill_call(call, self.plain, stream=bool(self.plain.stream))
        elif self.template is not None:
            call.route = ROUTES[self.template]
            read_fields(call, self.body)


def read_job(given: object, most_bytes: int) -> Asked:
    """What a job's input asks for. Raises BadRequest, NotFound, PayloadTooLarge."""
    if isinstance(given, str):
        given = {"input": given}
    if not isinstance(given, dict):
        raise BadRequest("the job's input must be an object")
    body = _encoded(given)
    if len(body) > most_bytes:
        raise PayloadTooLarge(f"the job's input is larger than the {most_bytes} bytes of MAX_REQUEST_BODY_SIZE")
    if "openai_route" in given:
        return _by_route(given, len(body))
    fields = parse_json_object(body)
    of_vllm = any(name in fields for name in _OF_VLLM)
    return Asked(len(body), plain=plain_job(_from_vllm(fields) if of_vllm else fields, raw=of_vllm))


def route_of(given: object) -> str:
    """The route of a job that is wrong, as far as it can be told: one of ROUTES, or empty."""
    if isinstance(given, str):
        return template_of(["input"])
    if not isinstance(given, dict):
        return ""
    route = given.get("openai_route")
    if "openai_route" not in given:
        return template_of(name for name in given if given[name] is not None)
    named = "/" + route.strip("/") if isinstance(route, str) else ""
    return named if named in ROUTES else ""


def _by_route(given: dict[str, Any], size: int) -> Asked:
    route = given["openai_route"]
    if not isinstance(route, str):
        raise BadRequest("openai_route must be a string, such as /v1/chat/completions", param="openai_route")
    route = "/" + route.strip("/")
    if route in (MODELS_ROUTE, "/models"):
        return Asked(size, models=True)
    if route not in ROUTES or ROUTES[route].dialect is Dialect.TRANSCRIPTIONS:
        raise NotFound(f"there is no {route[:200]!r} for jobs: such as /v1/chat/completions", param="openai_route")
    if route == INFER:
        raise NotFound("/infer is no openai_route: send its fields as the job's input", param="openai_route")
    if not isinstance(given.get("openai_input"), dict):
        raise BadRequest("openai_input must be an object: the body for openai_route", param="openai_input")
    body = _encoded(given["openai_input"])
    if ROUTES[route].dialect is Dialect.COMPLETIONS and is_plain(fields := parse_json_object(body)):
        return Asked(size, plain=plain_job(fields))
    return Asked(size, template=route, body=body)


def _from_vllm(fields: Fields) -> Fields:
    """The plain form of a job for vLLM's worker, which continues a prompt as it stands unless it is told not to."""
    own = {name: value for name, value in fields.items() if name not in (*_OF_VLLM, *_BATCHING)}
    params = typed_field(fields, "sampling_params", Fields, "an object") or {}
    templated = typed_field(fields, "apply_chat_template", bool, "true or false")
    if templated is not None and "messages" not in own and "raw" not in own:
        own["raw"] = msgspec.Raw(msgspec.json.encode(not templated))
    if params:
        own["params"] = msgspec.Raw(
            msgspec.json.encode({_LLAMA_NAMES.get(name, name): params[name] for name in params})
        )
    return own


def _encoded(value: object) -> bytes:
    """Raises BadRequest: the SDK's decoder takes more than JSON has."""
    try:
        return msgspec.json.encode(value)
    except (UnicodeEncodeError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise BadRequest(f"the job's input is not valid JSON: {error}") from None


# --- outputs


class Raw:
    """OpenAI's form: what the route answers, as it is."""

    def __init__(self, stream: bool) -> None:
        self._stream = stream

    def take(self, frames: Sequence[Frame]) -> Any:
        """The output for some events of a stream, or for a whole answer. Raises BackendError."""
        return _lines(frames) if self._stream else _decoded(frames[0].data)

    def end(self, usage: Usage, seconds: float) -> Any:
        return None


class PlainForm:
    """Corral's own fields, with `choices` and `usage` as vLLM's worker gives them beside those."""

    def __init__(self, req_id: str, dialect: Dialect, stream: bool) -> None:
        self._req_id, self._stream = req_id, stream
        self._text = Text(dialect)
        self._told: Told | None = None

    def take(self, frames: Sequence[Frame]) -> Any:
        """Some tokens of a stream; None where there are none. Raises BackendError."""
        if not self._stream:
            self._told = told_in(frames[0].data)
            return None
        pieces = [piece for frame in frames if (piece := self._text.take(frame))]
        return plain_token(self._req_id, "".join(pieces)) | {"choices": [{"tokens": pieces}]} if pieces else None

    def end(self, usage: Usage, seconds: float) -> Any:
        """The answer. After a stream `choices` hold no tokens: a client adds up all that it is sent."""
        told = self._told or self._text.told()
        choice = {"tokens": [] if self._stream else [told.text], "finish_reason": told.finish_reason}
        about = {"choices": [choice], "usage": {"input": usage.prompt, "output": usage.completion}}
        return plain_answer(self._req_id, told, usage, seconds) | about


def shape_of(asked: Asked, call: Call) -> Raw | PlainForm:
    if asked.plain is None:
        return Raw(call.stream)
    return PlainForm(call.request_id, call.route.dialect, call.stream)


def failure(error: CorralError) -> dict[str, str]:
    """RunPod fails a job that gives this out, and shows the text: the error's fields as JSON."""
    return {"error": msgspec.json.encode(error.body()["error"]).decode()}


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BackendError(f"llama-server sent an answer that cannot be read: {error}") from None


def _lines(frames: Sequence[Frame]) -> str:
    """Events as the lines in which they came."""
    parts = []
    for frame in frames:
        event = f"event: {frame.event}\n" if frame.event else ""
        parts.append(f"{event}data: {frame.data.decode(errors='replace')}\n\n")
    return "".join(parts)
