"""What a request is expected to take, and what its key may: the claim that the limits and the queue decide on."""

from __future__ import annotations

from gateway.admission.limits import Claim
from gateway.pipeline.call import Call
from gateway.settings import Settings

BYTES_PER_TOKEN = 4  # of a prompt, on average and with JSON around it; what is wrong is put right when it is over
USUAL_ANSWER_TOKENS = 1024  # of one that names no bound; it may take the whole context, and hardly any does
_LEVELS = {"high": 0, "normal": 1, "low": 2}


def expected_tokens(call: Call, settings: Settings, ctx: int, counted: int | None = None) -> int:
    """Prompt and answers; `ctx` is the model's context of one request, `counted` the prompt where it was tokenized."""
    context = ctx or settings.ctx
    prompt = call.size // BYTES_PER_TOKEN if counted is None else counted
    if context and prompt > context:
        prompt = context
    if not call.route.dialect.generates:
        return prompt
    answer = (settings.max_tokens_default or USUAL_ANSWER_TOKENS) if call.bound is None else call.bound
    for most in (settings.max_tokens_limit, context):
        if most and answer > most:
            answer = most
    return prompt + answer * (call.places or 1)


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
    wanted, most = call.priority, call.key.priority
    return wanted if _LEVELS[wanted] >= _LEVELS[most] else most
