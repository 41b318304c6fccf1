"""openai-python, as its users call it, against a gateway with the real llama-server."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, running_gateway
from tests.real.scrape import Growth

pytestmark = pytest.mark.real

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
LIMIT = 3  # requests a minute of each key in LIMITED
LIMITED = [f"sk-limited{number}-0123456789abcdefghijABCDEFGHIJ" for number in range(4)]
OLD = "sk-old-0123456789abcdefghijABCDEFGHIJ"
WATCHER = "sk-watcher-0123456789abcdefghijABCDEFGHIJ"
STRANGER = "sk-stranger-0123456789abcdefghijABCDEFGHIJ"
KEYS = [f"admin:{ADMIN}:0 scope=admin", f"user:{USER}:0", f"old:{OLD}:0:2024-01-01T00:00:00Z"]
KEYS += [f"watcher:{WATCHER}:0 scope=metrics", f"stranger:{STRANGER}:0 models=qwen-*"]
KEYS += [f"limited{number}:{secret}" for number, secret in enumerate(LIMITED)]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("openai")
    (folder / "api_keys.txt").write_text("\n".join(KEYS) + "\n")
    with running_gateway(folder, MODEL_PATH=str(chat_model), MAX_REQUESTS_PER_MINUTE=str(LIMIT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[OpenAI]:
    with connected(gateway) as opened:
        yield opened


def connected(gateway: Gateway, key: str = USER, max_retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=max_retries)


def connected_async(gateway: Gateway, key: str = USER) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


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


Ask = Callable[[OpenAI], object]


def chatting(**fields: Any) -> Ask:
    asked = {"model": "tiny", "messages": HI, "max_tokens": 4} | fields

    def ask(client: OpenAI) -> object:
        create: Any = client.chat.completions.create
        return create(**asked)

    return ask


NO_KEY = {"Authorization": openai.Omit()}
LONG: list[ChatCompletionMessageParam] = [{"role": "user", "content": "x" * 5000}]
REFUSED: dict[str, tuple[str, type[openai.APIStatusError], int, str, Ask]] = {
    "field of a wrong type": (USER, openai.BadRequestError, 400, "invalid_request", chatting(max_tokens="many")),
    "llama-server refuses": (USER, openai.BadRequestError, 400, "invalid_request", chatting(temperature="hot")),
    "llama-server fails": (USER, openai.BadRequestError, 400, "invalid_request", chatting(messages=[{"content": "x"}])),
    "too long": (USER, openai.BadRequestError, 400, "context_length_exceeded", chatting(messages=LONG)),
    "too long, assembled": (
        USER,
        openai.BadRequestError,
        400,
        "context_length_exceeded",
        chatting(messages=LONG, max_tokens=100),
    ),
    "too long, streamed": (
        USER,
        openai.BadRequestError,
        400,
        "context_length_exceeded",
        chatting(messages=LONG, stream=True),
    ),
    "no key": (USER, openai.AuthenticationError, 401, "missing_api_key", chatting(extra_headers=NO_KEY)),
    "unknown key": (USER + "x", openai.AuthenticationError, 401, "invalid_api_key", chatting()),
    "expired key": (OLD, openai.AuthenticationError, 401, "expired_api_key", chatting()),
    "scope": (WATCHER, openai.PermissionDeniedError, 403, "insufficient_scope", chatting()),
    "model not allowed": (STRANGER, openai.PermissionDeniedError, 403, "model_not_allowed", chatting()),
    "unknown model": (
        USER,
        openai.NotFoundError,
        404,
        "model_not_found",
        lambda client: client.models.retrieve("gpt-4o"),
    ),
    "unknown route": (USER, openai.NotFoundError, 404, "not_found", lambda client: client.files.list()),
    "not supported": (
        USER,
        openai.InternalServerError,
        501,
        "not_supported",
        lambda client: client.embeddings.create(model="tiny", input="x"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_a_typed_error_and_is_not_tried_again(gateway: Gateway, case: str) -> None:
    """With the retries that a user has by default."""
    key, kind, status, code, ask = REFUSED[case]
    growth = Growth(gateway)
    with connected(gateway, key, max_retries=2) as client, pytest.raises(kind) as caught:
        ask(client)
    error = caught.value
    assert type(error) is kind
    assert (error.status_code, error.code) == (status, code)
    assert error.request_id
    assert isinstance(error.body, dict)
    assert error.body.keys() == {"message", "type", "param", "code"}
    assert growth.of("gateway_requests_total", status=str(status)) == 1


async def test_async_refusals(gateway: Gateway) -> None:
    async with connected_async(gateway) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=LONG, stream=True)
        assert caught.value.code == "context_length_exceeded"
    async with connected_async(gateway, "sk-nobody-0123456789abcdefghijABCDEFGHIJ") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


def test_too_many_requests(gateway: Gateway) -> None:
    with connected(gateway, LIMITED[0]) as client:
        ask = client.chat.completions.with_raw_response.create
        for left in reversed(range(LIMIT)):
            headers = ask(model="tiny", messages=HI, max_tokens=1).headers
            assert headers["x-ratelimit-limit-requests"] == str(LIMIT)
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            assert 50 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        with pytest.raises(openai.RateLimitError) as caught:
            ask(model="tiny", messages=HI, max_tokens=1)
        assert client.models.list().data, "only routes that use the model count"
    assert caught.value.code == "rate_limit_exceeded"
    headers = caught.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert 50 < int(headers["retry-after"]) <= 60
    assert 0 <= int(headers["retry-after"]) - int(headers["retry-after-ms"]) / 1000 < 1


def test_a_streaming_request_over_the_limit_is_refused_before_its_stream(gateway: Gateway) -> None:
    with connected(gateway, LIMITED[1]) as client:
        for _ in range(LIMIT):
            with client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, stream=True) as stream:
                list(stream)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, stream=True)


def test_what_a_model_refuses_counts_and_what_never_reached_it_does_not(gateway: Gateway) -> None:
    with connected(gateway, LIMITED[2]) as client:
        for _ in range(5):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="tiny", messages=HI, n=0)
        for _ in range(LIMIT):
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="tiny", messages=LONG)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=HI)


def test_the_sdk_waits_as_long_as_it_is_told(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    growth = Growth(gateway)
    with connected(gateway, LIMITED[3], max_retries=2) as client:
        for _ in range(LIMIT):
            client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="tiny", messages=HI, max_tokens=1)
    assert len(slept) == 2
    assert all(50 < seconds <= 60 for seconds in slept), slept
    assert slept[1] <= slept[0]
    assert growth.of("gateway_requests_total", status="429") == 3
    assert growth.of("gateway_rate_limited_total", reason="rate_limit_exceeded") == 3


# --- streams that pause and break: a stand-in for llama-server plays them


@pytest.fixture(scope="module")
def moody(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("moody")
    fake = str(FAKE_LLAMA)
    with running_gateway(
        folder, MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=fake, SSE_PING_SECONDS="1", PARALLEL="8"
    ) as running:
        yield running


def told(gateway: Gateway, commands: str) -> list[str]:
    """The pieces of a streamed answer that the SDK hands on, until it ends or raises."""
    prompt: list[ChatCompletionMessageParam] = [{"role": "user", "content": "{{fake: " + commands + "}}"}]
    pieces: list[str] = []
    with connected(gateway) as client:
        stream = client.chat.completions.create(model="tiny", messages=prompt, max_tokens=8, stream=True)
        with stream, contextlib.suppress(openai.APIError):
            for chunk in stream:
                pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            return [*pieces, "the end"]
    return [*pieces, "an error"]


def test_the_sdk_does_not_mind_pings(moody: Gateway) -> None:
    commands = "prefill=1.5 tokens=3"
    with ThreadPoolExecutor(2) as pool:
        raw = pool.submit(lambda: moody.chat("{{fake: " + commands + "}}", stream=True))
        *pieces, last = pool.submit(lambda: told(moody, commands)).result()
        assert raw.result().body.startswith(b": ping\n\n")
    assert (len(pieces), last) == (3, "the end")


@pytest.mark.parametrize("end", ["error", "cut", "die", "end"])
def test_a_stream_that_breaks_raises_in_the_sdk(moody: Gateway, end: str) -> None:
    *pieces, last = told(moody, f"{end}=3 tokens=6 interval=0.05")
    assert last == "an error"
    assert 0 < len(pieces) <= 3


def test_an_error_behind_a_ping_raises_in_the_sdk(moody: Gateway) -> None:
    assert told(moody, "prefill=1.5 error=0") == ["an error"]


# --- embeddings


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, embedding_model: Path) -> Iterator[Gateway]:
    with running_gateway(tmp_path_factory.mktemp("embedder"), MODEL_PATH=str(embedding_model)) as running:
        yield running


def test_embeddings(embedder: Gateway) -> None:
    texts = ["sun", "a bell rings"]
    growth = Growth(embedder)
    with connected(embedder) as client:
        floats = client.embeddings.create(model="embed", input=texts, encoding_format="float")
        packed = client.embeddings.create(model="embed", input=texts)  # base64 on the wire
    assert [item.index for item in floats.data] == [0, 1]
    for one, other in zip(floats.data, packed.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(value * value for value in one.embedding) == pytest.approx(1, abs=1e-3)
    assert floats.data[0].embedding != pytest.approx(floats.data[1].embedding, abs=1e-2)
    tokens = [
        embedder.request("POST", "/tokenize", {"content": text}).json()["tokens"] for text in ("sun", "a bell rings")
    ]
    with_bos = sum(len(each) + 1 for each in tokens)
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == with_bos
    assert growth.of("gateway_tokens_total", direction="in", model="embed") == 2 * with_bos
    assert growth.of("gateway_tokens_total", direction="out") == 0


async def test_async_embeddings(embedder: Gateway) -> None:
    async with connected_async(embedder) as client:
        texts = [f"text {number}" for number in range(12)]
        alone = [(await client.embeddings.create(model="embed", input=text)).data[0].embedding for text in texts]
        together = await asyncio.gather(*(client.embeddings.create(model="embed", input=text) for text in texts))
    for vector, answer in zip(alone, together, strict=True):
        assert answer.data[0].embedding == pytest.approx(vector, abs=1e-5)
    for one, other in itertools.pairwise(alone):
        assert one != pytest.approx(other, abs=1e-5)


def test_a_text_may_be_as_long_as_the_context(embedder: Gateway) -> None:
    """llama-server by itself refuses more than 512 tokens."""
    with connected(embedder) as client:
        answer = client.embeddings.create(model="embed", input="x" * 4000)
        assert answer.usage.prompt_tokens == 4001
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="embed", input=[])


def test_a_longer_text_is_refused(embedder: Gateway) -> None:
    with connected(embedder) as client, pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="embed", input="x" * 6000)
    assert caught.value.code == "context_length_exceeded"


def test_many_texts_are_counted(embedder: Gateway) -> None:
    """Of a large answer only the head and the tail are kept."""
    growth = Growth(embedder)
    with connected(embedder) as client:
        answer = client.embeddings.create(model="embed", input=["some text"] * 60, encoding_format="float")
    assert len(answer.data) == 60
    assert answer.usage.prompt_tokens == growth.of("gateway_tokens_total", direction="in", model="embed") > 60
