"""A request, parsed once and validated: what every step of the spine reads."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from gateway.errors import BadRequest, InvalidJSON
from gateway.pipeline.dialects import Dialect
from gateway.stores.keys.file import Key

if TYPE_CHECKING:
    from gateway.pipeline.cache.key import Wish

Fields = dict[str, msgspec.Raw]
T = TypeVar("T")

_decoder = msgspec.json.Decoder(Fields)
MOST_PLAIN_BYTES = 16 * 1024
MOST_DECODED_BYTES = 64 * 1024  # of one value, where most of it does not matter
SLICE_BYTES = 512 * 1024
_TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TURN = rb'\{\s*"role"\s*:\s*"[a-z]+"\s*,\s*"content"\s*:\s*' + _TEXT + rb"\s*\}"
_PLAIN = re.compile(rb"\[\s*" + _TURN + rb"(?:\s*,\s*" + _TURN + rb")*\s*\]", re.DOTALL)
TOKEN_BOUNDS = frozenset({"n_predict", "max_completion_tokens", "max_tokens", "max_output_tokens"})
_NUMBER = re.compile(rb"[-0-9]")
_TOKENS = re.compile(rb"\[\s*[-0-9]")


@dataclass(frozen=True, slots=True)
class Route:
    """An inference route: `template` as metrics and records name it, `upstream` llama-server's own path."""

    template: str
    upstream: str
    dialect: Dialect


class Call(msgspec.Struct):
    """One job, from whichever door. Times are on the loop's clock, in seconds."""

    route: Route
    key: Key
    caller: str  # whose limits it counts on: the key's id, or an address where there are no keys
    request_id: str
    traceparent: str
    received_at: float
    model: str | None
    fields: Fields
    size: int  # bytes of the body as it came
    stream: bool = False
    places: int = 1
    bound: int | None = None  # tokens that the request allows one answer, where it says so; known once it is shielded
    priority: str = "normal"
    max_wait: float | None = None  # the client's own bound on waiting, seconds
    method: str = "POST"
    transport: str = "http"
    raw: bytes | None = None  # a body that is not JSON (audio), forwarded as it is
    content_type: str = "application/json"
    log: str | None = None  # off, error, info, debug: how much is logged about it, where its client says so
    log_infer: bool = False
    cache: Wish | None = None  # what its client says about caching, if it does
    reached: bool = False  # llama-server has answered it, if only with a refusal
    headers_out: list[tuple[str, str]] = []  # what the spine tells the client in headers


def read_fields(call: Call, body: bytes, fields: Fields | None = None) -> None:
    """What the spine has to know of a JSON body, or of its `fields`. Raises InvalidJSON, BadRequest."""
    call.fields = parse_json_object(body) if fields is None else fields
    call.model = take_model(call.fields)
    call.stream = call.route.dialect.generates and take_stream(call.fields)
    call.places = take_places(call.fields)


def parse_json_object(body: bytes) -> Fields:
    """The top level of a JSON object, its values still encoded; of repeated names the last one counts.

    Raises InvalidJSON, BadRequest. 20 times faster than decoding it all, and forwarding encodes it anew, so that
    llama-server never reads it differently from us.
    """
    try:
        if not body.isascii():
            check_utf8(body)  # raw values are not checked for it by the decoder
            body = body.removeprefix(codecs.BOM_UTF8)
        return _decoder.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"the body is not UTF-8 (byte {error.start})") from None
    except msgspec.ValidationError:
        raise BadRequest("the body must be a JSON object") from None
    except msgspec.DecodeError as error:
        raise InvalidJSON(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InvalidJSON("the body is nested too deeply") from None


def check_utf8(data: bytes) -> None:
    """Slice by slice: one call for 10 MB would hold the interpreter for 20 ms. Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), SLICE_BYTES):
        end, held = start + SLICE_BYTES, len(decoder.getstate()[0])
        try:
            decoder.decode(data[start:end], final=end >= len(data))
        except UnicodeDecodeError as error:
            at = start - held + error.start
            raise UnicodeDecodeError("utf-8", data, at, at + 1, error.reason) from None


def outlined(fields: Fields) -> dict[str, object]:
    """All values decoded, but of a long one only what it is: decoding 10 MB of text holds the interpreter for 40 ms.

    Of a list: how many items it has and what each is, and the role of the last one. A list that begins with a number
    is a prompt of tokens, and counts as one number. Raises InvalidJSON.
    """
    try:
        return {n: _outline(value) if _is_long(value) else msgspec.json.decode(value) for n, value in fields.items()}
    except msgspec.DecodeError as error:  # such as 1e400
        raise InvalidJSON(f"the body is not valid JSON: {error}") from None


def in_full(request: Mapping[str, object], fields: Fields) -> dict[str, object]:
    """`request`, which is `outlined(fields)`, with its long values as they came."""
    return {name: fields[name] if _is_long(fields[name]) else value for name, value in request.items()}


def _is_long(value: msgspec.Raw) -> bool:
    return memoryview(value).nbytes > MOST_DECODED_BYTES


def _outline(value: msgspec.Raw) -> object:
    start = bytes(memoryview(value)[:64])
    if not start.startswith(b"["):
        return _kind(start)
    if _TOKENS.match(start):
        return [0]
    items = msgspec.json.decode(value, type=list[msgspec.Raw])
    kinds = [_kind(bytes(memoryview(item)[:1])) for item in items]
    if kinds and kinds[-1] == {}:
        kinds[-1] = {"role": msgspec.json.decode(items[-1], type=_Turn).role}
    return kinds


def _kind(start: bytes) -> object:
    """An empty value of the kind that begins so."""
    if _NUMBER.match(start):
        return 0
    return {b"{": {}, b"[": [], b'"': ""}.get(start[:1])


class _Turn(msgspec.Struct):
    role: Any = None


def are_plain(messages: msgspec.Raw) -> bool:
    """Whether these are only turns of a role and a text each, in the usual order: then there is nothing to look for.

    A quick look at what most requests bring; False where it is not seen at once.
    """
    view = memoryview(messages)
    return view.nbytes <= MOST_PLAIN_BYTES and _PLAIN.fullmatch(view) is not None


def fill_in(call: Call, defaults: Mapping[str, Any]) -> None:
    """The model's own defaults, where the request is silent; null is silence. Raises BadRequest.

    A request that bounds its answer under another name is not silent about that.
    """
    bounded = any(_is_said(call.fields, name) for name in TOKEN_BOUNDS)
    for name, value in defaults.items():
        if not _is_said(call.fields, name) and not (bounded and name in TOKEN_BOUNDS):
            call.fields[name] = msgspec.Raw(msgspec.json.encode(value))
    call.places = take_places(call.fields)


def _is_said(fields: Fields, name: str) -> bool:
    return name in fields and bytes(fields[name]) != b"null"


def take_model(fields: Fields) -> str | None:
    """An empty name is none."""
    return typed_field(fields, "model", str, "a string") or None


def take_stream(fields: Fields) -> bool:
    return bool(typed_field(fields, "stream", bool, "true or false"))


def take_places(fields: Fields) -> int:
    """How many slots it takes: one for each of `n` answers to each of its prompts."""
    prompts = count_prompts(fields["prompt"], "prompt") if "prompt" in fields else 1
    for name in ("n_cmpl", "n"):  # llama-server lets the first one override the other
        if name not in fields:
            continue
        n = typed_field(fields, name, int, "a whole number")
        if n is None:
            continue
        if not 1 <= n <= 128:
            raise BadRequest(f"{name} is {n}: must be from 1 to 128", param=name)
        return n * prompts
    return prompts


def count_prompts(raw: msgspec.Raw, name: str) -> int:
    """A list is one prompt if there is a token among its items; else each item is a prompt of its own.

    Raises BadRequest.
    """
    prompt = bytes(raw)
    if not prompt.startswith(b"[") or _TOKENS.match(prompt):
        return 1
    try:
        items = msgspec.json.decode(prompt, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise BadRequest(f"{name} cannot be read: {error}", param=name) from None
    return 1 if any(_NUMBER.match(bytes(item)) for item in items) else max(1, len(items))


def typed_field(fields: Fields, name: str, kind: type[T], allowed: str) -> T | None:
    """The value of one field, or None where it is absent or null. Raises BadRequest.

    A whole number may be written with a point, as 4.0; what is forwarded is 4.
    """
    if name not in fields:
        return None
    raw = fields[name]
    if bytes(raw) == b"null":
        return None
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        if kind is int and (number := _whole_number(raw)) is not None:
            fields[name] = msgspec.Raw(b"%d" % number)
            return cast(T, number)
        raise BadRequest(
            f"{name} is {bytes(raw)[:40].decode(errors='replace')}: must be {allowed}", param=name
        ) from None


def _whole_number(raw: msgspec.Raw) -> int | None:
    """Of a number with a point or an exponent, but without a fraction."""
    try:
        number = msgspec.json.decode(raw, type=float)
    except msgspec.DecodeError:
        return None
    return int(number) if number.is_integer() else None
