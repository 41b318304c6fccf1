"""What may go to llama-server: fields that can hurt it are removed, bounded or refused; everything else passes.

The facts behind each rule were tried on llama-server build 11669.
"""

from __future__ import annotations

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.bounds import check_schema
from gateway.pipeline.call import Call, Fields, are_plain, count_prompts, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.grammars import GrammarTexts, NoGrammars, put_grammar, refuse_ignored
from gateway.pipeline.responses import check_responses

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

# Lists of more items than this keep llama-server busy for longer than anybody waits. Seen on build 11669: 100,000
# prompts: 9 GB, and nothing for others after 60 s; 250,000 messages: 60 s of a core, 2 GB; an object of 50,000 biases:
# 15 s; 3,000,000 letters of samplers: 17 s of nothing for others; 1,000,000 sequence breakers: more than 60 s.
_ITEMS = {
    "messages": 8192,
    "input": 8192,  # of /v1/responses; what is embedded or ranked is bounded below
    "logit_bias": 4096,
    "samplers": 64,
    "dry_sequence_breakers": 64,
    "preserved_tokens": 1024,
    "response_fields": 1024,
    "input_extra": 1024,
}
MAX_PROMPTS = 2048  # or texts, in one request
_TEXTS = {
    Dialect.EMBEDDINGS: ("input", "content"),
    Dialect.RERANK: ("documents", "texts"),
    Dialect.COMPLETIONS: ("prompt",),
    Dialect.NATIVE: ("prompt",),
}
# How far back penalties look. llama-server allocates that much: 2147483647 took 10 GB and 22 GB, and hung it.
_WINDOWS = ("repeat_last_n", "dry_penalty_last_n")
MAX_WINDOW = 1 << 18

_STOPS = ("stop", "stop_sequences")
_PROBABILITIES = ("n_probs", "top_logprobs")
# What most requests have nothing of: one look, instead of one for each name.
_RARE = frozenset({*_STOPS, *_PROBABILITIES, "grammar", *_COMPILED, *_WINDOWS})

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_PROBABILITIES = 100  # of each token; each one costs a pass over the vocabulary's best


class _Format(msgspec.Struct):
    """A response_format, as far as it must be right for a schema to be used at all."""

    type: str | None = None
    json_schema: dict[str, msgspec.Raw] | None = None


_format = msgspec.json.Decoder(_Format | None)
_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_list = msgspec.json.Decoder(list[msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_strings = msgspec.json.Decoder(list[str] | str | None)


def shielded(call: Call, grammars: GrammarTexts | None = None) -> Fields:
    """The fields that may be forwarded, a named grammar's text in its place. Raises BadRequest, GrammarNotFound."""
    fields = {name: value for name, value in call.fields.items() if name not in _REMOVED}
    dialect = call.route.dialect
    _check_lists(fields, dialect)
    if dialect in _WITH_MESSAGES:
        _check_messages(fields)
    elif dialect is Dialect.RESPONSES:
        check_responses(fields)
    if dialect.generates:
        if not _RARE.isdisjoint(fields):
            _check_stops(fields)
            _check_probabilities(fields)
            if dialect is Dialect.MESSAGES:
                refuse_ignored(fields)
            if "grammar" in fields:
                put_grammar(fields, dialect, grammars or NoGrammars())
            _check_compiled(fields)
            _bound_windows(fields)
        call.bound = asked_bound(fields, dialect)
    return fields


def bound_answer(fields: Fields, dialect: Dialect, asked: int | None, *, default: int | None, most: int) -> int:
    """Puts one field of at most `most` tokens in place of all that bound an answer; `asked` is what they say.

    Returns that bound, or 0 where nothing is generated.
    """
    if not dialect.generates:
        return 0
    names = _BOUNDS[dialect]
    wanted = default if asked is None else asked
    bound = most if wanted is None else min(wanted, most)
    for name in names:
        if name in fields:
            del fields[name]
    fields[names[-1]] = msgspec.Raw(str(bound).encode())
    return bound


def bound_names(dialect: Dialect) -> tuple[str, ...]:
    """Of the fields that bound an answer of a dialect that generates."""
    return _BOUNDS[dialect]


def asked_bound(fields: Fields, dialect: Dialect) -> int | None:
    """The tokens that the request itself allows one answer; None where it does not say. Raises BadRequest."""
    asked = None
    for name in _BOUNDS[dialect]:
        if name in fields:
            value = _token_bound(fields, name)
            asked = value if asked is None else asked
    return asked


def _token_bound(fields: Fields, name: str) -> int | None:
    value = typed_field(fields, name, int, "a whole number of at least 0")
    if value is not None and value < 0:
        raise BadRequest(f"{name} is {value}: must be a whole number of at least 0", param=name)
    return value


def _check_lists(fields: Fields, dialect: Dialect) -> None:
    for name, most in _ITEMS.items():
        if name in fields and dialect is not Dialect.EMBEDDINGS and _items(fields[name], name, most) > most:
            raise BadRequest(f"{name} may hold {most} items at most", param=name)
    for name in _TEXTS.get(dialect, ()):
        if name in fields and count_prompts(fields[name], name) > MAX_PROMPTS:
            raise BadRequest(f"{name} may hold {MAX_PROMPTS} texts at most", param=name)


def _items(raw: msgspec.Raw, name: str, most: int) -> int:
    """Of a list or an object; of samplers, which may be a text with a letter for each, its length.

    Not counted where there are not even bytes enough for more than `most`.
    """
    view = memoryview(raw)
    if view.nbytes <= most:
        return 0
    first = bytes(view[:1])
    try:
        if first == b"[":
            return len(_list.decode(raw))
        if first == b"{":
            return len(_object.decode(raw))
    except msgspec.DecodeError as error:
        raise BadRequest(f"{name} cannot be read: {error}", param=name) from None
    return len(bytes(raw)) if name == "samplers" else 0


def _bound_windows(fields: Fields) -> None:
    for name in _WINDOWS:
        value = typed_field(fields, name, int, "a whole number")
        if value is not None and value > MAX_WINDOW:
            fields[name] = msgspec.Raw(str(MAX_WINDOW).encode())


def _check_messages(fields: Fields) -> None:
    """llama-server answers an empty list with words, and a message without a role with a failure of its own."""
    raw = fields.get("messages")
    if raw is None:
        raise BadRequest("messages is missing", param="messages")
    if are_plain(raw):
        return
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
    for name in _STOPS:
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
    for name in _PROBABILITIES:
        value = typed_field(fields, name, int, f"a whole number from 0 to {MAX_PROBABILITIES}")
        if value is not None and not 0 <= value <= MAX_PROBABILITIES:
            raise BadRequest(f"{name} is {value}: must be from 0 to {MAX_PROBABILITIES}", param=name)


def _check_compiled(fields: Fields) -> None:
    for name in _COMPILED:
        raw = fields.get(name)
        if raw is not None and len(bytes(raw)) > 2:
            check_schema(bytes(raw), name)
    if "response_format" in fields:
        _check_format(fields["response_format"])


def _check_format(raw: msgspec.Raw) -> None:
    """A schema that is none makes llama-server answer without any, as if none had been asked for (llama.cpp #19051)."""
    try:
        _format.decode(raw)
    except msgspec.ValidationError as error:
        raise BadRequest(f"response_format cannot be read: {error}", param="response_format") from None
