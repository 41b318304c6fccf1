"""Which request gets which answer, and what an event stream says; pure, but for the Date header."""

from __future__ import annotations

import json

from health import wire
from health.decide import Json, Report, ping_code

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"
HEARTBEAT = b": heartbeat\n\n"


def is_stream(request: wire.Request) -> bool:
    return request.path == "/status/stream" and request.method in ("GET", "HEAD")


def answer(request: wire.Request, report: Report, *, liveness: bool) -> bytes:
    """The answer to all but the stream; every path that is not ours answers like /ping."""
    if request.method not in ("GET", "HEAD"):
        body = _error("only GET and HEAD are answered here", "method_not_allowed")
        return wire.response(request, 405, body, JSON, ("Allow: GET, HEAD",))
    path = request.path.rstrip("/")
    if path == "/health":
        return wire.response(request, 200 if report.status == "ready" else 503, _encode(report.health()), JSON)
    if path == "/status":
        return wire.response(request, 200, _encode(report.full()), JSON)
    if is_stream(request):  # a HEAD: the server streams by itself
        return wire.stream_head()
    if path.startswith("/status/"):
        return _model(request, report, path.removeprefix("/status/"))
    code = ping_code(report.status, liveness=liveness)
    text = f"{report.status}: {report.detail}\n" if report.detail else f"{report.status}\n"
    return wire.response(request, code, text.encode("utf-8", "replace"), TEXT)


def refusal(refused: wire.Refused) -> bytes:
    code = "header_fields_too_large" if refused.status == 431 else "invalid_request"
    return wire.response(None, refused.status, _error(refused.message, code), JSON)


def _model(request: wire.Request, report: Report, name: str) -> bytes:
    if name in report.models:
        return wire.response(request, 200, _encode(report.models[name]), JSON)
    known = ", ".join(sorted(report.models)) or "none"
    return wire.response(request, 404, _error(f"no model {name!r}; there are: {known}", "model_not_found"), JSON)


def full_status(report: Report) -> bytes:
    return _event("full_status", report.full())


def changes(before: Report, after: Report) -> bytes:
    """The events that lead from one report to the other; nothing where only the passing of time differs."""
    if before.models.keys() != after.models.keys():
        return full_status(after)
    events = bytearray()
    for name, model in after.models.items():
        if model != before.models[name]:
            fields = model if isinstance(model, dict) else {}
            events += _event("model_update", {"id": name, **fields})
    # An unbelieved report counts seconds in its detail: no news.
    reworded = after.believed and before.detail != after.detail
    if before.status != after.status or reworded:
        events += _event("server_update", {"status": after.status, "since": after.since, "detail": after.detail})
    return bytes(events)


def _event(name: str, data: Json) -> bytes:
    return f"event: {name}\ndata: ".encode() + _encode(data) + b"\n\n"


def _encode(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _error(message: str, code: str) -> bytes:
    return _encode({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}})
