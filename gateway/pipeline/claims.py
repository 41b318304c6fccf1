"""What a request is expected to take, and what its key may: the claim that the limits and the queue decide on."""

from __future__ import annotations

from gateway.admission.limits import Claim
from gateway.pipeline.call import Call, Fields
from gateway.pipeline.shield import asked_bound
from gateway.settings import Settings

BYTES_PER_TOKEN = 4  # of a prompt, on average and with JSON around it; what is wrong is put right when it is over
USUAL_ANSWER_TOKENS = 1024  # of one that names no bound; it may take the whole context, and hardly any does
_LEVELS = ("high", "normal", "low")


def expected_tokens(call: Call, fields: Fields, settings: Settings, ctx: int, counted: int | None = None) -> int:
    """Prompt and answers; `ctx` is the model's context of one request, `counted` the prompt where it was tokenized."""
    context = ctx or settings.ctx
    prompt = call.size // BYTES_PER_TOKEN if counted is None else counted
    prompt = min(prompt, context) if context else prompt
    if not call.route.dialect.generates:
        return prompt
    asked = asked_bound(fields, call.route.dialect)
    if asked is None:
        asked = settings.max_tokens_default or USUAL_ANSWER_TOKENS
    bounds = [asked, *(most for most in (settings.max_tokens_limit, context) if most)]
    return prompt + min(bounds) * max(1, call.places)


def claim_of(call: Call, settings: Settings, tokens: int) -> Claim:
    key = call.key
    return Claim(
        call.caller,
        rpm=settings.max_requests_per_minute if key.rpm is None else key.rpm,
        tpm=settings.max_tokens_per_minute if key.tpm is None else key.tpm,
        concurrency=key.concurrency or 0,
        budget=key.budget or 0,
        tokens=tokens,
    )


def priority_of(call: Call) -> str:
    """What the request asks for, but no higher than its key may."""
    return max(call.priority, call.key.priority, key=_LEVELS.index)
