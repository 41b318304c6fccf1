"""openai-python's chat and completions, as its users call them, against a gateway with the real llama-server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.house import Gateway
from tests.real.openai_kit import HI, connected, connected_async
from tests.real.scrape import Growth

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with connected(gateway) as opened:
        yield opened


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=8)
    assert answer.object == "chat.completion"
    assert answer.model == "tiny"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


@pytest.mark.parametrize("length", [8, 80])
def test_a_streamed_chat_is_the_whole_one(client: OpenAI, length: int) -> None:
    whole = client.chat.completions.create(model="tiny", messages=HI, max_tokens=length, temperature=0)
    with client.chat.completions.create(
        model="tiny",
        messages=HI,
        max_tokens=length,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.choices[0].message.content
    assert whole.usage
    assert chunks[-1].usage
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == length
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_usage_comes_only_where_it_was_asked_for(client: OpenAI) -> None:
    with client.chat.completions.create(model="tiny", messages=HI, max_tokens=4, stream=True) as stream:
        assert not [chunk for chunk in stream if chunk.usage or not chunk.choices]


@pytest.mark.parametrize("length", [8, 80])
def test_several_answers_at_once(gateway: Gateway, client: OpenAI, length: int) -> None:
    growth = Growth(gateway)
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=length, n=2, temperature=1)
    first, second = (choice.message.content for choice in answer.choices)
    assert first
    assert second
    assert first != second
    assert growth.of("gateway_tokens_total", direction="out", model="tiny") == 2 * length


@pytest.mark.parametrize("length", [30, 200])
def test_json(client: OpenAI, length: int) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=length, response_format={"type": "json_object"}, seed=3
    )
    assert answer.choices[0].finish_reason == "stop", answer
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("length", [8, 80])
def test_completions(client: OpenAI, length: int) -> None:
    whole = client.completions.create(model="tiny", prompt="Once upon", max_tokens=length, temperature=0)
    with client.completions.create(
        model="tiny", prompt="Once upon", max_tokens=length, temperature=0, stream=True
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text != ""
    assert whole.usage
    assert whole.usage.completion_tokens == length


async def test_many_at_once_are_not_mixed_up(gateway: Gateway) -> None:
    """More than there are slots, whole and streamed ones, each with a prompt of its own."""
    async with connected_async(gateway) as client:

        async def whole(text: str, length: int) -> str:
            answer = await client.completions.create(model="tiny", prompt=text, max_tokens=length, temperature=0)
            return answer.choices[0].text

        async def streamed(text: str, length: int) -> str:
            stream = await client.completions.create(
                model="tiny", prompt=text, max_tokens=length, temperature=0, stream=True
            )
            async with stream:
                return "".join([chunk.choices[0].text async for chunk in stream])

        asked = [
            (f"{word} {word} {word}", length) for word in ("sun", "moon", "river", "owl", "bell") for length in (12, 50)
        ]
        alone = [await whole(*each) for each in asked]
        together = await asyncio.gather(*(way(*each) for way in (whole, streamed) for each in asked))
    assert len(set(alone)) == len(asked)
    assert together == alone + alone


async def test_async_chat(gateway: Gateway) -> None:
    async with connected_async(gateway) as client:
        whole = await client.chat.completions.create(model="tiny", messages=HI, max_tokens=40, temperature=0)
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, max_tokens=40, temperature=0, stream=True
        )
        async with stream:
            told = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert told == whole.choices[0].message.content != ""


def test_models(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.object) for model in listed] == [("tiny", "model")]
    assert client.models.retrieve("tiny") == listed[0]


def test_any_name_means_the_one_model(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=HI, max_tokens=2)
    assert answer.model == "tiny"


def test_headers_of_an_answer(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HI, max_tokens=2, extra_headers={"x-request-id": "my-own-7"}
    )
    assert raw.headers["x-request-id"] == raw.request_id == "my-own-7"
    assert int(raw.headers["x-queue-time-ms"]) >= 0
    assert int(raw.headers["openai-processing-ms"]) >= 0
    assert raw.parse().choices
