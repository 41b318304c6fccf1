"""A long prompt's tokens, by the running model's own tokenizer, before anything is reserved or waited for.

Only where the answer is worth a question: prompts that may be longer than the context, and those whose tokens count on
a limit. llama-server tokenizes beside its slots, some MB a second, and a prompt this long keeps it busy for far longer.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from gateway.errors import ContextLengthExceeded, CorralError
from gateway.models.owner import Owner
from gateway.models.spec import ModelSpec
from gateway.pipeline.call import Call, Fields
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.turns import LARGE_BYTES, Turns
from gateway.settings import Settings

COUNTED_BYTES = 16 * 1024  # of a body; a shorter one is over before it is worth asking
LEAST_TOLD, MOST_TOLD = 64 * 1024, 2 * 1024 * 1024  # bytes of texts that are tokenized; between these
TOLD_PER_TOKEN = 8  # so many for each token of the context: of such a part too it is certain that it does not fit
WITHIN_SECONDS = 2.0
MARGIN = 16  # tokens that may be fewer where texts meet
_SHIFTS = frozenset({"--context-shift"})
MOST_ESCAPED = 13  # bytes in which a character ends: two escapes have twelve
_NOTHING = msgspec.Raw(b"null")
_QUOTE, _BRACE = b'"{'


class _Turn(msgspec.Struct):
    role: Any = None
    content: msgspec.Raw = _NOTHING


class _Part(msgspec.Struct):
    text: msgspec.Raw = _NOTHING


T = TypeVar("T")
_turns = msgspec.json.Decoder(list[_Turn])
_items = msgspec.json.Decoder(list[msgspec.Raw])


class Told(NamedTuple):
    """What the tokenizer is told of a prompt: `text` is `share` of it, and surely goes to the model, or may not."""

    text: str
    share: float
    certain: bool


async def count_prompt(call: Call, fields: Fields, owner: Owner, settings: Settings, turns: Turns) -> int | None:
    """About how many tokens the prompt has; None where it was not counted: short, or its model is not loaded.

    Raises ContextLengthExceeded where it is certain that llama-server would refuse it, after a wait for a place.
    """
    backend, key, ctx = owner.backend, call.key, owner.ctx or 0
    if backend is None or call.places != 1 or not (call.size > ctx > 0 or key.tpm or key.budget):
        return None
    if not call.route.dialect.generates or call.route.upstream == "/infill":  # that cuts its texts to what fits
        return None
    most = min(max(LEAST_TOLD, TOLD_PER_TOKEN * ctx), MOST_TOLD)
    tell = partial(told_of, fields, call.route.dialect, most)
    told = await turns.of(tell) if call.size > LARGE_BYTES else tell()
    if len(told.text) < COUNTED_BYTES:
        return None
    body = msgspec.json.encode({"content": told.text, "add_special": False})
    try:
        async with asyncio.timeout(WITHIN_SECONDS), owner.lease():
            reply = await backend.request("POST", "/tokenize", body)
            answer = await reply.read()
    except (CorralError, TimeoutError):
        return None  # whoever asks for the answer itself will be told why
    if reply.status != 200:
        return None
    tokens = answer.count(b",") + 1
    if told.certain and tokens - MARGIN > ctx > 0 and not shifts(owner.spec, settings.extra_args):
        raise ContextLengthExceeded(
            f"request ({'at least' if told.share < 1 else 'about'} {tokens} tokens) exceeds the available context size "
            f"({ctx} tokens)"
        )
    return round(tokens / told.share)


def told_of(fields: Fields, dialect: Dialect, most: int) -> Told:
    """Of the texts that surely go to the model, or else of the others, what their first `most` bytes say."""
    certain, other = texts_of(fields, dialect)
    said: list[str] = []
    left, size = most, 0.0
    for raw in certain or other:
        text, share = beginning(raw, left)
        said.append(text)
        left -= len(text) + 1
        size += share * len(raw)
        if left <= 0:
            break
    whole = sum(map(len, certain)) + sum(map(len, other))
    return Told("\n".join(said), size / whole if whole else 1.0, bool(certain))


def texts_of(fields: Fields, dialect: Dialect) -> tuple[list[memoryview], list[memoryview]]:
    """The texts that surely go to the model, and those of which its chat template may leave something out.

    As JSON strings: decoding 10 MB of them would hold the interpreter for 20 ms.
    """
    if dialect is Dialect.COMPLETIONS or dialect is Dialect.NATIVE:
        return _strings(fields.get("prompt", _NOTHING)), []
    given = fields.get("input" if dialect is Dialect.RESPONSES else "messages", _NOTHING)
    around = [fields.get(name, _NOTHING) for name in ("instructions", "system")]
    certain = [text for value in (*around, given) for text in _strings(value)]
    other: list[memoryview] = []
    for turn in _read(_turns, given):
        texts = _strings(turn.content) or [text for part in _read(_items, turn.content) for text in _part(part)]
        (other if turn.role not in ("user", "system", "developer") else certain).extend(texts)
    return certain, other


def beginning(raw: memoryview, most: int) -> tuple[str, float]:
    """Of a JSON string, not an empty one, what its first bytes say, and how much of it that is: `most` characters at
    the most.

    Nothing of one that cannot be read, such as half a pair of surrogates.
    """
    cut = min(most + MOST_ESCAPED, len(raw) - 1)
    for end in range(cut, max(1, cut - MOST_ESCAPED), -1):  # it may be cut in the middle of a character or its escape
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            text = msgspec.json.decode(bytes(raw[:end]) + b'"', type=str)
            return text[:most], end / (len(raw) - 1) * min(1.0, most / len(text))
    return "", 0.0


def shifts(spec: ModelSpec, extra_args: str) -> bool:
    """Whether its llama-server goes on with a part of a prompt that is too long; of a foreign one nobody knows."""
    return spec.url is not None or not _SHIFTS.isdisjoint((*spec.flags, *extra_args.split()))


def _strings(raw: msgspec.Raw) -> list[memoryview]:
    """The value, if it is a text that is not empty."""
    text = memoryview(raw)
    return [text] if text.nbytes > 2 and text[0] == _QUOTE else []


def _part(raw: msgspec.Raw) -> list[memoryview]:
    return _strings(msgspec.json.decode(raw, type=_Part).text) if memoryview(raw)[0] == _BRACE else []


def _read(decoder: msgspec.json.Decoder[list[T]], raw: msgspec.Raw) -> list[T]:
    """What the value lists; nothing where it is none of those lists."""
    try:
        return decoder.decode(raw)
    except msgspec.DecodeError:
        return []
