"""Which requests may be answered out of the cache, and when two of them are the same. Pure.

The rule is written down for users in docs/CACHE.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.call import Call, Fields
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.shield import asked_bound, bound_names
from gateway.settings import Settings

MOST_BYTES = 1 << 20  # of a request
_RANDOM_SEED = 0xFFFFFFFF  # llama-server's word for: choose one

# With one of these, temperature 0 need not mean the likeliest token.
_OTHER_SAMPLING = ("samplers", "dynatemp_range", "mirostat")

# No answer depends on them. `model` stands in the key by its id, `stream` by the call.
_IGNORED = frozenset(
    "model stream user metadata safety_identifier prompt_cache_key service_tier store cache_prompt".split()
)
# These compute nothing by chance. A template may ask for today's date, and speech is no JSON: they are not among them.
_REPEATABLE = frozenset(
    {Dialect.EMBEDDINGS, Dialect.RERANK, Dialect.TOKENIZE, Dialect.DETOKENIZE, Dialect.COUNT_TOKENS}
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a client says about caching, in the words of RFC 9111: whether an answer may be looked up, may be kept, and
    how old it may be, in seconds."""

    look: bool = True
    keep: bool = True
    max_age: int | None = None

    @property
    def asks(self) -> bool:
        """Whether it asks for an answer that was given before, even if a new one might be another."""
        return self.look and self.max_age is not None


SILENT = Wish()


def wish_of(cache_control: str) -> Wish:
    """What a request's Cache-Control says; directives that mean nothing here are passed over."""
    look = keep = True
    max_age: int | None = None
    for part in cache_control.lower().split(","):
        name, _, value = part.strip().partition("=")
        if name == "no-store":
            look = keep = False
        elif name == "no-cache":
            look = False
        elif name == "max-age" and (digits := value.strip(' "')).isascii() and digits.isdigit():
            max_age = min(int(digits[:10]), 1 << 31)
    return Wish(look and max_age != 0, keep, max_age or None)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that may be cached, written so that two that mean the same are the same."""

    route: str
    stream: bool
    fields: dict[str, Any]

    def key(self, *about: str) -> str:
        """`about`: all else that the answer depends on, and who may see it."""
        return _digest([self.route, self.stream, about, self.fields])


def request_of(call: Call, fields: Fields, settings: Settings) -> Request | None:
    """None where its answer may not be cached. `fields` are the shielded ones."""
    wish = call.cache or SILENT
    dialect = call.route.dialect
    if not wish.keep or call.raw is not None or call.size > MOST_BYTES:
        return None
    if not dialect.generates and dialect not in _REPEATABLE:
        return None
    try:
        plain = {name: msgspec.json.decode(raw) for name, raw in fields.items() if name not in _IGNORED}
        bound = asked_bound(fields, dialect) if dialect.generates else None
    except (msgspec.DecodeError, RecursionError, BadRequest):
        return None  # it will be refused, by us or by llama-server
    if dialect.generates:
        if not (wish.asks or is_repeatable(plain)):
            return None
        for name in bound_names(dialect):
            plain.pop(name, None)
        plain["max_tokens"] = _bound(bound, settings)
    if not call.stream:
        plain.pop("stream_options", None)
    tidy = {name: _tidy(value) for name, value in sorted(plain.items()) if value is not None}
    return Request(call.route.upstream, call.stream, tidy)


def is_repeatable(fields: dict[str, Any]) -> bool:
    """Whether llama-server is asked for an answer in which nothing is left to chance: greedily, or with a seed."""
    seed, temperature = fields.get("seed"), fields.get("temperature")
    if type(seed) is int and 0 <= seed < _RANDOM_SEED:
        return True
    greedy = isinstance(temperature, int | float) and temperature <= 0 and temperature is not False
    return (greedy or fields.get("top_k") == 1) and not any(fields.get(name) for name in _OTHER_SAMPLING)


def _bound(asked: int | None, settings: Settings) -> int | None:
    wanted = settings.max_tokens_default if asked is None else asked
    if settings.max_tokens_limit is None:
        return wanted
    return settings.max_tokens_limit if wanted is None else min(wanted, settings.max_tokens_limit)


def _tidy(value: Any) -> Any:
    """1.0 is 1, and a message is the same whatever its parts' order. Elsewhere order can matter: in a schema it is the
    order of what is generated."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return [dict(sorted(item.items())) for item in value]
    return value


def _digest(facts: object) -> str:
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()
