"""What `response_fields` would hide of a native answer's end: asked for on the gateway's own account.

They are applied to a stream's final event too: without "stop" among them a stream that went well could not be told from
one that was cut, and without "timings" nobody would know what an answer took.
"""

from __future__ import annotations

import msgspec

from gateway.pipeline.call import Fields
from gateway.pipeline.dialects import Dialect

_names = msgspec.json.Decoder(list[str])
_answers = msgspec.json.Decoder(dict[str, msgspec.Raw] | list[dict[str, msgspec.Raw]])


def keep_end(dialect: Dialect, fields: Fields, *, streamed: bool) -> bool:
    """Add what is needed to `response_fields`, which are there; whether timings have to be taken out of the answer.

    In a stream they stay, for its bytes go through as they are. What is no list of names is llama-server's to ignore,
    or to refuse.
    """
    if dialect is not Dialect.NATIVE:
        return False
    try:
        wanted = _names.decode(fields["response_fields"])
    except msgspec.DecodeError:
        return False
    needed = ("stop", "timings") if streamed else ("timings",)
    more = [name for name in needed if name not in wanted] if wanted else []
    if more:
        fields["response_fields"] = msgspec.Raw(msgspec.json.encode(wanted + more))
    return bool(more) and not streamed


def without_timings(body: bytes) -> bytes:
    """A whole answer, or a list of several, its other fields as they came; one that cannot be read as it is."""
    try:
        told = _answers.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return body
    for answer in told if isinstance(told, list) else (told,):
        answer.pop("timings", None)
    return msgspec.json.encode(told)
