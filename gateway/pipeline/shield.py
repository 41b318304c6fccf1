"""What may go to llama-server: fields that can hurt it are removed, bounded or refused; everything else passes.

The facts behind each rule were tried on llama-server build 11669.
"""

from __future__ import annotations

import msgspec

from gateway.errors import BadRequest, GrammarNotFound
from gateway.pipeline.bounds import check_grammar, check_schema
from gateway.pipeline.call import Call, Fields, typed_field
from gateway.pipeline.dialects import Dialect

# Another client's slot, adapters of the whole server, an answer kept after its client left, pings of its own.
_REMOVED = ("id_slot", "lora", "conversation_id", "sse_ping_interval")

# The fields that bound an answer, strongest first: llama-server lets the first ones override the last. What is
# forwarded is one of them, bounded; without it a request would run to the end of the context.
_BOUNDS: dict[Dialect, tuple[str, ...]] = {
    Dialect.CHAT: ("n_predict", "max_completion_tokens", "max_tokens"),
    Dialect.COMPLETIONS: ("n_predict", "max_completion_tokens", "max_tokens"),
    Dialect.NATIVE: ("n_predict", "max_completion_tokens", "max_tokens"),
    Dialect.MESSAGES: ("n_predict", "max_completion_tokens", "max_tokens"),
    Dialect.RESPONSES: ("n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens"),
}
# What llama-server compiles to a grammar; /v1/responses has its format in `text`, /v1/messages in `output_config`.
_COMPILED = ("json_schema", "response_format", "tools", "functions", "text", "output_config", "output_format")
_WITH_MESSAGES = frozenset({Dialect.CHAT, Dialect.MESSAGES, Dialect.APPLY_TEMPLATE, Dialect.COUNT_TOKENS})

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_PROBABILITIES = 100  # of each token; each one costs a pass over the vocabulary's best

_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_strings = msgspec.json.Decoder(list[str] | str | None)


def shielded(call: Call) -> Fields:
    """The fields that may be forwarded. Raises BadRequest, GrammarNotFound."""
    fields = {name: value for name, value in call.fields.items() if name not in _REMOVED}
    if call.route.dialect in _WITH_MESSAGES:
        _check_messages(fields)
    if call.route.dialect.generates:
        _check_stops(fields)
        _check_probabilities(fields)
        _check_compiled(fields)
        for name in _BOUNDS[call.route.dialect]:
            _token_bound(fields, name)
    return fields


def bound_answer(fields: Fields, dialect: Dialect, *, default: int | None, most: int) -> int:
    """Puts one field of at most `most` tokens in place of all that bound an answer.

    Returns that bound, or 0 where nothing is generated.
    """
    if not dialect.generates:
        return 0
    names = _BOUNDS[dialect]
    asked = [value for name in names if (value := _token_bound(fields, name)) is not None]
    wanted = asked[0] if asked else default
    bound = most if wanted is None else min(wanted, most)
    for name in names:
        fields.pop(name, None)
    fields[names[-1]] = msgspec.Raw(str(bound).encode())
    return bound


def _token_bound(fields: Fields, name: str) -> int | None:
    value = typed_field(fields, name, int, "a whole number of at least 0")
    if value is not None and value < 0:
        raise BadRequest(f"{name} is {value}: must be a whole number of at least 0", param=name)
    return value


def _check_messages(fields: Fields) -> None:
    """llama-server answers an empty list with words, and a message without a role with a failure of its own."""
    raw = fields.get("messages")
    if raw is None:
        raise BadRequest("messages is missing", param="messages")
    try:
        messages = _messages.decode(raw)
    except msgspec.DecodeError:
        raise BadRequest("messages must be a list of objects", param="messages") from None
    if not messages:
        raise BadRequest("messages is empty: it must hold at least one message", param="messages")
    for index, message in enumerate(messages):
        if not bytes(message.get("role", b"")).startswith(b'"'):
            raise BadRequest(f"messages[{index}].role must be a string", param=f"messages[{index}].role")


def _check_stops(fields: Fields) -> None:
    for name in ("stop", "stop_sequences"):
        raw = fields.get(name)
        if raw is None:
            continue
        try:
            stops = _strings.decode(raw) or []
        except msgspec.DecodeError:
            raise BadRequest(f"{name} must be a string or a list of strings", param=name) from None
        stops = [stops] if isinstance(stops, str) else stops
        if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in stops):
            raise BadRequest(
                f"{name} may hold {MAX_STOPS} strings of {MAX_STOP_CHARACTERS} characters at most", param=name
            )


def _check_probabilities(fields: Fields) -> None:
    for name in ("n_probs", "top_logprobs"):
        value = typed_field(fields, name, int, f"a whole number from 0 to {MAX_PROBABILITIES}")
        if value is not None and not 0 <= value <= MAX_PROBABILITIES:
            raise BadRequest(f"{name} is {value}: must be from 0 to {MAX_PROBABILITIES}", param=name)


def _check_compiled(fields: Fields) -> None:
    grammar = typed_field(fields, "grammar", str, "a string")
    if grammar and "::=" not in grammar:
        raise GrammarNotFound(f"there is no grammar named {grammar[:64]!r}", param="grammar")
    if grammar:
        check_grammar(grammar, "grammar")
    for name in _COMPILED:
        raw = fields.get(name)
        if raw is not None and len(bytes(raw)) > 2:
            check_schema(bytes(raw), name)
