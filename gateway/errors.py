"""Everything that can go wrong, as a tree; each error knows how a client is told.

CorralError                      500 internal_error
├─ BadRequest                    400 invalid_request
│  ├─ InvalidJSON                400 invalid_json
│  └─ ContextLengthExceeded      400 context_length_exceeded
├─ Unauthorized                  401
│  ├─ MissingKey                 401 missing_api_key
│  ├─ InvalidKey                 401 invalid_api_key
│  └─ ExpiredKey                 401 expired_api_key
├─ Forbidden                     403
│  ├─ InsufficientScope          403 insufficient_scope
│  └─ ModelNotAllowed            403 model_not_allowed
├─ NotFound                      404 not_found
│  ├─ ModelNotFound              404 model_not_found
│  └─ GrammarNotFound            404 grammar_not_found
├─ MethodNotAllowed              405 method_not_allowed
├─ ClientTimeout                 408 client_timeout
├─ PayloadTooLarge               413 payload_too_large
├─ URITooLong                    414 uri_too_long
├─ UnsupportedMediaType          415 unsupported_media_type
├─ TooManyRequests               429
│  ├─ RateLimitExceeded          429 rate_limit_exceeded
│  ├─ TokensExceeded             429 tokens_exceeded
│  ├─ ConcurrencyExceeded        429 concurrency_exceeded
│  └─ InsufficientQuota          429 insufficient_quota   (not worth a retry)
├─ HeaderFieldsTooLarge          431 header_fields_too_large
├─ NotSupported                  501 not_supported
├─ BackendError                  502 backend_error
│  ├─ BackendGone                     it died or cut the connection: one retry is allowed
│  └─ BackendReply                    it answered with an error of its own, kept as it is
├─ Unavailable                   503
│  ├─ QueueFull                  503 queue_full
│  ├─ QueueTimeout               503 queue_timeout
│  ├─ ModelLoading               503 model_loading
│  ├─ ModelFailed                503 model_failed
│  ├─ InsufficientMemory         503 insufficient_memory
│  └─ ShuttingDown               503 shutting_down
└─ BackendTimeout                504 backend_timeout

ConfigError stands apart: it ends a start, and no client ever sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class CorralError(Exception):
    """Base of all errors that a client may see.

    `retry_after` is in seconds; clients ignore values above 60, so larger ones are cut to that.
    """

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.extra_headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The one error shape: `{"error": {"message", "type", "param", "code"}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        headers = dict(self.extra_headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(min(60, max(1, math.ceil(self.retry_after))))
        return headers


class ConfigError(Exception):
    """The configuration cannot be used; `problems` holds one line for each mistake found."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class BadRequest(CorralError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class InvalidJSON(BadRequest):
    code = "invalid_json"


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class Unauthorized(CorralError):
    status, type, code = 401, "authentication_error", "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"WWW-Authenticate": "Bearer"}


class MissingKey(Unauthorized):
    code = "missing_api_key"


class InvalidKey(Unauthorized):
    code = "invalid_api_key"


class ExpiredKey(Unauthorized):
    code = "expired_api_key"


class Forbidden(CorralError):
    status, type, code = 403, "permission_error", "insufficient_scope"


class InsufficientScope(Forbidden):
    code = "insufficient_scope"


class ModelNotAllowed(Forbidden):
    code = "model_not_allowed"


class NotFound(CorralError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class GrammarNotFound(NotFound):
    code = "grammar_not_found"


class MethodNotAllowed(CorralError):
    status, type, code = 405, "invalid_request_error", "method_not_allowed"


class ClientTimeout(CorralError):
    status, type, code = 408, "invalid_request_error", "client_timeout"


class PayloadTooLarge(CorralError):
    status, type, code = 413, "invalid_request_error", "payload_too_large"


class URITooLong(CorralError):
    status, type, code = 414, "invalid_request_error", "uri_too_long"


class UnsupportedMediaType(CorralError):
    status, type, code = 415, "invalid_request_error", "unsupported_media_type"


class TooManyRequests(CorralError):
    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"


class RateLimitExceeded(TooManyRequests):
    code = "rate_limit_exceeded"


class TokensExceeded(TooManyRequests):
    code = "tokens_exceeded"


class ConcurrencyExceeded(TooManyRequests):
    code = "concurrency_exceeded"


class InsufficientQuota(TooManyRequests):
    type, code = "insufficient_quota", "insufficient_quota"

    def headers(self) -> dict[str, str]:
        headers = dict(self.extra_headers) | {"x-should-retry": "false"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))  # the true time, however long
        return headers


class HeaderFieldsTooLarge(CorralError):
    status, type, code = 431, "invalid_request_error", "header_fields_too_large"


class NotSupported(CorralError):
    status, type, code = 501, "not_supported_error", "not_supported"

    def headers(self) -> dict[str, str]:
        return super().headers() | {"x-should-retry": "false"}  # clients try a 5xx again


class BackendError(CorralError):
    status, type, code = 502, "server_error", "backend_error"


class BackendGone(BackendError):
    """llama-server refused, reset or cut the connection before it had answered."""


class BackendReply(BackendError):
    """An error that llama-server itself reported; status, type, code and message are per instance."""

    def __init__(self, message: str, *, status: int, type: str, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.type = type
        self.code = code


class Unavailable(CorralError):
    status, type, code = 503, "server_error", "unavailable"


class QueueFull(Unavailable):
    code = "queue_full"


class QueueTimeout(Unavailable):
    code = "queue_timeout"


class ModelLoading(Unavailable):
    code = "model_loading"


class ModelFailed(Unavailable):
    code = "model_failed"


class InsufficientMemory(Unavailable):
    code = "insufficient_memory"


class ShuttingDown(Unavailable):
    code = "shutting_down"


class BackendTimeout(CorralError):
    status, type, code = 504, "server_error", "backend_timeout"
