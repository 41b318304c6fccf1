"""Grammars in requests: by name or inline, on every route that obeys them; where one would be ignored, a refusal.

Seen on llama-server build 11669: `/v1/messages` ignores a grammar and a JSON schema, so its door asks for a chat where
the request has one (`anthropic.py`), and here only that of a model's defaults is refused, or of a door that cannot tell
a chat in Anthropic's words; beside a `response_format` the chat route
drops it, and the others drop the format; beside `json_schema` the chat route answers 500; with `ignore_eos` an answer
that has come to the grammar's end is a 500.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from gateway.errors import BadRequest, GrammarNotFound, QueueTimeout
from gateway.pipeline.bounds import check_grammar
from gateway.pipeline.call import Call, Fields, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.expansion import may_nest

INLINE = "::="
_RULING = ("json_schema", "response_format", "text")  # what else decides how an answer looks
ANTHROPIC_RULING = frozenset({"grammar", "output_config", "output_format"})


class GrammarTexts(Protocol):
    """The grammars that have names."""

    def text(self, name: str) -> str:
        """Raises GrammarNotFound."""


class Parser(Protocol):
    """llama-server's, somewhere where it can do no harm."""

    def identity(self) -> str | None: ...

    async def test(self, text: str, caller: str = "") -> None: ...


class NoGrammars:
    """Where there is no place for them."""

    def text(self, name: str) -> str:
        """Raises GrammarNotFound."""
        raise GrammarNotFound(f"there is no grammar named {name[:80]!r}", param="grammar")


class GrammarJudge:
    """What may be stored: the bounds that inline grammars meet, then the real parser."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def identity(self) -> str | None:
        return self._parser.identity()

    async def test(self, text: str) -> None:
        """Raises BadRequest, and CorralError where the parser could not be asked."""
        if INLINE not in text:
            raise BadRequest('content is no grammar: it has no rule, such as root ::= "yes" | "no"', param="content")
        await asyncio.to_thread(check_grammar, text, "content")
        await self._parser.test(text)


def rules_of(fields: Fields) -> list[str]:
    """The names of what is to rule the answer to a request in Anthropic's words. Raises BadRequest."""
    config = typed_field(fields, "output_config", Fields, "an object") or {}
    given = {
        "grammar": bytes(fields.get("grammar", b"null")) not in (b"null", b'""'),
        "output_config.format": bytes(config.get("format", b"null")) != b"null",
        "output_format": bytes(fields.get("output_format", b"null")) != b"null",
    }
    return [name for name, is_given in given.items() if is_given]


def refuse_ignored(fields: Fields) -> None:
    """For what goes to llama-server's own `/v1/messages`. Raises BadRequest."""
    for name in rules_of(fields):
        raise BadRequest(
            f"llama-server obeys no {name} here: send it in the request to /v1/messages over HTTP, "
            "or use /v1/chat/completions",
            param=name,
        )


def put_grammar(fields: Fields, dialect: Dialect, named: GrammarTexts) -> None:
    """The text in place of a name; an inline grammar within its bounds. Raises BadRequest, GrammarNotFound."""
    grammar = typed_field(fields, "grammar", str, "a string")
    if not grammar:
        return
    for name in _RULING:
        if name in fields and _rules(name, bytes(fields[name]), dialect):
            raise BadRequest(f"grammar and {name} exclude each other: send one of them", param="grammar")
    if typed_field(fields, "ignore_eos", bool, "true or false"):
        raise BadRequest(
            "grammar and ignore_eos exclude each other: a grammar decides where an answer ends", param="grammar"
        )
    if INLINE in grammar:
        check_grammar(grammar, "grammar")
    else:
        fields["grammar"] = msgspec.Raw(msgspec.json.encode(named.text(grammar)))


async def try_inline(call: Call, parser: Parser, deadline: float) -> None:
    """One that may nest is tried by llama-server's parser, once, before it may keep a model busy for all others.

    Raises BadRequest, QueueTimeout after `deadline` (of the loop's clock), CorralError where it could not be tried.
    """
    grammar = typed_field(call.fields, "grammar", str, "a string")
    if not grammar or INLINE not in grammar or not call.route.dialect.generates or not may_nest(grammar):
        return
    try:
        async with asyncio.timeout_at(deadline):
            await parser.test(grammar, call.caller)
    except BadRequest as error:
        raise BadRequest(error.message, param="grammar") from None
    except TimeoutError:
        raise QueueTimeout("the grammar could not be tried in time, for others of yours are", retry_after=5) from None


def _rules(name: str, raw: bytes, dialect: Dialect) -> bool:
    """Whether a field asks for a format of its own; what cannot be read is left to llama-server."""
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        return True
    if name == "json_schema":
        return bool(value)
    if name == "text":
        value = value.get("format") if isinstance(value, dict) and dialect is Dialect.RESPONSES else None
    return isinstance(value, dict) and value.get("type", "text") != "text"
