"""openai-python's responses, as its users call them, against a gateway with the real llama-server."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai import OpenAI

from tests.house import Gateway, running_gateway
from tests.real.openai_kit import connected
from tests.real.templates import TOOLS_TEMPLATE

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with connected(gateway) as opened:
        yield opened


@pytest.mark.parametrize("length", [8, 80])
def test_responses(client: OpenAI, length: int) -> None:
    whole = client.responses.create(model="tiny", input="hi", max_output_tokens=length, temperature=0)
    with client.responses.create(
        model="tiny", input="hi", max_output_tokens=length, temperature=0, stream=True
    ) as stream:
        events = list(stream)
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert told == whole.output_text != ""
    assert whole.usage
    assert whole.usage.output_tokens == length
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.usage
    assert last.response.usage.output_tokens == length


def test_the_sdk_s_own_stream(client: OpenAI) -> None:
    with client.responses.stream(model="tiny", input="hi", max_output_tokens=8, temperature=0) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == final.output_text
    assert "".join(event.delta for event in deltas) == final.output_text != ""
    whole = client.responses.create(model="tiny", input="hi", max_output_tokens=8, temperature=0)
    assert final.output_text == whole.output_text


def test_instructions_and_turns(client: OpenAI) -> None:
    bare = client.responses.create(model="tiny", input="hi", max_output_tokens=1)
    told = client.responses.create(model="tiny", input="hi", instructions="be brief", max_output_tokens=1)
    turns: Any = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": [{"type": "input_text", "text": "and?"}]},
    ]
    talk = client.responses.create(model="tiny", input=turns, max_output_tokens=1)
    assert bare.usage
    assert told.usage
    assert talk.usage
    assert bare.usage.input_tokens < told.usage.input_tokens < talk.usage.input_tokens


class Verdict(pydantic.BaseModel):
    good: bool


@pytest.mark.parametrize("length", [30, 80])
def test_an_answer_is_held_to_its_format(client: OpenAI, length: int) -> None:
    answer = client.responses.parse(model="tiny", input="hi", text_format=Verdict, max_output_tokens=length)
    assert isinstance(answer.output_parsed, Verdict)
    with client.responses.stream(model="tiny", input="hi", text_format=Verdict, max_output_tokens=length) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Verdict)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"input": []}, "invalid_request"),
        ({"input": "x" * 5000}, "context_length_exceeded"),
        ({"input": "x" * 5000, "stream": True}, "context_length_exceeded"),
        ({"input": "hi", "previous_response_id": "resp_1"}, "invalid_request"),
        ({"input": "hi", "max_output_tokens": -1}, "invalid_request"),
    ],
)
def test_refusals(client: OpenAI, body: dict[str, Any], code: str) -> None:
    create: Any = client.responses.create
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tiny", **body)
    assert caught.value.code == code


# --- tools: a model whose template knows them, and a prompt that has begun to call one


TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "w",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["ab", "cd"]}, "now": {"type": "boolean"}},
        "required": ["city", "now"],
    },
}
BEGUN: Any = [
    {"role": "user", "content": "hi"},
    {
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "id": "m",
        "content": [{"type": "output_text", "text": "<tool_call>\n"}],
    },
]


@pytest.fixture(scope="module")
def handy(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[OpenAI]:
    folder = tmp_path_factory.mktemp("handy")
    (folder / "tools.jinja").write_text(TOOLS_TEMPLATE)
    models = {"tiny": {"model_path": str(chat_model), "chat_template_file": str(folder / "tools.jinja")}}
    (folder / "config.json").write_text(json.dumps({"models": models}))
    with running_gateway(folder, CONFIG_PATH=str(folder / "config.json")) as gateway, connected(gateway) as opened:
        yield opened


def test_a_tool_is_called(handy: OpenAI) -> None:
    asked: Any = {"model": "tiny", "input": BEGUN, "tools": [TOOL], "tool_choice": "required"}
    answer = handy.responses.create(**asked, max_output_tokens=150)
    call = next(item for item in answer.output if item.type == "function_call")
    assert call.name == "weather"
    assert json.loads(call.arguments).keys() == {"city", "now"}
    with handy.responses.stream(**asked, max_output_tokens=150) as stream:
        events = list(stream)
        final = stream.get_final_response()
    streamed = next(item for item in final.output if item.type == "function_call")
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    pieces = [event.delta for event in deltas if event.item_id == streamed.id]
    assert "".join(pieces) == streamed.arguments
    assert json.loads(streamed.arguments).keys() == {"city", "now"}


def test_a_talk_goes_on_from_the_sdk_s_own_objects(client: OpenAI) -> None:
    talk: list[Any] = [{"role": "user", "content": "hi"}]
    for _ in range(2):
        answer = client.responses.create(model="tiny", input=talk, max_output_tokens=4)
        talk += [*answer.output, {"role": "user", "content": "and?"}]
    assert answer.output_text


def test_a_tool_s_result_goes_back(handy: OpenAI) -> None:
    turns: Any = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city":"ab","now":true}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]
    answer = handy.responses.create(model="tiny", input=turns, tools=[TOOL], max_output_tokens=4)
    assert answer.output_text


def test_a_stream_that_breaks_says_so(tmp_path: Path, slow_model: Path) -> None:
    """An error event with the next number, then a cut."""
    events: list[Any] = []
    with running_gateway(tmp_path, MODEL_PATH=str(slow_model)) as breaking, connected(breaking) as client:
        stream = client.responses.create(model="slow", input="hi", max_output_tokens=3000, stream=True)
        with stream, pytest.raises((openai.APIError, httpx.HTTPError)):
            for event in stream:
                events.append(event)
                if len(events) == 8:
                    os.kill(breaking.model()["pid"], signal.SIGKILL)
            raise AssertionError("a clean end")
    last = events[-1]
    assert (last.type, last.code, last.sequence_number) == ("error", "backend_error", len(events) - 1)
