"""What may go to llama-server: fields removed, bounded, refused; grammars and schemas by size, depth, repetition."""

from __future__ import annotations

import json

import msgspec
import pytest

from gateway.errors import BadRequest, GrammarNotFound
from gateway.pipeline.bounds import MAX_BYTES, MAX_DEPTH, check_grammar, check_schema
from gateway.pipeline.call import Call, Route, parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.expansion import may_nest
from gateway.pipeline.shield import bound_answer, shielded
from gateway.stores.keys.file import Key

HI = [{"role": "user", "content": "hi"}]


def call(dialect: Dialect = Dialect.CHAT, **fields: object) -> Call:
    body = json.dumps(({"messages": HI} if dialect is Dialect.CHAT else {}) | fields).encode()
    return Call(
        route=Route("/x", "/x", dialect),
        key=Key(id="k"),
        caller="k",
        request_id="r",
        traceparent="",
        received_at=0.0,
        model=None,
        fields=parse_json_object(body),
        size=len(body),
    )


def forwarded(dialect: Dialect = Dialect.CHAT, **fields: object) -> dict[str, object]:
    return {name: msgspec.json.decode(value) for name, value in shielded(call(dialect, **fields)).items()}


def test_unknown_fields_pass_and_dangerous_ones_go() -> None:
    got = forwarded(id_slot=1, lora=[], sse_ping_interval=1, conversation_id="x", temperature=0.5, novelty={"a": 1})
    assert got == {"messages": HI, "temperature": 0.5, "novelty": {"a": 1}}


@pytest.mark.parametrize(
    ("dialect", "given", "default", "most", "left"),
    [
        (Dialect.CHAT, {}, None, 100, {"max_tokens": 100}),
        (Dialect.CHAT, {}, 7, 100, {"max_tokens": 7}),
        (Dialect.CHAT, {}, 700, 100, {"max_tokens": 100}),
        (Dialect.CHAT, {"max_tokens": 5}, 7, 100, {"max_tokens": 5}),
        (Dialect.CHAT, {"max_tokens": 500}, 7, 100, {"max_tokens": 100}),
        (Dialect.CHAT, {"max_tokens": 0}, 7, 100, {"max_tokens": 0}),
        (Dialect.CHAT, {"max_tokens": None}, 7, 100, {"max_tokens": 7}),
        (Dialect.CHAT, {"max_tokens": 5, "max_completion_tokens": 6}, 7, 100, {"max_tokens": 6}),
        (Dialect.CHAT, {"max_tokens": 5, "max_completion_tokens": 6, "n_predict": 9}, 7, 100, {"max_tokens": 9}),
        (Dialect.RESPONSES, {"max_output_tokens": 5}, 7, 100, {"max_output_tokens": 5}),
        (Dialect.RESPONSES, {"max_tokens": 900, "max_output_tokens": 5}, 7, 100, {"max_output_tokens": 100}),
        (Dialect.EMBEDDINGS, {"max_tokens": 5}, 7, 100, {"max_tokens": 5}),
    ],
)
def test_one_canonical_bounded_field(
    dialect: Dialect, given: dict[str, object], default: int | None, most: int, left: dict[str, int]
) -> None:
    asked = call(dialect, **given)
    fields = shielded(asked)
    bound = bound_answer(fields, dialect, asked.bound, default=default, most=most)
    got = {name: msgspec.json.decode(value) for name, value in fields.items() if name != "messages"}
    assert got == left
    assert bound == (next(iter(left.values())) if dialect.generates else 0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"n_predict": "many"}, "n_predict"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*HI, {"role": 1}]}, "messages[1].role"),
        ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": ["x" * 1025]}, "stop"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"n_probs": 101}, "n_probs"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"grammar": 5}, "grammar"),
        ({"grammar": "root ::= " + "(" * 33 + '"a"' + ")" * 33}, "grammar"),
        ({"grammar": 'root ::= "a"{1001}'}, "grammar"),
        ({"response_format": {"type": "json_schema", "schema": {"maxItems": 5000}}}, "response_format"),
        ({"tools": [{"x": "y" * MAX_BYTES}]}, "tools"),
        ({"json_schema": {"maxLength": 10**40}}, "json_schema"),
    ],
)
def test_refused_with_the_field_that_is_wrong(fields: dict[str, object], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        shielded(call(Dialect.CHAT, **fields))
    error = caught.value
    assert (error.status, error.param) == (400, param)
    assert param.partition("[")[0] in error.message


@pytest.mark.parametrize("stop", ["x", ["x", "y"], None, []])
def test_usual_stops_pass(stop: object) -> None:
    assert forwarded(stop=stop)["stop"] == stop


def test_a_grammar_is_named_or_inline() -> None:
    assert forwarded(grammar='root ::= "a"')["grammar"] == 'root ::= "a"'
    assert forwarded(grammar="")["grammar"] == ""
    with pytest.raises(GrammarNotFound):
        shielded(call(grammar="json"))


class TestGrammar:
    def test_what_stands_in_strings_classes_and_comments_does_not_count(self) -> None:
        check_grammar('root ::= "' + "(" * 100 + '{9999}" [({{9999}] # ((((((((((( {9999}\n', "grammar")

    def test_groups_that_close_again_do_not_add_up(self) -> None:
        check_grammar("root ::= " + '("a") ' * 1000, "grammar")

    @pytest.mark.parametrize("times", ["{1001}", "{0,1001}", "{1001,}", "{" + "9" * 30 + "}"])
    def test_repetition(self, times: str) -> None:
        with pytest.raises(BadRequest, match="repeats"):
            check_grammar(f'root ::= "a"{times}', "grammar")

    @pytest.mark.parametrize(
        "text",
        [
            'root ::= x #\rx ::= "a"{1001}',  # llama-server's comments end there
            'root ::= ("a"{#}\n1001})',
            'root ::= ("a"{1,#}\n1001})',
            'root ::= ( #)\r"a"{1001})',
        ],
    )
    def test_no_comment_hides_a_repetition(self, text: str) -> None:
        with pytest.raises(BadRequest, match="repeats"):
            check_grammar(text, "grammar")

    @pytest.mark.parametrize(
        ("text", "nests"),
        [
            ('root ::= "a" | [b-z]{1,1000} ("c" | d){2} # root\nd ::= "root"', False),
            ("root ::= " + " | ".join(f'"{number:x}"' for number in range(2000)), False),
            ("root ::= x{1000}\nx ::= [a-z]{10}", False),
            ("root ::= x{1000}\nx ::= [a-z]{20}", True),
            ('root ::= "a" root | "b"', True),
            ('root ::= "a" x\nx ::= ("b" y)?\ny ::= x', True),
            ("root ::= r0\nr20 ::= []\n" + "".join(f'r{i} ::= "a" r{i + 1} | "a" r{i + 1}\n' for i in range(20)), True),
        ],
    )
    def test_what_may_be_in_many_places_at_once_is_named(self, text: str, nests: bool) -> None:
        check_grammar(text, "grammar")
        assert may_nest(text) is nests

    def test_bounds_that_just_hold(self) -> None:
        check_grammar('root ::= "a"{1000} ' + "(" * MAX_DEPTH + '"b"' + ")" * MAX_DEPTH, "grammar")

    def test_size(self) -> None:
        with pytest.raises(BadRequest, match="bytes"):
            check_grammar('root ::= "' + "ä" * (MAX_BYTES // 2) + '"', "grammar")


class TestSchema:
    def nested(self, depth: int) -> bytes:
        return b'{"items":' * depth + b"{}" + b"}" * depth

    def test_depth(self) -> None:
        check_schema(self.nested(MAX_DEPTH), "tools")
        with pytest.raises(BadRequest, match="nested"):
            check_schema(self.nested(MAX_DEPTH + 1), "tools")

    def test_a_depth_beyond_any_decoder(self) -> None:
        with pytest.raises(BadRequest):
            check_schema(self.nested(5000), "tools")

    @pytest.mark.parametrize("pattern", ["a{1001}", "a{0,1001}", "(" * 33 + ")" * 33])
    def test_patterns(self, pattern: str) -> None:
        with pytest.raises(BadRequest):
            check_schema(json.dumps({"pattern": pattern}).encode(), "tools")

    def test_usual_tools_pass(self) -> None:
        parameters = {"type": "object", "properties": {"city": {"type": "string", "pattern": "^[A-Z]{2,20}$"}}}
        check_schema(json.dumps([{"type": "function", "function": {"parameters": parameters}}]).encode(), "tools")

    FAR: tuple[dict[str, object], ...] = (
        {"minimum": 10**15 + 1}, {"exclusiveMinimum": 1e16}, {"maximum": -(10**15) - 1}, {"exclusiveMaximum": -1e17},
        {"minimum": 2**63}, {"minimum": 0, "maximum": 2**64 - 10**17}, {"maximum": 1e300}, {"minimum": -(2**63) - 1e10},
    )  # fmt: skip
    NEAR: tuple[dict[str, object], ...] = (
        {"minimum": 10**15},
        {"maximum": -1e15},
        {"minimum": -(2**63), "maximum": 2**63 - 1},
        {"minimum": "x"},
        {},
    )

    @pytest.mark.parametrize("kind", ["integer", ["null", "integer"]])
    def test_integers(self, kind: object) -> None:
        for bounds in self.NEAR:
            check_schema(json.dumps({"properties": {"a": {"type": kind} | bounds}}).encode(), "tools")
        for bounds in self.FAR:
            with pytest.raises(BadRequest, match="far from 0"):
                check_schema(json.dumps({"properties": {"a": {"type": kind} | bounds}}).encode(), "tools")
            check_schema(json.dumps({"type": "number"} | bounds).encode(), "tools")
