"""In every dialect: a streamed answer and a whole one say the same, and their tokens are counted rightly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.pipeline.forward import LONG_ANSWER_TOKENS
from tests.house import Gateway, Response, running_gateway
from tests.real.scrape import Growth

pytestmark = pytest.mark.real

SHORT, LONG = LONG_ANSWER_TOKENS // 2, LONG_ANSWER_TOKENS * 2  # passed through; assembled from a stream
TEXT = "Tell me of the sea"
CHAT = {"messages": [{"role": "user", "content": TEXT}]}


@dataclass(frozen=True)
class Way:
    """One route: how it is asked, and where text and usage stand in its answers."""

    path: str
    asked: dict[str, Any]
    bound: str  # the field that bounds the answer
    text: tuple[str | int, ...]
    usage: tuple[str | int, ...]
    prompt: str  # the field beside `usage` with the prompt's tokens, and the one with the answer's
    completion: str


WAYS = {
    "chat": Way(
        "/v1/chat/completions",
        CHAT,
        "max_tokens",
        ("choices", 0, "message", "content"),
        ("usage",),
        "prompt_tokens",
        "completion_tokens",
    ),
    "completions": Way(
        "/v1/completions",
        {"prompt": TEXT},
        "max_tokens",
        ("choices", 0, "text"),
        ("usage",),
        "prompt_tokens",
        "completion_tokens",
    ),
    "native": Way(
        "/completion", {"prompt": TEXT}, "n_predict", ("content",), (), "tokens_evaluated", "tokens_predicted"
    ),
    "responses": Way(
        "/v1/responses",
        {"input": TEXT},
        "max_output_tokens",
        ("output", -1, "content", 0, "text"),
        ("usage",),
        "input_tokens",
        "output_tokens",
    ),
    "messages": Way(
        "/v1/messages", CHAT, "max_tokens", ("content", 0, "text"), ("usage",), "input_tokens", "output_tokens"
    ),
}
EACH = [pytest.param(way, length, id=f"{name}-{length}") for name, way in WAYS.items() for length in (SHORT, LONG)]


def ask(gateway: Gateway, way: Way, length: int, **more: Any) -> Response:
    reply = gateway.request("POST", way.path, {**way.asked, way.bound: length, "temperature": 0, **more})
    assert reply.status == 200, reply.body
    return reply


def found(answer: Any, at: tuple[str | int, ...]) -> Any:
    for step in at:
        answer = answer[step]
    return answer


def events(reply: Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.body.decode().split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def told(way: Way, stream: list[dict[str, Any]]) -> str:
    """The text of a stream."""
    parts: list[str | None] = []
    for event in stream:
        if way is WAYS["chat"]:
            parts += [choice["delta"].get("content") for choice in event["choices"]]
        elif way is WAYS["completions"]:
            parts += [choice["text"] for choice in event["choices"]]
        elif way is WAYS["native"]:
            parts.append(event["content"])
        elif way is WAYS["responses"]:
            parts += [event["delta"]] if event["type"] == "response.output_text.delta" else []
        else:
            parts += [event["delta"]["text"]] if event["type"] == "content_block_delta" else []
    return "".join(part for part in parts if part)


def prompt_tokens(gateway: Gateway, way: Way) -> int:
    """By llama-server's own tokenizer."""
    text = TEXT
    if way.path in ("/v1/chat/completions", "/v1/responses", "/v1/messages"):
        text = gateway.request("POST", "/apply-template", CHAT).json()["prompt"]
    asked = {"content": text, "add_special": True, "parse_special": True}
    return len(gateway.request("POST", "/tokenize", asked).json()["tokens"])


@pytest.mark.parametrize(("way", "length"), EACH)
def test_streamed_and_whole_say_the_same(gateway: Gateway, way: Way, length: int) -> None:
    whole = found(ask(gateway, way, length).json(), way.text)
    assert isinstance(whole, str)
    assert len(whole.split()) > length // 2
    assert told(way, events(ask(gateway, way, length, stream=True))) == whole


@pytest.mark.parametrize(("way", "length"), EACH)
def test_usage_of_a_whole_answer(gateway: Gateway, way: Way, length: int) -> None:
    expected = prompt_tokens(gateway, way)
    growth = Growth(gateway)
    usage = found(ask(gateway, way, length).json(), way.usage)
    cached = usage.get("cache_read_input_tokens", 0)  # Anthropic's input_tokens leaves these out
    assert usage[way.prompt] + cached == expected
    assert usage[way.completion] == length
    assert growth.of("gateway_tokens_total", model="tiny", direction="in") == expected
    assert growth.of("gateway_tokens_total", model="tiny", direction="out") == length


@pytest.mark.parametrize(("way", "length"), EACH)
def test_tokens_of_a_stream_are_counted(gateway: Gateway, way: Way, length: int) -> None:
    expected = prompt_tokens(gateway, way)
    growth = Growth(gateway)
    ask(gateway, way, length, stream=True)
    assert growth.of("gateway_tokens_total", model="tiny", direction="in") == expected
    assert growth.of("gateway_tokens_total", model="tiny", direction="out") == length
    assert growth.of("gateway_time_to_first_token_seconds_count", model="tiny") == 1
    assert growth.of("gateway_time_per_output_token_seconds_count", model="tiny") == 1


def test_what_the_prompt_cache_held_is_counted_as_such(gateway: Gateway) -> None:
    way = WAYS["completions"]
    asked = {**way.asked, "prompt": "An owl sits by the mill and waits for the moon"}
    for _ in range(5):  # at most as many as there are slots, until one of them knows the prompt
        growth = Growth(gateway)
        answer = gateway.request("POST", way.path, {**asked, "max_tokens": 4}).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert growth.of("gateway_tokens_total", model="tiny", direction="cached") == cached
        if cached:
            break
    assert cached


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_a_chat_stream_tells_usage_only_where_that_was_asked_for(gateway: Gateway, path: str, asked: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if asked else {}
    reply = gateway.request("POST", path, CHAT | {"max_tokens": SHORT, "stream": True, "temperature": 0} | options)
    told = [event["usage"] for event in events(reply) if event.get("usage")]
    assert reply.body.endswith(b"data: [DONE]\n\n")
    if asked:
        assert [usage["completion_tokens"] for usage in told] == [SHORT]
        assert [usage["prompt_tokens"] for usage in told] == [prompt_tokens(gateway, WAYS["chat"])]
    else:
        assert not told


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_tokens_of_several_answers_are_summed(gateway: Gateway, length: int, stream: bool) -> None:
    asked = CHAT | {"max_tokens": length, "n": 3, "stream": stream}
    growth = Growth(gateway)
    assert gateway.request("POST", "/v1/chat/completions", asked).status == 200
    assert growth.of("gateway_tokens_total", model="tiny", direction="out") == 3 * length


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/completion"])
def test_tokens_of_several_prompts_are_summed(gateway: Gateway, path: str, stream: bool) -> None:
    asked = {"prompt": ["a river", "a bell", "an owl"], "max_tokens": SHORT, "stream": stream}
    growth = Growth(gateway)
    assert gateway.request("POST", path, asked).status == 200
    assert growth.of("gateway_tokens_total", model="tiny", direction="out") == 3 * SHORT


def test_what_generates_nothing_counts_no_tokens(gateway: Gateway) -> None:
    growth = Growth(gateway)
    assert gateway.request("POST", "/tokenize", {"content": TEXT}).status == 200
    assert gateway.request("POST", "/v1/messages/count_tokens", CHAT).json() == {
        "input_tokens": prompt_tokens(gateway, WAYS["chat"])
    }
    assert growth.of("gateway_tokens_total") == 0
    assert growth.of("gateway_requests_total", path="/tokenize") == 2


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    limits: dict[str, Any] = {"MAX_TOKENS_DEFAULT": "20", "MAX_TOKENS_LIMIT": "50"}
    with running_gateway(tmp_path_factory.mktemp("bounded"), MODEL_PATH=str(chat_model), **limits) as running:
        yield running


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", [pytest.param(way, id=name) for name, way in WAYS.items()])
def test_an_answer_ends_at_the_bound(bounded: Gateway, way: Way, stream: bool) -> None:
    for asked, expected in (({}, 20), ({way.bound: 3}, 3), ({way.bound: 1000}, 50), ({"n_predict": 1000}, 50)):
        growth = Growth(bounded)
        assert bounded.request("POST", way.path, {**way.asked, **asked, "stream": stream}).status == 200
        assert growth.of("gateway_tokens_total", direction="out") == expected, asked


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("length", [SHORT, LONG])
def test_stop_words_hold(gateway: Gateway, length: int, stream: bool) -> None:
    way = WAYS["completions"]
    words = found(ask(gateway, way, length).json(), way.text).split()
    stop = next(word for word in words[4:] if word not in words[:4])
    reply = ask(gateway, way, length, stop=[stop], stream=stream)
    text = told(way, events(reply)) if stream else found(reply.json(), way.text)
    assert stop not in text
    assert text.split() == words[: words.index(stop)]
