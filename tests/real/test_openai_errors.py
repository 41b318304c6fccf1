"""What goes wrong, as openai-python's users see it: typed errors, limits, streams that break."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, running_gateway
from tests.real.openai_kit import HI, connected, connected_async
from tests.real.scrape import Growth

pytestmark = pytest.mark.real

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
