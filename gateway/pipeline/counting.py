"""A long prompt's tokens, by the running model's own tokenizer, before anything is reserved or waited for.

Only where the answer is worth a question: prompts that may be longer than the context, and those whose tokens count on
a limit. llama-server tokenizes beside its slots, some MB a second, and a prompt this long keeps it busy for far longer.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from gateway.errors import ContextLengthExceeded, CorralError
from gateway.models.owner import Owner
from gateway.models.spec import ModelSpec
from gateway.pipeline.call import Call, Fields
from gateway.pipeline.dialects import Dialect
from gateway.settings import Settings

COUNTED_BYTES = 16 * 1024  # of a body; a shorter one is over before it is worth asking
LEAST_TOLD = 64 * 1024  # characters that are tokenized at the most, or
TOLD_PER_TOKEN = 8  # so many for each token of the context: of such a part too it is certain that it does not fit
WITHIN_SECONDS = 2.0
MARGIN = 16  # tokens that may be fewer where texts meet
_SHIFTS = frozenset({"--context-shift"})

_turns = msgspec.json.Decoder(list[dict[str, Any]])


async def count_prompt(call: Call, fields: Fields, owner: Owner, settings: Settings) -> int | None:
    """About how many tokens the prompt has; None where it was not counted: short, or its model is not loaded.

    Raises ContextLengthExceeded where it is certain that llama-server would refuse it, after a wait for a place.
    """
    backend, key, ctx = owner.backend, call.key, owner.ctx or 0
    if backend is None or call.places != 1 or not (call.size > ctx > 0 or key.tpm or key.budget):
        return None
    if not call.route.dialect.generates or call.route.upstream == "/infill":  # that cuts its texts to what fits
        return None
    certain, other = texts_of(fields, call.route.dialect)
    most = max(LEAST_TOLD, TOLD_PER_TOKEN * ctx)
    told = certain[:most] or other[:most]
    if len(told) < COUNTED_BYTES:
        return None
    body = msgspec.json.encode({"content": told, "add_special": False})
    try:
        async with asyncio.timeout(WITHIN_SECONDS), owner.lease():
            reply = await backend.request("POST", "/tokenize", body)
            answer = await reply.read()
    except (CorralError, TimeoutError):
        return None  # whoever asks for the answer itself will be told why
    if reply.status != 200:
        return None
    tokens = answer.count(b",") + 1
    if certain and tokens - MARGIN > ctx > 0 and not shifts(owner.spec, settings.extra_args):
        raise ContextLengthExceeded(
            f"request ({'at least ' if len(told) < len(certain) else 'about '}{tokens} tokens) exceeds the available "
            f"context size ({ctx} tokens)"
        )
    return tokens * (len(certain) + len(other)) // len(told)


def texts_of(fields: Fields, dialect: Dialect) -> tuple[str, str]:
    """The texts that surely go to the model, and those of which its chat template may leave something out."""
    given = fields.get("input" if dialect is Dialect.RESPONSES else "messages")
    if dialect is Dialect.COMPLETIONS or dialect is Dialect.NATIVE:
        return _string(fields.get("prompt")), ""
    certain = [_string(fields.get("instructions")), _string(fields.get("system")), _string(given)]
    other: list[str] = []
    try:
        turns = _turns.decode(given) if given is not None and not certain[2] else []
    except msgspec.DecodeError:
        turns = []
    for turn in turns:
        content = turn.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        (other if turn.get("role") not in ("user", "system", "developer") else certain).extend(texts)
    return "\n".join(filter(None, certain)), "\n".join(other)


def shifts(spec: ModelSpec, extra_args: str) -> bool:
    """Whether its llama-server goes on with a part of a prompt that is too long; of a foreign one nobody knows."""
    return spec.url is not None or not _SHIFTS.isdisjoint((*spec.flags, *extra_args.split()))


def _string(raw: msgspec.Raw | None) -> str:
    if raw is None or not bytes(raw).startswith(b'"'):
        return ""
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        return ""
