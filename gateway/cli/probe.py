"""`corral models test`: a small request to a model, of the kind that it can answer, and what came of it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from gateway.cli.client import Client, Failed, Refused

_TEXT = "Say hello in one short sentence."
_TOKENS = 16
_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": _TEXT}], "max_tokens": _TOKENS, "temperature": 0},
    ),
    "embed": ("/v1/embeddings", {"input": _TEXT}),
    "rerank": ("/v1/rerank", {"query": "a greeting", "documents": [_TEXT, "The sky is blue."]}),
}


@dataclass(frozen=True)
class Result:
    """`tokens_per_second` are those that the model made; None for models that make none."""

    model: str
    ok: bool
    seconds: float
    tokens_per_second: float | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def probe(client: Client, model: str, task: str | None, timeout: float) -> Result:
    """Ask `model` once; `timeout` in seconds, its load included. A task that is not known is found out."""
    begun = time.monotonic()
    try:
        answer = _ask(client, model, task, timeout)
    except Failed as failed:
        return Result(model, False, time.monotonic() - begun, error=str(failed))
    seconds = time.monotonic() - begun
    problem = wrong_with(answer)
    return Result(model, problem is None, seconds, speed(answer, seconds), problem)


def _ask(client: Client, model: str, task: str | None, timeout: float) -> Any:
    for each in (task,) if task in _REQUESTS else tuple(_REQUESTS):
        path, body = _REQUESTS[each]
        try:
            # the gateway gives up a moment before we do, and knows the reason
            return client.post(path, {"model": model} | body, timeout + 5, X_Request_Timeout=f"{timeout:g}")
        except Refused as refused:
            if refused.error_code != "not_supported":
                raise
            last = refused
    raise last


def wrong_with(answer: Any) -> str | None:
    """None where the answer holds what was asked for."""
    try:
        if "choices" in answer:
            return None if answer["usage"]["completion_tokens"] > 0 else "it made no token"
        if "data" in answer:
            return None if len(answer["data"][0]["embedding"]) > 0 else "the embedding is empty"
        return None if len(answer["results"]) > 0 else "it ranked nothing"
    except (KeyError, IndexError, TypeError):
        return "the answer has not the shape that was asked for"


def speed(answer: Any, seconds: float) -> float | None:
    """Tokens a second, as llama-server measured them, else over the whole time."""
    try:
        if "choices" not in answer:
            return None
        measured = (answer.get("timings") or {}).get("predicted_per_second")
        return float(measured) if measured else float(answer["usage"]["completion_tokens"]) / seconds
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
