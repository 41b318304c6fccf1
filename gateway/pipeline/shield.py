"""What may go to llama-server: fields that can hurt it are removed, bounded or refused; everything else passes.

The facts behind each rule were tried on llama-server build 11669.
"""

from __future__ import annotations

import msgspec

from gateway.errors import BadRequest
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


def guarded(call: Call, *, default_tokens: int | None, most_tokens: int) -> tuple[Fields, int]:
    """The fields to forward, and the most tokens that the answer may have (0 where nothing is generated).

    Raises BadRequest.
    """
    fields = {name: value for name, value in call.fields.items() if name not in _REMOVED}
    if not call.route.dialect.generates:
        return fields, 0
    names = _BOUNDS[call.route.dialect]
    asked: int | None = None
    for name in names:
        value = typed_field(fields, name, int, "a whole number of at least 0")
        if value is not None and value < 0:
            raise BadRequest(f"{name} is {value}: must be a whole number of at least 0", param=name)
        asked = value if asked is None else asked
        fields.pop(name, None)
    bound = asked if asked is not None else default_tokens
    bound = most_tokens if bound is None else min(bound, most_tokens)
    fields[names[-1]] = msgspec.Raw(str(bound).encode())
    return fields, bound
