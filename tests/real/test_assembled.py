"""An answer assembled from a real llama-server's stream is the one that it gives without streaming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from gateway.pipeline.assemble import Assembler, StreamCut, StreamFailed, assembler
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.dialects import Dialect, error_in
from gateway.pipeline.frames import FrameParser
from gateway.pipeline.hidden import keep_end
from gateway.pipeline.usage import Usage, usage_of_body, usage_of_stream
from scripts.make_model import make_model
from tests.real.llama import Llama, running_llama
from tests.real.templates import THINKING_TEMPLATE, TOOLS_TEMPLATE

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("assembled")]

C, T, N, R, M = Dialect.CHAT, Dialect.COMPLETIONS, Dialect.NATIVE, Dialect.RESPONSES, Dialect.MESSAGES
PATHS = {
    C: "/v1/chat/completions",
    T: "/v1/completions",
    N: "/completion",
    R: "/v1/responses",
    M: "/v1/messages",
}

THOUGHT = 'root ::= "ab cd</think>\\n\\nHe said " ("hi " | "ho ") "漢字"'
ACCENT = 'root ::= "é" [a-z ]+'
# Three common words stand for what a model that fills in has of its own.
FIM = ",".join(f"tokenizer.ggml.fim_{part}_token_id=int:{300 + at}" for at, part in enumerate(("pre", "suf", "mid")))
ARGUMENTS: dict[str, dict[str, str]] = {
    "plain": {"--override-kv": FIM},
    "tools": {"--chat-template-file": TOOLS_TEMPLATE},
    "thinking": {"--chat-template-file": THINKING_TEMPLATE, "--grammar": THOUGHT},
    "accent": {"--grammar": ACCENT},
}

HI = {"messages": [{"role": "user", "content": "hi"}]}
CALL = {"type": "object", "properties": {"city": {"enum": ["ab", "cd"]}, "n": {"type": "boolean"}}}
CALL["required"] = ["city", "n"]
FUNCTION = {"name": "weather", "description": "w", "parameters": CALL}
# A prompt that ends in <tool_call> makes even this model call tools: the grammar of "required" then leaves no choice.
BEGUN = "<tool_call>\n"
TOOL_CALL = {
    C: {
        "messages": [*HI["messages"], {"role": "assistant", "content": BEGUN}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "required",
        "max_tokens": 150,
    },
    R: {
        "input": [
            {"role": "user", "content": "hi"},
            {
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "id": "m",
                "content": [{"type": "output_text", "text": BEGUN}],
            },
        ],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "required",
        "max_output_tokens": 150,
    },
    M: {
        "messages": [*HI["messages"], {"role": "assistant", "content": BEGUN}],
        "tools": [{"name": "weather", "description": "w", "input_schema": CALL}],
        "tool_choice": {"type": "any"},
        "max_tokens": 150,
    },
}

EQUAL: list[tuple[str, Dialect, dict[str, Any]]] = [
    ("plain", C, {**HI, "max_tokens": 40}),
    ("plain", C, {**HI, "max_tokens": 1}),
    ("plain", C, {**HI, "max_tokens": 10, "n": 2}),
    ("plain", C, {**HI, "max_tokens": 20, "stop": ["e"]}),
    ("plain", C, {**HI, "max_tokens": 40, "stop": ["e zebra"], "grammar": 'root ::= "the house by the sea we like"'}),
    ("plain", C, {**HI, "max_tokens": 40, "response_format": {"type": "json_object"}}),
    ("plain", C, {**HI, "max_tokens": 10, "timings_per_token": True, "return_progress": True}),
    ("plain", C, {**HI, "max_tokens": 40, "grammar": 'root ::= "aé漢😀"+'}),
    ("plain", T, {"prompt": "Once", "max_tokens": 40}),
    ("plain", T, {"prompt": "Once", "max_tokens": 1, "echo": True}),
    ("plain", T, {"prompt": "Once", "max_tokens": 10, "logprobs": 3}),
    ("plain", T, {"prompt": "Once", "max_tokens": 10, "logprobs": 1, "post_sampling_probs": True, "n": 2}),
    ("plain", T, {"prompt": ["a", "b"], "max_tokens": 10, "stop": "zebra"}),
    ("plain", N, {"prompt": "Once", "n_predict": 40}),
    ("plain", N, {"prompt": "Once", "n_predict": 10, "n_probs": 2}),
    ("plain", N, {"prompt": "a", "n_predict": 20, "grammar": 'root ::= "aé漢😀"+', "n_probs": 1}),
    ("plain", N, {"prompt": "a", "n_predict": 20, "stop": ["e"]}),
    ("plain", N, {"prompt": ["a", "b"], "n_predict": 10}),
    ("plain", N, {"prompt": ["a", "b"], "n_predict": 5, "n_cmpl": 2}),
    ("plain", N, {"prompt": [[300, 301], "b"], "n_predict": 5}),
    ("plain", N, {"prompt": [300, "b"], "n_predict": 5}),
    ("plain", N, {"prompt": ["a"], "n_predict": 5, "return_progress": True, "timings_per_token": True}),
    ("plain", N, {"prompt": "a", "n_predict": 5, "response_fields": ["content", "prompt", "x/y", "timings/cache_n"]}),
    ("plain", N, {"input_prefix": "a", "input_suffix": "b", "n_predict": 10}),
    ("plain", N, {"input_prefix": "a", "input_suffix": "b", "prompt": "xy", "n_predict": 10, "n": 2}),
    ("plain", R, {"input": "hi", "max_output_tokens": 40}),
    ("plain", R, {"input": "hi", "max_output_tokens": 20, "stop": ["e"]}),
    ("plain", M, {**HI, "max_tokens": 40}),
    ("plain", M, {**HI, "max_tokens": 20, "stop_sequences": ["e"]}),
    ("thinking", C, {**HI, "max_tokens": 80}),
    ("thinking", C, {**HI, "max_tokens": 3}),
    ("thinking", C, {**HI, "max_tokens": 80, "reasoning_format": "none"}),
    ("thinking", R, {"input": "hi", "max_output_tokens": 80}),
    ("thinking", M, {**HI, "max_tokens": 80}),
    ("accent", C, {**HI, "max_tokens": 10}),
    ("accent", R, {"input": "hi", "max_output_tokens": 10}),
    # `assembles` says no to these, but only because of what stands before the answer
    ("tools", C, TOOL_CALL[C]),
    ("tools", R, TOOL_CALL[R]),
    ("tools", M, TOOL_CALL[M]),
]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Llama]]:
    folder = tmp_path_factory.mktemp("assembled")
    make_model(folder / "demo.gguf")
    with ExitStack() as stack:
        started = {}
        for name, options in ARGUMENTS.items():
            arguments = []
            for option, text in options.items():
                if option == "--chat-template-file":
                    (folder / f"{name}.jinja").write_text(text)
                    text = str(folder / f"{name}.jinja")
                arguments += [option, text]
            started[name] = stack.enter_context(running_llama(folder / "demo.gguf", *arguments))
        yield started


def both(llama: Llama, dialect: Dialect, request: dict[str, Any]) -> tuple[bytes, bytes]:
    """What llama-server answers without streaming, and its stream."""
    request = {"model": "demo", "temperature": 0, "cache_prompt": False, **request}
    path = "/infill" if "input_prefix" in request else PATHS[dialect]
    status, direct = llama.post(path, request)
    assert status == 200, direct
    status, stream = llama.post(path, dialect.ask_stream(request))
    assert status == 200, stream
    return direct, stream


def assembled(dialect: Dialect, request: dict[str, Any], stream: bytes) -> Assembler:
    parser, made = FrameParser(), assembler(dialect, request)
    for at in range(0, len(stream), 1000):
        for frame in parser.feed(stream[at : at + 1000]):
            made.feed(frame)
    assert not parser.pending
    return made


def of_stream(dialect: Dialect, stream: bytes) -> Usage:
    return usage_of_stream(dialect, stream[:4096], stream[-8192:], stream.count(b"data:"))


UNLIKE = {"id", "created", "created_at", "completed_at", "id_slot", "call_id", "timings", "cached_tokens"}


def differences(whole: Any, made: Any, path: str = "") -> list[str]:
    if isinstance(whole, dict) and isinstance(made, dict):
        if "cache_read_input_tokens" in whole:  # what is cached differs from one run to the next, not the sum
            whole, made = (told | {"input_tokens": Usage.of_final({"usage": told}).prompt} for told in (whole, made))
            whole["cache_read_input_tokens"] = made.get("cache_read_input_tokens")
        found = [f"{path}/{name}: in one only" for name in (whole.keys() ^ made.keys()) - {"timings"}]
        for name in (whole.keys() & made.keys()) - (UNLIKE if "bytes" not in whole else set()):
            found += differences(whole[name], made[name], f"{path}/{name}")
        return found
    if isinstance(whole, list) and isinstance(made, list) and len(whole) == len(made):
        return [
            each for at, pair in enumerate(zip(whole, made, strict=True)) for each in differences(*pair, f"{path}/{at}")
        ]
    if isinstance(whole, float) and isinstance(made, float) and math.isclose(whole, made, rel_tol=1e-3):
        return []
    return [] if whole == made and type(whole) is type(made) else [f"{path}: {whole!r:.200} became {made!r:.200}"]


def labels(cases: Sequence[tuple[Any, ...]]) -> list[str]:
    return [f"{server}-{dialect.value}-{'+'.join(request)}" for server, dialect, request, *_ in cases]


@pytest.mark.parametrize(("server", "dialect", "request_"), EQUAL, ids=labels(EQUAL))
def test_the_assembled_answer_is_the_whole_one(
    servers: dict[str, Llama], server: str, dialect: Dialect, request_: dict[str, Any]
) -> None:
    assert dialect.assembles(request_) is (server != "tools")
    direct, stream = both(servers[server], dialect, request_)
    made = assembled(dialect, request_, stream)
    assert made.finished
    assert differences(json.loads(direct), json.loads(made.result())) == []

    assert dialect.ended_well(stream[-8192:])
    several = request_.get("n") or request_.get("n_cmpl") or isinstance(request_.get("prompt"), list)
    assert of_stream(dialect, stream) == made.usage
    if "response_fields" not in request_ and not several:
        told = usage_of_body(dialect, direct)
        assert (told.prompt, told.completion) == (made.usage.prompt, made.usage.completion)
    assert made.usage.prompt and made.usage.completion


@pytest.mark.parametrize(("server", "dialect", "request_"), EQUAL, ids=labels(EQUAL))
def test_a_stream_cut_anywhere_is_seen_as_cut(
    servers: dict[str, Llama], server: str, dialect: Dialect, request_: dict[str, Any]
) -> None:
    if dialect is N:  # of several native answers only the last is looked at
        request_ = {**request_, "prompt": "a", "n_cmpl": 1}
    _, stream = both(servers[server], dialect, request_)
    whole = of_stream(dialect, stream)
    parser, made = FrameParser(), assembler(dialect, request_)
    at, tokens = 0, 0
    while True:
        end = stream.index(b"\n\n", at) + 2
        told = of_stream(dialect, stream[:end])
        # Before the very end events that close something count as tokens, three of them in a response. And one
        # that begins with half a character repeats its response.created with every token.
        slack = 3 if server != "accent" else 20
        assert min(tokens, whole.completion) <= told.completion <= whole.completion + slack
        tokens = told.completion
        for frame in parser.feed(stream[at:end]):
            made.feed(frame)
        if made.finished:
            break
        assert not dialect.ended_well(stream[:end][-8192:]), stream[:end][-300:]
        with pytest.raises(StreamCut):
            made.result()
        at = end
    assert tokens == whole.completion


DIFFERENT: list[tuple[str, Dialect, dict[str, Any], str]] = [
    ("plain", C, {"messages": [*HI["messages"], {"role": "assistant", "content": "I say"}]}, "content"),
    ("plain", M, {"messages": [*HI["messages"], {"role": "assistant", "content": "I say"}]}, "content"),
    ("thinking", C, {**HI, "logprobs": True, "top_logprobs": 1}, "logprobs"),
    ("plain", T, {"prompt": "a", "logprobs": 1, "stop": ["e"]}, "logprobs"),
    ("plain", N, {"prompt": "a", "n_probs": 1, "stop": ["e"]}, "completion_probabilities"),
    ("plain", N, {"prompt": "a", "return_tokens": True, "grammar": 'root ::= "aé漢"'}, "tokens"),
]


@pytest.mark.parametrize(("server", "dialect", "request_", "where"), DIFFERENT, ids=labels(DIFFERENT))
def test_what_is_not_assembled_would_differ(
    servers: dict[str, Llama], server: str, dialect: Dialect, request_: dict[str, Any], where: str
) -> None:
    """If one of these fails, llama-server has changed, and the rule in Dialect.assembles can go."""
    assert not dialect.assembles(request_)
    request_ = {**request_, "max_tokens": 40}
    direct, stream = both(servers[server], dialect, request_)
    found = differences(json.loads(direct), json.loads(assembled(dialect, request_, stream).result()))
    assert found
    assert all(where in each for each in found), found


def test_logprobs_with_tools_cannot_be_streamed(servers: dict[str, Llama]) -> None:
    request = {**HI, "logprobs": True, "max_tokens": 2, "tools": TOOL_CALL[C]["tools"]}
    assert not C.assembles(request)
    assert servers["tools"].post(PATHS[C], request)[0] == 200
    status, told = servers["tools"].post(PATHS[C], C.ask_stream(request))
    assert (status, b"logprobs is not supported with tools + stream" in told) == (400, True)


@pytest.mark.parametrize("dialect", [C, R, M])
def test_an_error_in_the_stream(servers: dict[str, Llama], dialect: Dialect) -> None:
    """A call that was begun and is not held to its grammar: the parser gives up when the words come."""
    choice = {"type": "auto"} if dialect is M else "auto"
    request = {**TOOL_CALL[dialect], "tool_choice": choice, "temperature": 0}
    status, whole = servers["tools"].post(PATHS[dialect], request)
    assert status == 500
    status, stream = servers["tools"].post(PATHS[dialect], dialect.ask_stream(request))
    assert status == 200
    assert not dialect.ended_well(stream[-8192:])
    error = json.loads(whole)["error"]
    assert error_in(stream[-8192:]) == error
    with pytest.raises(StreamFailed) as raised:
        assembled(dialect, request, stream).result()
    assert raised.value.error == error


def test_a_message_that_begins_with_half_a_character_has_no_start(servers: dict[str, Llama]) -> None:
    request = {**HI, "model": "demo", "max_tokens": 10, "temperature": 0}
    direct, stream = both(servers["accent"], M, request)
    assert b"message_start" not in stream
    made = assembled(M, request, stream)
    whole, told = json.loads(direct), json.loads(made.result())
    for name in ("type", "role", "content", "model", "stop_reason"):
        assert told[name] == whole[name]
    assert made.usage == of_stream(M, stream) == Usage(0, 10)


@pytest.mark.parametrize(("text", "lost"), [("éééé", "\ufffd"), ("b.b.a", "a")])
def test_a_bound_loses_what_the_stream_held_back(servers: dict[str, Llama], text: str, lost: str) -> None:
    """Half a character, or what could have begun a stop string: no stream of llama-server has it, whoever reads it."""
    request = {"prompt": "x", "max_tokens": 5, "grammar": f'root ::= "{text}" "a"+', "stop": ["ab"]}
    direct, stream = both(servers["plain"], T, request)
    (whole,), (made,) = (json.loads(told)["choices"] for told in (direct, assembled(T, request, stream).result()))
    assert whole["finish_reason"] == "length"
    assert whole == made | {"text": made["text"] + lost}


def test_a_native_stream_keeps_its_end_with_response_fields(servers: dict[str, Llama]) -> None:
    request = {"prompt": "a", "n_predict": 3, "stream": True, "response_fields": ["content"]}
    _, stream = servers["plain"].post(PATHS[N], request)
    assert not N.ended_well(stream[-8192:])
    fields = parse_json_object(json.dumps(request).encode())
    assert not keep_end(N, fields, streamed=True)
    _, stream = servers["plain"].post(PATHS[N], json.loads(msgspec.json.encode(fields)))
    assert N.ended_well(stream[-8192:])
    assert of_stream(N, stream).counts()[:2] == (2, 3)
