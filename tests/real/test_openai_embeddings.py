"""openai-python's embeddings against a gateway with the real llama-server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.house import Gateway, running_gateway
from tests.real.openai_kit import connected, connected_async
from tests.real.scrape import Growth

pytestmark = pytest.mark.real


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
