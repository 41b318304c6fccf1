"""Grammars in requests: what the shield makes of names, of inline texts and of what would make them be ignored."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.errors import BadRequest, CorralError, GrammarNotFound
from gateway.models.parser import explain, why_ended, without_tokens
from gateway.pipeline.call import Fields, parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.grammars import GrammarJudge, put_grammar

TEXT = 'root ::= "a" | "b\\"\\n"'
GENERATING = [dialect for dialect in Dialect if dialect.generates and dialect is not Dialect.MESSAGES]


class Named:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def text(self, name: str) -> str:
        self.asked.append(name)
        if name.partition("@")[0] != "known":
            raise GrammarNotFound(f"there is no {name}", param="grammar")
        return TEXT


def fields_of(**fields: Any) -> Fields:
    return parse_json_object(json.dumps(fields).encode())


def put(dialect: Dialect = Dialect.CHAT, **fields: Any) -> Any:
    given = fields_of(**fields)
    put_grammar(given, dialect, Named())
    return msgspec.json.decode(given["grammar"]) if "grammar" in given else None


@pytest.mark.parametrize("dialect", GENERATING)
@pytest.mark.parametrize("name", ["known", "known@3"])
def test_a_name_becomes_its_text(dialect: Dialect, name: str) -> None:
    assert put(dialect, grammar=name) == TEXT


@pytest.mark.parametrize("grammar", ["", None, TEXT])
def test_none_and_inline_stay_as_they_are(grammar: object) -> None:
    assert put(grammar=grammar) == grammar
    assert put() is None


@pytest.mark.parametrize("grammar", ["nope", " ", "known\n@1", 'root = "a"', "::"])
def test_what_is_unknown_is_refused(grammar: str) -> None:
    with pytest.raises(GrammarNotFound):
        put(grammar=grammar.replace("known", "unknown"))


SCHEMA = {"type": "object"}


@pytest.mark.parametrize(
    ("dialect", "beside", "param"),
    [
        (Dialect.CHAT, {"response_format": {"type": "json_object"}}, "grammar"),
        (Dialect.CHAT, {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, "grammar"),
        (Dialect.COMPLETIONS, {"response_format": {"type": "json_object"}}, "grammar"),
        (Dialect.CHAT, {"json_schema": SCHEMA}, "grammar"),
        (Dialect.NATIVE, {"json_schema": SCHEMA}, "grammar"),
        (Dialect.RESPONSES, {"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "grammar"),
        (Dialect.CHAT, {"ignore_eos": True}, "grammar"),
        (Dialect.CHAT, {"ignore_eos": "yes"}, "ignore_eos"),
    ],
)
@pytest.mark.parametrize("grammar", ["known", TEXT])
def test_it_is_refused_where_it_would_not_be_obeyed(
    dialect: Dialect, beside: dict[str, Any], param: str, grammar: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        put(dialect, grammar=grammar, **beside)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("dialect", "beside"),
    [
        (Dialect.CHAT, {"response_format": {"type": "text"}}),
        (Dialect.CHAT, {"response_format": None}),
        (Dialect.CHAT, {"json_schema": {}}),
        (Dialect.CHAT, {"json_schema": None}),
        (Dialect.CHAT, {"ignore_eos": False}),
        (Dialect.CHAT, {"text": {"format": {"type": "json_object"}}}),
        (Dialect.RESPONSES, {"text": {"format": {"type": "text"}}}),
        (Dialect.RESPONSES, {"text": {"verbosity": "low"}}),
    ],
)
def test_what_says_nothing_about_the_format_may_stand_beside_it(dialect: Dialect, beside: dict[str, Any]) -> None:
    assert put(dialect, grammar="known", **beside) == TEXT


@pytest.mark.parametrize(
    "grammar", ['root ::= "a"{1001}', "root ::= " + "(" * 33 + '"a"' + ")" * 33, "#" * 70_000 + "::="]
)
async def test_what_is_stored_and_what_is_inline_meet_the_same_bounds(grammar: str) -> None:
    class Parser:
        def identity(self) -> str | None:
            return "x"

        async def test(self, text: str, caller: str = "") -> None:
            raise AssertionError("it must not come so far")

    with pytest.raises(BadRequest) as inline:
        put(grammar=grammar)
    with pytest.raises(BadRequest) as stored:
        await GrammarJudge(Parser()).test(grammar)
    assert stored.value.message == inline.value.message.replace("grammar", "content", 1)
    assert (inline.value.param, stored.value.param) == ("grammar", "content")


async def test_what_has_no_rule_is_not_stored() -> None:
    class Parser:
        def identity(self) -> str | None:
            return None

        async def test(self, text: str, caller: str = "") -> None:
            raise CorralError("not reached")

    with pytest.raises(BadRequest, match="is no grammar"):
        await GrammarJudge(Parser()).test("json")


# --- what the parser's process says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('root ::= <think> "x"', 'root ::= . "x"'),
        ("root ::= !<[128]>* a\na ::= <[5]>", "root ::= .* a\na ::= ."),
        ('root ::= "<think>" [<>] # <x>', 'root ::= "<think>" [<>] # <x>'),
        ('root ::= "\\"<x>"', 'root ::= "\\"<x>"'),
    ],
)
def test_tokens_of_a_vocabulary_are_any_character(text: str, expected: str) -> None:
    assert without_tokens(text) == expected


SAID = b"srv log\nparse: error parsing grammar: "
ANSWER = b'{"error":{"code":400,"message":"Failed to initialize samplers: failed to parse grammar"}}'


@pytest.mark.parametrize(
    ("text", "body", "output", "told"),
    [
        ("root ::= (", ANSWER, SAID + b"expecting ')' at \n\nroot ::= (\n", "expecting ')' at the end"),
        ("root ::= b", ANSWER, SAID + b"Undefined rule identifier 'b'\n\nroot", "identifier 'b'"),
        ("root ::= root", ANSWER, b"0.1 E unsupported grammar, left recursion detected for x\n", "left recursion"),
        ("a ::= b", ANSWER, b"E failed to parse grammar", "no rule named root"),
        ("root ::= b", ANSWER, SAID + b"std::bad_alloc\n", "too much memory"),
        ("root ::= b", b'{"error":{"message":"x: std::bad_alloc"}}', b"", "more than 1024 MB"),
        ("root ::= b", b'{"error":{"message":"x: Unexpected empty grammar stack after"}}', b"", "nothing"),
        ("root ::= b", b'{"error":{"message":"something new"}}', b"", "something new"),
        ("root ::= b", b"<html>", b"", "does not say why"),
        ("root ::= b", b'{"error":"?"}', b"", "does not say why"),
    ],
)  # fmt: skip
def test_the_parsers_own_words(text: str, body: bytes, output: bytes, told: str) -> None:
    said = explain(text, body, output)
    assert told in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (-11, "SIGSEGV"),
        (-6, "SIGABRT"),
        (-24, "busy for more than 5 s"),
        (-9, "memory"),
        (1, "status 1"),
        (-40, "status -40"),
    ],
)
def test_how_it_ended(status: int, told: str) -> None:
    assert told in why_ended(status)
