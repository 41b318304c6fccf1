"""The inference routes, by the names under which every door, metric and record knows them."""

from __future__ import annotations

from gateway.errors import BadRequest
from gateway.pipeline.call import Route
from gateway.pipeline.dialects import Dialect

INFER = "/infer"

# Route template → llama-server's own path. Beware: without /v1 `completions` and `embeddings` are llama-server's
# native ones, and answer in another shape.
ROUTES = {
    template: Route(template, upstream, dialect)
    for dialect, upstream, templates in (
        (Dialect.CHAT, "/v1/chat/completions", ("/v1/chat/completions", "/chat/completions")),
        (Dialect.CHAT, "/v1/chat/completions", (INFER,)),  # in words of its own, see plain.py
        (Dialect.COMPLETIONS, "/v1/completions", ("/v1/completions",)),
        (Dialect.NATIVE, "/completion", ("/completion", "/completions")),
        (Dialect.NATIVE, "/infill", ("/infill",)),
        (Dialect.RESPONSES, "/v1/responses", ("/v1/responses", "/responses")),
        (Dialect.MESSAGES, "/v1/messages", ("/v1/messages",)),
        (Dialect.COUNT_TOKENS, "/v1/messages/count_tokens", ("/v1/messages/count_tokens",)),
        (Dialect.EMBEDDINGS, "/v1/embeddings", ("/v1/embeddings",)),
        (Dialect.EMBEDDINGS, "/embeddings", ("/embeddings", "/embedding")),
        (Dialect.RERANK, "/v1/rerank", ("/v1/rerank", "/rerank", "/v1/reranking", "/reranking")),
        (Dialect.TOKENIZE, "/tokenize", ("/tokenize", "/v1/tokenize")),
        (Dialect.DETOKENIZE, "/detokenize", ("/detokenize", "/v1/detokenize")),
        (Dialect.APPLY_TEMPLATE, "/apply-template", ("/apply-template", "/v1/apply-template")),
        (
            Dialect.TRANSCRIPTIONS,
            "/v1/audio/transcriptions",
            ("/v1/audio/transcriptions", "/audio/transcriptions"),
        ),
    )
    for template in templates
}

MOST_WAIT = 1_000_000_000  # seconds
PRIORITIES = ("high", "normal", "low")


def priority(text: str) -> str:
    """Raises BadRequest."""
    if text.lower() not in PRIORITIES:
        raise BadRequest(f"X-Request-Priority is {text[:40]!r}: must be one of {', '.join(PRIORITIES)}")
    return text.lower()


def max_wait(text: str) -> float:
    """Seconds. Raises BadRequest."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < MOST_WAIT:
        raise BadRequest(f"X-Request-Timeout is {text[:40]!r}: must be seconds, more than 0 and below {MOST_WAIT}")
    return seconds
