"""anthropic-python, as its users call it, against a gateway with the real llama-server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest.mock import ANY

import anthropic
import pydantic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import MessageParam

from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, running_gateway
from tests.real.scrape import Growth
from tests.real.templates import THINKING_TEMPLATE, TOOLS_TEMPLATE
from tests.real.wire import request, wire

pytestmark = pytest.mark.real

HI: list[MessageParam] = [{"role": "user", "content": "hi"}]
LONG: list[MessageParam] = [{"role": "user", "content": "x" * 5000}]
COLD: Any = {"extra_body": {"temperature": 0}}
OLD = "sk-old-0123456789abcdefghijABCDEFGHIJ"
WATCHER = "sk-watcher-0123456789abcdefghijABCDEFGHIJ"
LIMITED = "sk-limited-0123456789abcdefghijABCDEFGHIJ"
KEYS = [f"admin:{ADMIN}:0 scope=admin", f"user:{USER}:0", f"old:{OLD}:0:2024-01-01T00:00:00Z"]
KEYS += [f"watcher:{WATCHER}:0 scope=metrics", f"limited:{LIMITED}:1"]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("anthropic")
    (folder / "api_keys.txt").write_text("\n".join(KEYS) + "\n")
    with running_gateway(folder, MODEL_PATH=str(chat_model), MAX_REQUEST_BODY_SIZE="100000") as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[Anthropic]:
    with connected(gateway) as opened:
        yield opened


def connected(gateway: Gateway, key: str = USER, max_retries: int = 0) -> Anthropic:
    return Anthropic(base_url=gateway.url, api_key=key, max_retries=max_retries)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


@pytest.mark.parametrize("length", [8, 80])
def test_a_message_and_its_stream(client: Anthropic, length: int) -> None:
    whole = client.messages.create(model="tiny", max_tokens=length, messages=HI, **COLD)
    assert (whole.type, whole.role, whole.model, whole.stop_reason) == ("message", "assistant", "tiny", "max_tokens")
    assert whole._request_id
    with client.messages.stream(model="tiny", max_tokens=length, messages=HI, **COLD) as stream:
        told = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert told == text_of(final) == text_of(whole) != ""
    assert final.usage.output_tokens == whole.usage.output_tokens == length
    prompts = [one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (whole, final)]
    assert prompts[0] == prompts[1] == client.messages.count_tokens(model="tiny", messages=HI).input_tokens


def test_the_events_of_a_stream(client: Anthropic) -> None:
    events = client.messages.create(model="tiny", max_tokens=2, messages=HI, stream=True)
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_system_prompts_and_turns(client: Anthropic) -> None:
    def count(messages: list[MessageParam] = HI, **more: Any) -> int:
        return client.messages.count_tokens(model="tiny", messages=messages, **more).input_tokens

    blocks: Any = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
    assert count(system="be brief") == count(system=blocks) > count()
    turns: list[MessageParam] = [*HI, {"role": "assistant", "content": "ho"}, *HI]
    assert count(turns) > count()
    answer = client.messages.create(model="tiny", max_tokens=4, messages=turns, system="be brief")
    assert text_of(answer)


def test_stop_sequences(client: Anthropic) -> None:
    whole = text_of(client.messages.create(model="tiny", max_tokens=40, messages=HI, **COLD))
    word = " " + whole.split()[3]
    answer = client.messages.create(model="tiny", max_tokens=40, messages=HI, stop_sequences=[word], **COLD)
    assert answer.stop_sequence == word
    assert whole.startswith(text_of(answer))
    assert word not in text_of(answer)


def test_what_llama_server_does_not_know_is_no_error(client: Anthropic) -> None:
    answer = client.messages.create(
        model="claude-sonnet-4", max_tokens=4, messages=HI, metadata={"user_id": "x"}, thinking={"type": "disabled"}
    )
    assert answer.model == "tiny"
    assert text_of(answer)


async def test_many_at_once(gateway: Gateway) -> None:
    async with AsyncAnthropic(base_url=gateway.url, api_key=USER, max_retries=0) as client:

        async def whole(text: str) -> str:
            asked: list[MessageParam] = [{"role": "user", "content": text}]
            return text_of(await client.messages.create(model="tiny", max_tokens=40, messages=asked, **COLD))

        async def streamed(text: str) -> str:
            asked: list[MessageParam] = [{"role": "user", "content": text}]
            async with client.messages.stream(model="tiny", max_tokens=40, messages=asked, **COLD) as stream:
                return "".join([piece async for piece in stream.text_stream])

        words = ["sun", "moon", "river", "owl", "bell", "harbour"]
        alone = [await whole(word) for word in words]
        together = await asyncio.gather(*(way(word) for way in (whole, streamed) for word in words))
    assert together == alone + alone
    assert len(set(alone)) > 1


# --- errors


Ask = Callable[[Anthropic], object]


def asking(**fields: Any) -> Ask:
    asked = {"model": "tiny", "messages": HI, "max_tokens": 4} | fields

    def ask(client: Anthropic) -> object:
        create: Any = client.messages.create
        return create(**asked)

    return ask


def counting(client: Anthropic) -> object:
    return client.messages.count_tokens(model="tiny", messages=[])


BAD, AUTH = anthropic.BadRequestError, anthropic.AuthenticationError
REFUSED: dict[str, tuple[str, type[anthropic.APIStatusError], int, str, Ask]] = {
    "no messages": (USER, BAD, 400, "invalid_request_error", asking(messages=[])),
    "no messages to count": (USER, BAD, 400, "invalid_request_error", counting),
    "field of a wrong type": (USER, BAD, 400, "invalid_request_error", asking(extra_body={"temperature": "hot"})),
    "no schema": (USER, BAD, 400, "invalid_request_error", asking(output_config={"format": {"type": "json_schema"}})),
    "too long": (USER, BAD, 400, "invalid_request_error", asking(messages=LONG)),
    "too long, streamed": (USER, BAD, 400, "invalid_request_error", asking(messages=LONG, stream=True)),
    "unknown key": (USER + "x", AUTH, 401, "authentication_error", asking()),
    "expired key": (OLD, AUTH, 401, "authentication_error", asking()),
    "scope": (WATCHER, anthropic.PermissionDeniedError, 403, "permission_error", asking()),
    "no such route": (
        USER,
        anthropic.NotFoundError,
        404,
        "not_found_error",
        lambda client: client.messages.batches.retrieve("b"),
    ),
    "too large": (
        USER,
        anthropic.RequestTooLargeError,
        413,
        "request_too_large",
        asking(messages=[{"role": "user", "content": "x" * 100_001}]),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_typed_error_and_is_not_tried_again(gateway: Gateway, case: str) -> None:
    key, kind, status, told, ask = REFUSED[case]
    growth = Growth(gateway)
    with connected(gateway, key, max_retries=2) as client, pytest.raises(kind) as caught:
        ask(client)
    error = caught.value
    assert (type(error), error.status_code) == (kind, status)
    assert isinstance(error.body, dict)
    assert error.body["error"].keys() == {"type", "message"}
    assert (error.body["type"], error.body["error"]["type"]) == ("error", told)
    assert error.request_id == error.body["request_id"] == error.response.headers["x-request-id"]
    assert growth.of("gateway_requests_total", status=str(status)) == 1


def test_too_many_requests(gateway: Gateway) -> None:
    with connected(gateway, LIMITED) as client:
        client.messages.create(model="tiny", messages=HI, max_tokens=1)
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.create(model="tiny", messages=HI, max_tokens=1)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "rate_limit_error"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 60


# --- tools and thinking: templates that know them


TOOL: Any = {
    "name": "weather",
    "description": "w",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["ab", "cd"]}, "now": {"type": "boolean"}},
        "required": ["city", "now"],
    },
}
THOUGHT = 'root ::= "ab cd</think>\\n\\nHe said " ("hi " | "ho ") "you"'


@pytest.fixture(scope="module")
def minded(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Anthropic]:
    """Two models: `handy` calls tools, `wise` thinks before it answers."""
    folder = tmp_path_factory.mktemp("minded")
    models: dict[str, Any] = {}
    for name, template in (("handy", TOOLS_TEMPLATE), ("wise", THINKING_TEMPLATE)):
        (folder / f"{name}.jinja").write_text(template)
        models[name] = {"model_path": str(chat_model), "chat_template_file": str(folder / f"{name}.jinja")}
    models["wise"]["flags"] = ["--grammar", THOUGHT, "--ctx-size", "2048"]
    models["handy"]["flags"] = ["--ctx-size", "2048"]
    (folder / "config.json").write_text(json.dumps({"models": models}))
    with running_gateway(folder, CONFIG_PATH=str(folder / "config.json")) as gateway, connected(gateway) as opened:
        yield opened


def test_a_tool_is_called(minded: Anthropic) -> None:
    begun: list[MessageParam] = [*HI, {"role": "assistant", "content": "<tool_call>\n"}]
    asked: Any = {"model": "handy", "messages": begun, "tools": [TOOL], "tool_choice": {"type": "any"}}
    answer = minded.messages.create(**asked, max_tokens=150)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert call.name == "weather"
    assert isinstance(call.input, dict)
    assert call.input.keys() == {"city", "now"}
    with minded.messages.stream(**asked, max_tokens=150) as stream:
        streamed = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert streamed.name == "weather"
    assert isinstance(streamed.input, dict)
    assert streamed.input.keys() == {"city", "now"}


def test_a_tool_s_result_goes_back(minded: Anthropic) -> None:
    use: Any = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "ab", "now": True}}
    result: Any = {"type": "tool_result", "tool_use_id": "t1", "content": "rain"}
    turns: list[MessageParam] = [*HI, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    answer = minded.messages.create(model="handy", messages=turns, tools=[TOOL], max_tokens=4)
    assert text_of(answer)
    counted = minded.messages.count_tokens(model="handy", messages=turns, tools=[TOOL])
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


def test_thoughts_are_told_apart(minded: Anthropic) -> None:
    whole = minded.messages.create(model="wise", max_tokens=60, messages=HI, **COLD)
    with minded.messages.stream(model="wise", max_tokens=60, messages=HI, **COLD) as stream:
        final = stream.get_final_message()
    blocks: Any
    for blocks in (whole.content, final.content):
        thought, text = blocks
        assert thought.type == "thinking"
        assert thought.thinking == "ab cd"
        assert text.type == "text"
        assert text.text.startswith("He said h")


# --- an answer in a schema's form


class Weather(pydantic.BaseModel):
    city: Literal["ab", "cd"]
    warm: bool


WEATHER: Any = {"type": "json_schema", "schema": anthropic.transform_schema(Weather)}


def test_a_structured_answer(client: Anthropic) -> None:
    asked: Any = {"model": "tiny", "max_tokens": 100, "messages": HI}
    ways: list[Any] = [{"output_config": {"format": WEATHER}}, {"extra_body": {"output_format": WEATHER}}]
    for way in ways:
        answer = client.messages.create(**asked, **way)
        Weather.model_validate_json(text_of(answer))
        assert answer.stop_reason == "end_turn"
    parsed = client.messages.parse(**asked, output_format=Weather)
    assert isinstance(parsed.parsed_output, Weather)
    with client.messages.stream(**asked, output_format=Weather) as stream:
        told = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert isinstance(final.parsed_output, Weather)
    assert final.parsed_output == Weather.model_validate_json(told)
    assert final.usage.output_tokens > 5


def test_a_structured_answer_behind_thoughts(minded: Anthropic) -> None:
    asked: Any = {"model": "wise", "max_tokens": 100, "messages": HI}
    asked |= {"thinking": {"type": "enabled", "budget_tokens": 5}}
    assert isinstance(minded.messages.parse(**asked, output_format=Weather).parsed_output, Weather)
    with minded.messages.stream(**asked, output_format=Weather) as stream:
        assert isinstance(stream.get_final_message().parsed_output, Weather)


# --- what breaks: a stand-in for llama-server plays it


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with running_gateway(
        tmp_path_factory.mktemp("moody"),
        MODEL_PATH=str(chat_model),
        LLAMA_SERVER_PATH=str(FAKE_LLAMA),
        PARALLEL="1",
        MAX_QUEUE_SIZE="1",
    ) as running:
        yield running


def test_a_backend_that_fails_is_an_api_error(moody: Gateway) -> None:
    with connected(moody) as client, pytest.raises(anthropic.InternalServerError) as caught:
        client.messages.create(model="tiny", max_tokens=4, messages=[{"role": "user", "content": "{{fake: garbage}}"}])
    assert caught.value.status_code == 502
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "api_error"


def test_no_time_to_wait_is_an_overload(moody: Gateway) -> None:
    busy = {"messages": [{"role": "user", "content": "{{fake: tokens=5000 interval=0.05}}"}], "max_tokens": 5000}
    with wire(moody) as other, connected(moody) as client:
        other.send(request("POST", "/v1/chat/completions", busy | {"stream": True}))
        other.first_bytes()
        with pytest.raises(anthropic.InternalServerError) as caught:
            client.messages.create(model="tiny", max_tokens=4, messages=HI, extra_headers={"X-Request-Timeout": "0.3"})
    assert caught.value.status_code == 503
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_a_stream_that_breaks_is_a_typed_error(tmp_path: Path, slow_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model)) as breaking, connected(breaking) as client:
        stream = client.messages.create(model="slow", max_tokens=3000, messages=HI, stream=True)
        with stream, pytest.raises(anthropic.APIStatusError) as caught:
            for number, event in enumerate(stream):
                assert event.type != "message_stop"
                if number == 5:
                    os.kill(breaking.model()["pid"], signal.SIGKILL)
    assert caught.value.body == {"type": "error", "error": {"type": "api_error", "message": ANY}}
