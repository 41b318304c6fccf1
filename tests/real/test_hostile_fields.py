"""Every field of a chat request with values of wrong types and sizes: 400 in our shape, or 200 where llama-server does
not mind; never a 5xx, and never another process behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import Gateway, running_gateway
from tests.real.test_errors import check
from tests.real.wire import Wire, chat, request, wire

pytestmark = pytest.mark.real

WRONG: list[Any] = [
    None, True, -1, 0, 1, 1.5, -1e308, 1e-320, 2**31, 2**63, 10**30, "", "x", "1", "NaN", "\0", "\U0010ffff",
    [], [1], ["x"], [None], [[]], [{}], [[1, 2]], {}, {"a": 1}, {"type": 5}, {"": {"": None}},
]  # fmt: skip

OPENAI = """
messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n presence_penalty
response_format seed stop stream stream_options temperature top_p tools tool_choice parallel_tool_calls user
functions function_call metadata modalities audio store service_tier prediction reasoning_effort verbosity
web_search_options
""".split()
LLAMA = """
top_k min_p typical_p top_n_sigma xtc_probability xtc_threshold repeat_last_n repeat_penalty dry_multiplier dry_base
dry_allowed_length dry_penalty_last_n dry_sequence_breakers mirostat mirostat_tau mirostat_eta dynatemp_range
dynatemp_exponent adaptive_target adaptive_decay n_keep n_discard n_indent n_predict n_cmpl n_probs min_keep
post_sampling_probs cache_prompt return_tokens return_progress timings_per_token ignore_eos samplers grammar
grammar_lazy grammar_triggers preserved_tokens json_schema id_slot lora sse_ping_interval conversation_id prompt
t_max_predict_ms t_max_prompt_ms response_fields reasoning_format reasoning_budget_tokens enable_thinking
chat_template_kwargs chat_format chat_parser add_generation_prompt continue_final_message parse_tool_calls
speculative.n_max speculative.n_min speculative.p_min backend_sampling n_cache_reuse echo suffix image_data
""".split()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    with running_gateway(folder, MODEL_PATH=str(chat_model), MAX_TOKENS_LIMIT="64") as running:
        yield running


@pytest.fixture(autouse=True)
def same_process(gateway: Gateway) -> Iterator[None]:
    before = gateway.model()["pid"]
    yield
    assert gateway.model()["pid"] == before
    assert gateway.chat().status == 200
    assert "Traceback" not in gateway.stderr


def ask(client: Wire, path: str, body: dict[str, Any]) -> int:
    client.send(request("POST", path, body))
    reply = client.answer()
    if reply.status == 200:
        assert reply.whole
    else:
        code = reply.json()["error"].get("code")
        if path == "/v1/messages" or path.endswith("count_tokens"):
            assert reply.status == 400, (body, reply.body)
        elif code == "grammar_not_found":
            assert reply.status == 404
        else:
            assert code in ("invalid_json", "invalid_request", "context_length_exceeded"), (body, reply.body)
            check(reply, 400, code, reply.json()["error"]["param"])
    return reply.status


@pytest.mark.parametrize("field", OPENAI + LLAMA)
def test_a_field(gateway: Gateway, field: str) -> None:
    with wire(gateway) as client:
        for value in WRONG:
            ask(client, "/v1/chat/completions", chat(max_tokens=4) | {field: value})


# What OpenAI would refuse and the gateway or llama-server refuses as well.
REFUSED: dict[str, list[Any]] = {
    "messages": [None, 1, "x", {}, [], [1], [None], [[]], [{}], [{"role": 1}]],
    "model": [1, True, [], {}],
    "stream": [1, "true", []],
    "n": [0, -1, "2", 1.5, 10**30],
    "max_tokens": [-1, "x", 1.5, [], True],
    "max_completion_tokens": [-1, "x", 1.5],
    "stop": [1, {}, [1], [None], ["x"] * 65, ["x" * 1025]],
    "top_logprobs": [-1, 101, "x"],
    "temperature": ["hot", [], {}],
    "top_p": ["x", []],
    "frequency_penalty": ["x", []],
    "presence_penalty": ["x", []],
    "response_format": [{"type": "nope"}, {"type": "json_schema", "json_schema": 1}],
    "tools": [1, "x", {"a": 1}, [1], [{}]],
    "tool_choice": ["x"],
    "grammar": [1, [], "root ::= ("],
    "json_schema": [1, "x", [], {"type": 5}],
    "repeat_last_n": ["x", 1.5, -5],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_must_be_refused(gateway: Gateway, field: str) -> None:
    with wire(gateway) as client:
        for value in REFUSED[field]:
            assert ask(client, "/v1/chat/completions", chat(max_tokens=4) | {field: value}) == 400, value


MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "reasoning_content", "function_call")
PARTS = ("text", "image_url", "input_audio", "file", "image", "tool_result", "tool_use", "thinking", "refusal", "x")
INNER = ("type", "text", "image_url", "input_audio", "file", "source", "tool_use_id", "content")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("field", MESSAGE)
def test_a_field_of_a_message(gateway: Gateway, path: str, field: str) -> None:
    with wire(gateway) as client:
        for value in WRONG:
            for role in ("user", "assistant", "tool"):
                turns = [{"role": role, "content": "hi", field: value}, {"role": "user", "content": "x"}]
                ask(client, path, chat(max_tokens=4, messages=turns))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_field_of_a_part(gateway: Gateway, path: str, kind: str) -> None:
    with wire(gateway) as client:
        for value in WRONG:
            for field in INNER:
                part = {"type": kind, "text": "x", field: value}
                ask(client, path, chat(max_tokens=4, messages=[{"role": "user", "content": [part]}]))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/completions": ({"prompt": "hi", "max_tokens": 4}, "prompt suffix echo logprobs best_of n stop logit_bias"),
    "/completion": (
        {"prompt": "hi", "n_predict": 4},
        "prompt input_prefix grammar json_schema samplers logit_bias stop n_probs response_fields n_predict n_cmpl",
    ),
    "/v1/responses": (
        {"input": "hi", "max_output_tokens": 4},
        "input instructions tools tool_choice text reasoning previous_response_id include metadata truncation",
    ),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        "messages system tools tool_choice thinking stop_sequences metadata output_config output_format",
    ),
    "/tokenize": ({"content": "hi"}, "content add_special with_pieces parse_special"),
    "/detokenize": ({"tokens": [300]}, "tokens"),
    "/apply-template": (
        {"messages": [{"role": "user", "content": "hi"}]},
        "messages tools chat_template_kwargs add_generation_prompt",
    ),
}


@pytest.mark.parametrize("path", OTHERS)
def test_the_other_routes(gateway: Gateway, path: str) -> None:
    usual, fields = OTHERS[path]
    with wire(gateway) as client:
        for field in fields.split():
            for value in WRONG:
                ask(client, path, usual | {field: value})
            ask(client, path, {name: value for name, value in usual.items() if name != field} | {"max_tokens": 4})


def test_deep_values_where_llama_server_takes_any(gateway: Gateway) -> None:
    deep = json.loads("[" * 400 + "]" * 400)
    with wire(gateway) as client:
        for field in ("user", "metadata", "nonsense", "logit_bias", "stop", "samplers", "tools", "json_schema"):
            ask(client, "/v1/chat/completions", chat(max_tokens=4) | {field: deep})
            ask(client, "/v1/chat/completions", chat(max_tokens=80) | {field: deep})
