"""The semantic cache with an embedding model of real weights, and the table that its default threshold comes from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.stores.cache.vectors import DEFAULT_SIMILARITY
from gateway.stores.cache.wording import gist
from tests.cache_kit import OTHER, how, stats, write_keys
from tests.house import ADMIN, ROOT, Gateway, Response, eventually, running_gateway
from tests.minilm import make_minilm
from tests.real.herd import states
from tests.real.llama import running_llama
from tests.wording_pairs import NEAR_MISSES, PARAPHRASES, UNSEEN_NEAR_MISSES, UNSEEN_PARAPHRASES

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

Pairs = Sequence[tuple[str, str]]
Vectors = Mapping[str, Sequence[float]]
THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)
DOC = ROOT / "docs" / "CACHE.md"


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "minilm.gguf"
    make_minilm(path)
    return path


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, minilm: Path, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("meaning")
    models = folder / "models"
    models.mkdir()
    (models / "tiny.gguf").symlink_to(chat_model)
    (models / "minilm.gguf").symlink_to(minilm)
    write_keys(folder)
    variables = {"MODELS_DIR": str(models), "DEFAULT_MODEL": "tiny", "CACHE_ENABLED": "true", "CTX": "2048"}
    with running_gateway(folder, variables, CACHE_EMBEDDING_MODEL="minilm") as running:
        eventually(lambda: states(running)["minilm"] == "ready", 8)  # by itself
        yield running


def ask(gateway: Gateway, *texts: str, **fields: Any) -> Response:
    """The last text as the user's; those before it as the system's and further turns."""
    roles = ["system", *(("user", "assistant") * len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts[:-1], strict=False)]
    messages.append({"role": "user", "content": texts[-1]})
    body: dict[str, Any] = {"messages": messages, "temperature": 0} | fields
    return gateway.chat(**body)


def kept(gateway: Gateway, entries: int) -> None:
    eventually(lambda: stats(gateway)["embedding"]["entries"] == entries, 8)


def test_a_paraphrase_gets_the_answer(gateway: Gateway) -> None:
    gateway.request("POST", "/v1/cache/clear", key=ADMIN)
    first = ask(gateway, "What is the capital of France?")
    assert how(first) == "miss"
    second = ask(gateway, "Could you please tell me what the capital of France is?")
    assert (how(second), second.body) == ("semantic", first.body)
    assert "age" in second.headers
    assert how(ask(gateway, "What is the capital of France?")) == "hit"
    assert how(ask(gateway, "What is the capital of Germany?")) == "miss"
    told = stats(gateway)
    assert told["semantic"] >= 1
    assert told["embedding"]["model"] == "minilm"
    assert told["embedding"]["similarity"] == DEFAULT_SIMILARITY

    def recorded() -> bool:
        listed = gateway.get("/logs", key=ADMIN).json()["logs"]
        return any(row["cache"] == "semantic" and row["tokens_out"] == 0 for row in listed)

    eventually(recorded, 5)
    assert all(row["model"] == "tiny" for row in gateway.get("/logs", key=ADMIN).json()["logs"]), "nobody else asked"


def test_a_stream_gets_a_stream(gateway: Gateway) -> None:
    gateway.request("POST", "/v1/cache/clear", key=ADMIN)
    first = ask(gateway, "How do I boil an egg?", stream=True)
    kept(gateway, 1)
    second = ask(gateway, "how should i boil eggs?", stream=True)
    assert (how(first), how(second)) == ("miss", "semantic")
    assert second.body == first.body
    assert how(ask(gateway, "how should i boil eggs?")) == "miss", "a whole answer is another one"


@pytest.mark.parametrize(
    ("texts", "fields"),
    [
        (["Who is the author of Hamlet?"], {"key": OTHER}),
        (["Who is the author of Hamlet?"], {"max_tokens": 9}),
        (["Who is the author of Hamlet?"], {"temperature": 0.5, "seed": 1}),
        (["Who is the author of Hamlet?"], {"stop": ["x"]}),
        (["Answer in verse.", "Who is the author of Hamlet?"], {}),
        (["", "Hi", "Hello", "Who is the author of Hamlet?"], {}),
    ],
    ids=str,
)
def test_all_else_must_agree(gateway: Gateway, texts: list[str], fields: dict[str, Any]) -> None:
    gateway.request("POST", "/v1/cache/clear", key=ADMIN)
    assert how(ask(gateway, "Who wrote Hamlet?")) == "miss"
    kept(gateway, 1)
    assert how(ask(gateway, *texts, **fields)) == "miss"
    assert how(ask(gateway, "Who is the author of Hamlet?")) == "semantic", "it would have been near enough"


@pytest.mark.parametrize("fields", [{"temperature": 1}, {"tools": []}, {"headers": {"Cache-Control": "no-cache"}}])
def test_who_may_not(gateway: Gateway, fields: dict[str, Any]) -> None:
    gateway.request("POST", "/v1/cache/clear", key=ADMIN)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    fields = fields | ({"tools": tools} if "tools" in fields else {})
    same = {} if "headers" in fields else fields
    ask(gateway, "Why is the sky blue?", **same)
    ask(gateway, "Tell me: is it so?")
    assert how(ask(gateway, "Please tell me why the sky is blue.", **fields)) in ("miss", None)


def test_each_near_miss_is_asked_anew(gateway: Gateway) -> None:
    """Through all of the gateway, one of each kind; the table below has all of them."""
    for kind, pairs in NEAR_MISSES.items():
        for text in pairs[0]:
            assert how(ask(gateway, f"{text}")) != "semantic", kind


def test_no_model_goes_for_the_embedding_model(tmp_path: Path, minilm: Path, chat_model: Path) -> None:
    """With room for one of them only, the semantic cache is as if it were not there, and says so."""
    folder = tmp_path / "house"
    write_keys(folder)
    config = {"models": {"chat": {"model_path": str(chat_model)}, "minilm": {"model_path": str(minilm)}}}
    (tmp_path / "models.json").write_text(json.dumps(config | {"system": {"max_concurrent_models": 1}}))
    variables = {"CONFIG_PATH": str(tmp_path / "models.json"), "CACHE_ENABLED": "true", "CTX": "512"}
    with running_gateway(folder, variables, CACHE_EMBEDDING_MODEL="minilm") as gateway:
        assert how(ask(gateway, "Who wrote Hamlet?", model="chat")) == "miss"
        assert how(ask(gateway, "Who is the author of Hamlet?", model="chat")) in ("miss", "semantic")
        assert how(ask(gateway, "Why is the sky blue?", model="chat")) == "miss"
        assert states(gateway) == {"chat": "ready", "minilm": "off"}
        assert how(ask(gateway, "Please tell me why the sky is blue.", model="chat")) == "miss"
        eventually(lambda: "minilm is not loaded for the semantic cache" in gateway.stderr)
        assert how(ask(gateway, "Who wrote Hamlet?", model="chat")) == "hit"


def test_the_embedding_model_is_asked_elsewhere(tmp_path: Path, minilm: Path, chat_model: Path) -> None:
    """By its address; and while it is away, nobody waits for it."""
    write_keys(tmp_path)
    with running_llama(minilm, "--embedding", "--pooling", "mean") as llama:
        url = f"http://127.0.0.1:{llama.port}"
        with running_gateway(
            tmp_path, MODEL_PATH=str(chat_model), CACHE_ENABLED="true", CACHE_EMBEDDING_MODEL=url
        ) as gateway:
            assert how(ask(gateway, "Who wrote Hamlet?")) == "miss"
            kept(gateway, 1)
            assert how(ask(gateway, "Who is the author of Hamlet?")) == "semantic"
            assert stats(gateway)["embedding"]["model"] == f"127.0.0.1:{llama.port}"
            llama_gone(llama.port, gateway)


def llama_gone(port: int, gateway: Gateway) -> None:
    """The same with a server that is not there: as if it were not asked for."""
    folder = gateway.folder / "second"
    variables = gateway.environment | {"DATA_DIR": str(folder / "data")}
    elsewhere = {"CACHE_EMBEDDING_MODEL": "http://127.0.0.1:9", "LLAMA_SERVER_PATH": variables["LLAMA_SERVER_PATH"]}
    write_keys(folder)
    with running_gateway(folder, elsewhere, MODEL_PATH=variables["MODEL_PATH"], CACHE_ENABLED="true") as other:
        assert how(ask(other, "Who wrote Hamlet?")) == "miss"
        began = time.monotonic()
        assert how(ask(other, "Who is the author of Hamlet?")) == "miss"
        assert how(ask(other, "Who wrote Hamlet?")) == "hit"
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["nobody", "tiny"])
def test_a_wrong_name_stops_the_start(tmp_path: Path, chat_model: Path, name: str) -> None:
    write_keys(tmp_path)
    with running_gateway(
        tmp_path, MODEL_PATH=str(chat_model), CACHE_ENABLED="true", CACHE_EMBEDDING_MODEL=name, ready=False
    ) as gateway:
        assert gateway.process.wait(8) != 0
        assert f"CACHE_EMBEDDING_MODEL='{name}'" in gateway.stderr


# --- the table


@pytest.fixture(scope="module")
def vectors(minilm: Path) -> Vectors:
    """Of all texts of all pairs, as the real llama-server computes them."""
    sets: list[Pairs] = [PARAPHRASES, UNSEEN_PARAPHRASES, UNSEEN_NEAR_MISSES, *NEAR_MISSES.values()]
    texts = sorted({text for pairs in sets for pair in pairs for text in pair})
    found: dict[str, Sequence[float]] = {}
    with running_llama(minilm, "--embedding", "--pooling", "mean") as llama:
        for start in range(0, len(texts), 32):
            some = texts[start : start + 32]
            status, body = llama.post("/v1/embeddings", {"input": some})
            assert status == 200, body
            for item in json.loads(body)["data"]:
                found[some[item["index"]]] = item["embedding"]
    return found


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(map(float.__mul__, one, other)) / math.sqrt(sum(x * x for x in one) * sum(x * x for x in other))


def hits(vectors: Vectors, pairs: Pairs, least: float, *, worded: bool) -> int:
    """How many of them the cache would take for the same."""
    return sum(
        cosine(vectors[one], vectors[other]) >= least and (not worded or (gist(one) or one) == gist(other))
        for one, other in pairs
    )


def table(vectors: Vectors) -> list[str]:
    """docs/CACHE.md's."""
    misses = [pair for pairs in NEAR_MISSES.values() for pair in pairs]
    sets: tuple[Pairs, ...] = (PARAPHRASES, misses, UNSEEN_PARAPHRASES, UNSEEN_NEAR_MISSES)
    lines = []
    for least in THRESHOLDS:
        alone, worded = ([hits(vectors, pairs, least, worded=flag) for pairs in sets] for flag in (False, True))
        cells = [f"{a} → {b}" for a, b in zip(alone, worded, strict=True)]
        shown = f"**{least:.2f}**" if least == DEFAULT_SIMILARITY else f"{least:.2f}"
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def test_no_near_miss_at_the_default_threshold(vectors: Vectors) -> None:
    for kind, pairs in {**NEAR_MISSES, "unseen": UNSEEN_NEAR_MISSES}.items():
        assert hits(vectors, pairs, DEFAULT_SIMILARITY, worded=True) == 0, kind
    assert hits(vectors, PARAPHRASES, DEFAULT_SIMILARITY, worded=True) > 0.7 * len(PARAPHRASES)
    assert hits(vectors, UNSEEN_PARAPHRASES, DEFAULT_SIMILARITY, worded=True) > 0.5 * len(UNSEEN_PARAPHRASES)


def test_the_table_of_the_docs(vectors: Vectors) -> None:
    """Derived again. Another build or processor may move a pair over a threshold: by one in a cell, not by more."""
    found = [line for line in DOC.read_text().splitlines() if line.startswith("|") and "→" in line]
    derived = table(vectors)
    assert len(found) == len(derived), "\n".join(derived)
    for written, line in zip(found, derived, strict=True):
        pairs = zip(numbers(written), numbers(line), strict=True)
        assert all(abs(a - b) <= 1 for a, b in pairs), "\n".join(derived)


def numbers(line: str) -> list[int]:
    cells = line.strip("| ").split("|")
    return [round(float(cells[0].strip(" *")) * 100), *(int(part) for cell in cells[1:] for part in cell.split("→"))]
