"""openai-python's clients, set to a gateway."""

from __future__ import annotations

from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.house import USER, Gateway

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]


def connected(gateway: Gateway, key: str = USER, max_retries: int = 0) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=max_retries)


def connected_async(gateway: Gateway, key: str = USER) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)
