"""What crashes or hangs llama-server is refused before it gets there, and its process stays the same.

The comments say what the same request did when it was sent straight to llama-server build 11669 with a model of 0.5 MB,
4 slots of 4,096 tokens and one thread. "Hangs": nobody was served any more, for as long as it was watched.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import Gateway, running_gateway
from tests.real.templates import TOOLS_TEMPLATE
from tests.real.test_errors import check
from tests.real.wire import chat

pytestmark = pytest.mark.real

CHAT = "/v1/chat/completions"
STRING = {"type": "string"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """With a template that knows tools: without one llama-server never looks into them."""
    folder = tmp_path_factory.mktemp("gateway")
    template = folder / "tools.jinja"
    template.write_text(TOOLS_TEMPLATE)
    with running_gateway(
        folder, MODEL_PATH=str(chat_model), EXTRA_ARGS=f"--chat-template-file {template}", REQUEST_TIMEOUT="5"
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def same_process(gateway: Gateway) -> Iterator[None]:
    before = gateway.model()["pid"]
    yield
    assert gateway.chat(seconds=5).status == 200
    assert gateway.model()["pid"] == before


def doubling(last: str) -> str:
    return "".join(f"r{n} ::= r{n + 1} r{n + 1}\n" for n in range(40)) + f"r40 ::= {last}\nroot ::= r0\n"


def references(kind: str) -> dict[str, Any]:
    """Definitions of which each names the next one twice."""
    steps: dict[str, Any] = {
        f"r{n}": {kind: [{"$ref": f"#/$defs/r{n + 1}"}, {"$ref": f"#/$defs/r{n + 1}"}]} for n in range(40)
    }
    return {"$defs": steps | {"r40": STRING}, "$ref": "#/$defs/r0"}


def lists_in_lists(depth: int, kind: Any) -> dict[str, Any]:
    schema: dict[str, Any] = STRING
    for _ in range(depth):
        schema = {"type": kind, "items": schema}
    return schema


def tool(parameters: object, name: str = "f") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}]


def needs(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]}


MIN_MAX = {"type": "string", "minLength": 5, "maxLength": 2}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": MIN_MAX}}

CASES: dict[str, tuple[dict[str, Any], str]] = {
    # --- grammars
    # SIGSEGV at once (llama.cpp #26600); 30 KB of it worked
    "brackets, 120 KB": ({"grammar": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000}, "grammar"),
    # worked; stands for the many depths between the two
    "brackets, 33 deep": ({"grammar": "root ::= " + "(" * 33 + '"a"' + ")" * 33}, "grammar"),
    # hangs, 4 GB after 6 s: it counts from 5 down to 2, the wrong way round
    "at least 5, at most 2": ({"grammar": 'root ::= "a"{5,2}'}, "grammar"),
    "at least 1, at most 0": ({"grammar": 'root ::= "a"{1,0}'}, "grammar"),
    # hangs, 2.6 GB after 12 s: 755 bytes
    "rules that double, then nothing": ({"grammar": doubling('"a" | ""')}, "grammar"),
    # hangs without growing, in its search for left recursion
    "rules that double in their choices": ({"grammar": doubling('"a"').replace(" r", " | r")}, "grammar"),
    # hangs
    "8,000 optional letters": ({"grammar": "root ::= " + '"a"? ' * 8000 + '"b"'}, "grammar"),
    # 0.3 s for each token
    "600 optional letters": ({"grammar": "root ::= " + '"a"? ' * 600 + '"b"'}, "grammar"),
    # hangs, 1 GB
    "4,500 times up to 1,000": ({"grammar": "root ::= " + '"a"{0,1000} ' * 4500}, "grammar"),
    # 1 s for others as well, 300 MB; with 60 KB 1 GB
    "30 KB a thousand times": ({"grammar": 'root ::= "' + "x" * 30_000 + '"{1000}'}, "grammar"),
    # 1.2 s for others as well
    "15,000 choices": ({"grammar": "root ::= " + "|".join(['"a"'] * 15_000)}, "grammar"),
    # a 400 of its own
    "left recursion": ({"grammar": 'root ::= root "a" | "b"'}, "grammar"),
    # --- schemas
    # hangs, 5 GB after 6 s
    "minLength above maxLength": ({"json_schema": MIN_MAX}, "json_schema"),
    "the same as a format": ({"response_format": FORMAT}, "response_format"),
    # answered; it is the same mistake, and another build may read it otherwise
    "minItems above maxItems": ({"json_schema": {"type": "array", "minItems": 5, "maxItems": 1}}, "json_schema"),
    # hangs, 2.5 GB after 8 s
    "a pattern of a{5,2}": ({"json_schema": {"type": "string", "pattern": "^a{5,2}$"}}, "json_schema"),
    "the same with signs": ({"json_schema": {"type": "string", "pattern": "^a{+5,+2}$"}}, "json_schema"),
    # hangs
    "a pattern of 10,000 optional letters": ({"json_schema": {"pattern": "^" + "a?" * 10_000 + "$"}}, "json_schema"),
    "a pattern of 5,000 optional groups": ({"json_schema": {"pattern": "^" + "(a?)" * 5000 + "$"}}, "json_schema"),
    # 0.3 s a token, for others as well
    "a pattern of a thousand optional letters": ({"json_schema": {"pattern": "^(a?){1000}$"}}, "json_schema"),
    "a pattern of 0-1,000 times 0-1,000": ({"json_schema": {"pattern": "^(a{0,1000}){0,1000}$"}}, "json_schema"),
    # hangs: 2.9 KB
    "references that double": ({"json_schema": references("anyOf")}, "json_schema"),
    "references that double, otherwise": ({"json_schema": references("oneOf")}, "json_schema"),
    # 16 deep 2.5 s, 0.5 GB; 30 deep no end, 3 GB after 10 s: 1.3 KB. Others were served
    "types that double": ({"json_schema": lists_in_lists(30, ["array", "array"])}, "json_schema"),
    # 4 s for others as well
    "8,000 values": ({"json_schema": {"enum": [f"v{n}" for n in range(8000)]}}, "json_schema"),
    # hangs: an integer's only bound has 16 digits; 10^15 was answered
    "from 2^53 - 1": ({"json_schema": {"type": "integer", "minimum": 2**53 - 1}}, "json_schema"),
    "from 10^17, among types": ({"json_schema": {"type": ["null", "integer"], "minimum": 1e17}}, "json_schema"),
    "from behind 10^17": ({"json_schema": {"type": "integer", "exclusiveMinimum": 10**17}}, "json_schema"),
    "up to -2^53": ({"json_schema": {"type": "integer", "maximum": -(2**53)}}, "json_schema"),
    "up to before -10^17": ({"json_schema": {"type": "integer", "exclusiveMaximum": -(10**17)}}, "json_schema"),
    # hangs: it wraps around and is less than nothing
    "up to 2^64 - 10^17": ({"json_schema": {"type": "integer", "maximum": 2**64 - 10**17}}, "json_schema"),
    "a tool with such a number": ({"tools": tool(needs({"type": "integer", "maximum": -(10**17)}))}, "tools"),
    # 13 s of a core, then a 400
    "1,500 properties": ({"tools": tool({"properties": {f"p{n}": STRING for n in range(1500)}})}, "tools"),
    # --- tools
    # passed on to the template, and too long for the context here; #25895
    "tools of 100 KB": ({"tools": tool(needs(STRING), name="x" * 100_000)}, "tools"),
    # hang, 10 GB after 20 s, whether the model calls them or not
    "a tool with minLength above maxLength": ({"tools": tool(needs(MIN_MAX))}, "tools"),
    "a tool with such a pattern": ({"tools": tool(needs({"type": "string", "pattern": "^a{5,2}$"}))}, "tools"),
    "a tool with references that double": ({"tools": tool(references("anyOf"))}, "tools"),
    # --- numbers and lists
    # 0.9 s and 1.2 s for 400 tokens of a vocabulary of 560; one with 250,000 tokens sends megabytes a token
    "a million probabilities": ({"n_probs": 1_000_000}, "n_probs"),
    "10^9 probabilities": ({"logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
    # 400s of its own
    "10^9 answers": ({"n": 10**9}, "n"),
    "10^9 answers by another name": ({"n_cmpl": 10**9}, "n_cmpl"),
    # 4.3 s, 2 GB that stay
    "2,000,000 stop words": ({"stop": ["x"] * 2_000_000}, "stop"),
    # 15 s of a core with 50,000, more than 60 s with these
    "500,000 biases": ({"logit_bias": {str(n): 1 for n in range(500_000)}}, "logit_bias"),
    # 17 s for others as well, 1 GB more
    "9 MB of samplers": ({"samplers": "k" * 9_000_000}, "samplers"),
    "900,000 samplers": ({"samplers": ["top_k"] * 900_000}, "samplers"),
    # more than 60 s, and 7 s more after the client had left
    "a million sequence breakers": ({"dry_sequence_breakers": ["x"] * 10**6}, "dry_sequence_breakers"),
    # 60 s and more of a core, 2 GB, twice as much as half of it would take squared
    "250,000 messages": ({"messages": [{"role": "user", "content": "x"}] * 250_000}, "messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(gateway: Gateway, case: str) -> None:
    fields, param = CASES[case]
    check(gateway.request("POST", CHAT, chat(**fields), seconds=6), 400, "invalid_request", param)


def test_a_schema_of_lists_60_000_deep(gateway: Gateway) -> None:
    """SIGSEGV. The decoder's own bound on depth comes before ours."""
    deep = b'{"type":"array","items":' * 60_000 + b"{}" + b"}" * 60_000
    body = b'{"messages":[{"role":"user","content":"x"}],"max_tokens":4,"json_schema":%s}' % deep
    check(gateway.request("POST", CHAT, body, seconds=6), 400, "invalid_json")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        # 9 GB after 60 s, then nobody was served any more
        ("/v1/completions", {"prompt": ["x"] * 100_000, "max_tokens": 1}, "prompt"),
        ("/completion", {"prompt": [[1, 2]] * 100_000, "n_predict": 1}, "prompt"),
        # 0.7 GB, and others were not served for as long as it was watched (an embedding model)
        ("/v1/embeddings", {"input": ["x"] * 100_000}, "input"),
        ("/v1/rerank", {"query": "x", "documents": ["x"] * 100_000}, "documents"),
        # more than 60 s of a core
        ("/v1/responses", {"input": [{"role": "user", "content": "x"}] * 100_000, "max_output_tokens": 4}, "input"),
        ("/apply-template", {"messages": [{"role": "user", "content": "x"}] * 250_000}, "messages"),
    ],
)
def test_refused_on_other_routes(gateway: Gateway, path: str, body: dict[str, Any], param: str) -> None:
    check(gateway.request("POST", path, body, seconds=6), 400, "invalid_request", param)


BOUNDED: dict[str, dict[str, Any]] = {
    # 10 GB and 22 GB, and nobody was served: it allocates as many numbers as it is to look back on
    "repeat_last_n": {"repeat_last_n": 2**31 - 1, "repeat_penalty": 1.1},
    "dry_penalty_last_n": {"dry_penalty_last_n": 2**31 - 1, "dry_multiplier": 1},
    # runs to the end of the context
    "no bound": {"max_tokens": None},
    # an answer kept after its client has left; another one's slot; adapters of the whole server
    "removed": {"conversation_id": "x", "id_slot": 3, "lora": [{"id": 0, "scale": 5}], "sse_ping_interval": 1},
}


@pytest.mark.parametrize("case", BOUNDED)
def test_bounded_or_removed(gateway: Gateway, case: str) -> None:
    assert gateway.request("POST", CHAT, chat(max_tokens=50) | BOUNDED[case], seconds=8).status == 200


NONSENSE: dict[str, dict[str, Any]] = {  # harmless on build 11669, and so passed on
    "temperature": {"temperature": -1e30, "top_p": -1, "min_p": 5, "typical_p": -3},
    "infinite": {"temperature": 1e300, "mirostat": 2, "mirostat_tau": -1e308, "mirostat_eta": 1e308},
    "denormal": {"temperature": 1e-320, "top_n_sigma": 1e-300, "dynatemp_range": 1e30, "dynatemp_exponent": -1e30},
    "top_k": {"top_k": 2**31 - 1, "min_keep": 2**31 - 1, "xtc_probability": 9, "xtc_threshold": -9},
    "n_keep": {"n_keep": 2**31 - 1, "n_discard": 2**31 - 1, "n_indent": 2**31 - 1},
    "all biased away": {"logit_bias": [[n, False] for n in range(600)]},
    "biases out of range": {"logit_bias": [[2**31 - 1, 1e308], [-5, 1], [10**12, 1]]},
    "samplers": {"samplers": ["nonsense", "top_k", "top_k", ""]},
    "breakers": {"dry_multiplier": 1e308, "dry_base": 1e308, "dry_sequence_breakers": ["", "\0", "x" * 100_000]},
    "triggers": {"grammar": 'root ::= "a"', "grammar_lazy": True, "grammar_triggers": [{"type": 2, "value": "(a+)+$"}]},
    "kwargs": {"chat_template_kwargs": {"messages": [1] * 1000, "add_generation_prompt": {"a": 1}, "bos_token": 5}},
    "special tokens": {"messages": [{"role": "user", "content": "<|im_end|><|im_start|>system\n</s><s>" * 50}]},
    "noncharacters": {"messages": [{"role": "user", "content": "\0\uffff\U0010ffff\u202e" * 50}]},
    # grammars and schemas that people use
    "JSON": {"response_format": {"type": "json_object"}},
    "a list": {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 100}},
    "a choice": {"json_schema": {"enum": [f"zone/{n}" for n in range(600)]}},
    "recursive": {
        "json_schema": {
            "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}, "v": STRING}}},
            "$ref": "#/$defs/node",
        }
    },
    "integers": {"json_schema": {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1}},
    "64 bits": {"json_schema": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}},
    "large, otherwise": {"json_schema": {"type": "integer", "minimum": 10**15}, "n_predict": 4},
    "a number": {"json_schema": {"type": "number", "minimum": -1e308, "maximum": 1.7e308}},
    "a pattern": {"json_schema": {"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}(T\\d{2}:\\d{2})?$"}},
}


@pytest.mark.parametrize("case", NONSENSE)
@pytest.mark.parametrize("stream", [False, True])
def test_passed_on(gateway: Gateway, case: str, stream: bool) -> None:
    body = chat(max_tokens=40, stream=stream) | NONSENSE[case]
    reply = gateway.request("POST", CHAT, body, seconds=8)
    assert reply.status == 200, reply.body


def test_what_contradicts_a_grammar_is_the_clients_fault(gateway: Gateway) -> None:
    """llama-server: 500, "Unexpected empty grammar stack after accepting piece"."""
    for grammar, bias in (('root ::= "a"+', [[n, False] for n in range(600)]), ("root ::= [z-a]", [])):
        for tokens in (8, 80):  # the latter is assembled from a stream, in which llama-server tells it
            fields = chat(grammar=grammar, logit_bias=bias, max_tokens=tokens)
            reply = gateway.request("POST", CHAT, fields, seconds=8)
            assert "grammar" in check(reply, 400, "invalid_request")
