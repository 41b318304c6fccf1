"""The response cache before a real llama-server."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from scripts.make_model import make_model
from tests.cache_kit import FEW, OTHER, how, stats, write_keys
from tests.house import ADMIN, USER, Gateway, Response, eventually, running_gateway
from tests.real.llama import running_llama
from tests.real.scrape import Growth
from tests.redis_kit import running_redis

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]


@contextlib.contextmanager
def caching(folder: Path, **variables: str) -> Iterator[Gateway]:
    write_keys(folder)
    with running_gateway(folder, variables | {"CACHE_ENABLED": "true"}) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with caching(tmp_path_factory.mktemp("cache"), MODEL_PATH=str(chat_model)) as running:
        yield running


def ask(gateway: Gateway, text: str, **fields: Any) -> Response:
    return gateway.chat(text, **({"temperature": 0} | fields))


# --- what the rule stands on


@pytest.mark.parametrize(
    ("fields", "same"),
    [({"temperature": 0}, True), ({"seed": 7}, True), ({"top_k": 1}, True), ({"seed": -1}, False), ({}, False)],
    ids=str,
)
def test_what_llama_server_repeats(chat_model: Path, fields: dict[str, Any], same: bool) -> None:
    with running_llama(chat_model) as llama:
        body = {"messages": [{"role": "user", "content": "tell me"}], "max_tokens": 40} | fields
        answers = [json.loads(llama.post("/v1/chat/completions", body)[1]) for _ in range(3)]
        texts = {answer["choices"][0]["message"]["content"] for answer in answers}
        assert (len(texts) == 1) is same


# --- exactly


def test_the_second_time_nothing_is_computed(gateway: Gateway) -> None:
    growth, before = Growth(gateway), stats(gateway)
    first, second = (ask(gateway, "one", max_tokens=20, headers={"x-request-id": f"c-{n}"}) for n in (1, 2))
    assert (how(first), how(second)) == ("miss", "hit")
    assert second.body == first.body
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] == "c-2"
    assert 0 <= int(second.headers["age"]) < 10
    assert growth.of("gateway_cache_requests_total", result="hit") == 1
    assert growth.of("gateway_cache_requests_total", result="miss") == 1
    assert growth.of("gateway_requests_total", status="200", path="/v1/chat/completions") == 2
    assert growth.of("llamacpp:tokens_predicted_total") == 20, "llama-server has computed one answer"
    assert growth.of("gateway_tokens_total", direction="out") == 20
    after = stats(gateway)
    assert [after[name] - before[name] for name in ("hits", "misses", "stored", "entries")] == [1, 1, 1, 1]
    assert after["enabled"] is True
    assert after["store"] == "sqlite"

    def records() -> list[dict[str, Any]]:
        listed = gateway.get("/logs", key=ADMIN).json()["logs"]
        return [row for row in listed if row["request_id"] in ("c-1", "c-2")]

    eventually(lambda: len(records()) == 2, 5)
    hit, miss = records()
    assert (hit["cache"], hit["tokens_out"], miss["cache"], miss["tokens_out"]) == ("hit", 0, "miss", 20)


def test_what_is_left_to_chance_is_not_cached(gateway: Gateway) -> None:
    assert [how(gateway.chat("chance")) for _ in range(2)] == [None, None]
    asks = {"Cache-Control": "max-age=60"}
    assert [how(gateway.chat("chance", headers=asks)) for _ in range(2)] == ["miss", "hit"], "unless it is asked for"


def test_what_clients_may_say(gateway: Gateway) -> None:
    assert how(ask(gateway, "say", headers={"Cache-Control": "no-store"})) is None
    assert how(ask(gateway, "say")) == "miss", "nothing was kept"
    assert how(ask(gateway, "say", headers={"Cache-Control": "no-cache"})) == "miss"
    assert how(ask(gateway, "say")) == "hit"


def test_keys_never_see_each_others_answers(gateway: Gateway) -> None:
    assert [how(ask(gateway, "whose", key=key)) for key in (USER, OTHER, USER, OTHER)] == ["miss", "miss", "hit", "hit"]


@pytest.mark.parametrize("length", [5, 400])
def test_a_stream_is_replayed_as_a_stream(gateway: Gateway, length: int) -> None:
    """To openai-python, which takes it to pieces."""
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=USER, max_retries=0)

    def streamed() -> tuple[str | None, list[str], Any]:
        with client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[{"role": "user", "content": f"stream {length}"}],
            temperature=0,
            max_tokens=length,
            stream=True,
            stream_options={"include_usage": True},
        ).parse() as stream:
            chunks = list(stream)
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
            return stream.response.headers.get("x-cache"), pieces, chunks[-1].usage

    with client:
        first, second = streamed(), streamed()
    assert (first[0], second[0]) == ("miss", "hit")
    assert second[1:] == first[1:]
    assert len(second[1]) > length, "token by token"
    assert second[2].completion_tokens == length


def test_a_stream_on_the_wire(gateway: Gateway) -> None:
    """Byte for byte, progress events of our own asking left out; and to a client of HTTP/1.0."""
    replies = [ask(gateway, "wire", stream=True, max_tokens=300) for _ in range(2)]
    assert [how(reply) for reply in replies] == ["miss", "hit"]
    assert replies[0].body == replies[1].body
    assert replies[1].headers["content-type"].startswith("text/event-stream")
    assert replies[1].body.endswith(b"data: [DONE]\n\n")
    assert b"prompt_progress" not in replies[1].body
    assert how(ask(gateway, "wire", max_tokens=300)) == "miss", "a whole answer is another one"
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=5)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"  # type: ignore[attr-defined]
    with contextlib.closing(connection):
        body = {"messages": [{"role": "user", "content": "wire"}], "max_tokens": 300, "temperature": 0, "stream": True}
        about = {"Content-Type": "application/json", "Authorization": f"Bearer {USER}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), about)
        reply = connection.getresponse()
        assert reply.getheader("x-cache") == "hit"
        assert reply.read() == replies[0].body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 5, "temperature": 0}),
        ("/v1/completions", {"prompt": "route 0", "max_tokens": 60, "temperature": 0, "stream": True}),
        ("/v1/completions", {"input": "route 1", "params": {"max_tokens": 5, "temperature": 0}}),
        ("/infer", {"prompt": "route 2", "max_tokens": 5, "temperature": 0}),
        ("/infer", {"prompt": "route 3", "max_tokens": 5, "temperature": 0, "stream": False}),
        ("/completion", {"prompt": "route 4", "n_predict": 5, "temperature": 0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5, "temperature": 0}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "b"}], "max_tokens": 50, "seed": 1, "stream": True}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5, "temperature": 0}),
        ("/tokenize", {"content": "a b c"}),
    ],
    ids=str,
)
def test_every_route(gateway: Gateway, path: str, body: dict[str, Any]) -> None:
    first, second = (gateway.request("POST", path, body) for _ in range(2))
    assert (how(first), how(second)) == ("miss", "hit")
    if "input" not in body and path != "/infer":  # these forms tell a request's own id and time
        assert second.body == first.body
    assert len(second.body) > 0.8 * len(first.body)


def test_doors_share_what_is_the_same_request(gateway: Gateway) -> None:
    assert (
        how(gateway.request("POST", "/infer", {"prompt": "door", "max_tokens": 8, "stream": False, "seed": 1}))
        == "miss"
    )
    assert how(gateway.chat("door", seed=1)) == "hit"


def test_refusals_are_not_cached(gateway: Gateway) -> None:
    before = stats(gateway)["stored"]
    for _ in range(2):
        assert ask(gateway, "a " * 5000).status == 400
    assert stats(gateway)["stored"] == before


def test_hits_count_as_requests_and_take_no_tokens(gateway: Gateway) -> None:
    replies = [ask(gateway, "few", key=FEW, max_tokens=20) for _ in range(4)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert replies[3].json()["error"]["code"] == "rate_limit_exceeded"
    assert [reply.headers.get("x-cache") for reply in replies[:3]] == ["miss", "hit", "hit"]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies[:3]] == ["2", "1", "0"]
    left = str(100 - replies[0].json()["usage"]["total_tokens"])
    assert [reply.headers["x-ratelimit-remaining-tokens"] for reply in replies[1:3]] == [left, left]


def test_clear(gateway: Gateway) -> None:
    assert how(ask(gateway, "clear")) == "miss"
    assert how(ask(gateway, "clear")) == "hit"
    assert gateway.request("POST", "/v1/cache/clear", key=USER).status == 403
    cleared = gateway.request("POST", "/v1/cache/clear", key=ADMIN).json()["cleared"]
    assert cleared >= 1
    assert stats(gateway)["entries"] == 0
    assert how(ask(gateway, "clear")) == "miss"
    assert gateway.get("/v1/cache/stats", key=USER).status == 403


# --- while it is being made


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, slow_model: Path) -> Iterator[Gateway]:
    with caching(tmp_path_factory.mktemp("slow"), MODEL_PATH=str(slow_model), PARALLEL="4") as running:
        yield running


@pytest.mark.parametrize("stream", [False, True])
def test_identical_requests_share_one_answer(slow: Gateway, stream: bool) -> None:
    growth, before = Growth(slow), stats(slow)
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: ask(slow, "together", max_tokens=60, stream=stream), range(6)))
    assert sorted(str(how(reply)) for reply in replies) == ["hit"] * 5 + ["miss"]
    assert len({reply.body for reply in replies}) == 1
    assert growth.of("llamacpp:tokens_predicted_total") == 60
    assert stats(slow)["stored"] - before["stored"] == 1
    assert stats(slow)["shared"] - before["shared"] >= 1


def test_who_leaves_in_the_middle_leaves_nothing_behind(slow: Gateway) -> None:
    before = stats(slow)["stored"]
    with leaving(slow, "leaves"):
        pass
    eventually(lambda: slow.slots_busy() == 0, 8)
    assert stats(slow)["stored"] == before
    assert how(ask(slow, "leaves", max_tokens=5)) == "miss"


def test_when_the_first_one_leaves_the_next_one_makes_it(slow: Gateway) -> None:
    growth = Growth(slow)
    with ThreadPoolExecutor(2) as pool:
        with leaving(slow, "takes over", max_tokens=100):
            others = [pool.submit(ask, slow, "takes over", max_tokens=100, stream=True) for _ in range(2)]
            eventually(lambda: slow.get("/health", key=None).json()["queue"]["active"] >= 1)
        replies = [other.result(20) for other in others]
    assert sorted(str(how(reply)) for reply in replies) == ["hit", "miss"]
    assert replies[0].body == replies[1].body
    assert growth.of("gateway_requests_total", status="499") == 1


@contextlib.contextmanager
def leaving(gateway: Gateway, text: str, max_tokens: int = 2000) -> Iterator[None]:
    """A stream whose client has read its first token, and leaves at the end of the block."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=8)
    with contextlib.closing(connection):
        about = {"Content-Type": "application/json", "Authorization": f"Bearer {USER}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), about)
        reply = connection.getresponse()
        assert reply.status == 200
        reply.readline()
        yield


# --- another model is another answer


@pytest.mark.timeout(60)
def test_a_changed_file_or_flag_never_answers_from_before(tmp_path: Path) -> None:
    model = tmp_path / "weights.gguf"
    make_model(model, seed=1)
    variables = {"MODEL_PATH": str(model), "IDLE_TIMEOUT_SECONDS": "0"}
    with caching(tmp_path / "house", **variables) as gateway:
        old = ask(gateway, "x")
        assert how(ask(gateway, "x")) == "hit"
        replacement = tmp_path / "new.gguf"
        make_model(replacement, seed=2)
        shutil.copystat(model, replacement)  # the same time, and nearly the same size
        replacement.rename(model)
        for _ in range(2):  # the server that runs is still the old one: it answers, and none of that is kept
            reply = ask(gateway, "x")
            assert how(reply) == "miss"
        assert gateway.request("POST", "/reload", key=ADMIN).status == 200
        assert how(ask(gateway, "x")) == "miss"
        assert gateway.request("POST", "/v1/models/eject", {"model": "weights"}, key=ADMIN).status == 200
        new = ask(gateway, "x")
        assert how(new) == "miss"
        assert text_of(new) != text_of(old)
        again = ask(gateway, "x")
        assert (how(again), text_of(again)) == ("hit", text_of(new))
    with caching(tmp_path / "house", **variables) as gateway:
        assert how(ask(gateway, "x")) == "hit", "it outlives the gateway"
    with caching(tmp_path / "house", **variables, EXTRA_ARGS="--rope-freq-scale 0.5") as gateway:
        assert how(ask(gateway, "x")) == "miss"
    with caching(tmp_path / "house", **variables, CTX="2048") as gateway:
        assert how(ask(gateway, "x")) == "miss"


def text_of(reply: Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


@pytest.mark.timeout(30)
def test_a_flag_of_the_models_file(tmp_path: Path, chat_model: Path) -> None:
    config = tmp_path / "models.json"

    def write(*flags: str) -> None:
        model = {"model_path": str(chat_model), "flags": ["--ctx-size", "2048", "-np", "2", *flags]}
        config.write_text(json.dumps({"models": {"m": model}}))

    write()
    with caching(tmp_path / "house", CONFIG_PATH=str(config)) as gateway:
        assert [how(ask(gateway, "x", model="m")) for _ in range(2)] == ["miss", "hit"]
        write("--rope-freq-scale", "0.5")
        gateway.request("POST", "/reload", key=ADMIN)
        assert how(ask(gateway, "x", model="m")) == "miss"
        eventually(lambda: how(ask(gateway, "x", model="m")) == "hit", 5)
        write()
        gateway.request("POST", "/reload", key=ADMIN)
        assert how(ask(gateway, "x", model="m")) == "hit", "as it was at first"


@pytest.mark.timeout(30)
def test_what_is_cached_loads_no_model(tmp_path: Path, embedding_model: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "embed.gguf").symlink_to(embedding_model)
    (models / "spare.gguf").symlink_to(embedding_model)
    body = {"model": "embed", "input": ["a", "b"]}
    with caching(tmp_path / "house", MODELS_DIR=str(models)) as gateway:
        first = gateway.request("POST", "/v1/embeddings", body)
        assert how(first) == "miss"
        gateway.request("POST", "/v1/models/eject", {"model": "embed"}, key=ADMIN)
        second = gateway.request("POST", "/v1/embeddings", body)
        assert (how(second), second.body) == ("hit", first.body)
        states = {row["model_id"]: row["state"] for row in gateway.get("/status", key=ADMIN).json()["instances"]}
        assert states == {"embed": "off", "spare": "off"}


def test_a_foreign_server(tmp_path: Path, chat_model: Path) -> None:
    """Nobody knows what it serves when it comes back."""
    with running_llama(chat_model) as llama, caching(tmp_path, LLAMA_URL=f"http://127.0.0.1:{llama.port}") as gateway:
        assert [how(ask(gateway, "x")) for _ in range(2)] == ["miss", "hit"]
        gateway.stop()
        with caching(tmp_path, LLAMA_URL=f"http://127.0.0.1:{llama.port}") as again:
            assert [how(ask(again, "x")) for _ in range(2)] == ["miss", "hit"]


def test_a_kill_spoils_nothing(tmp_path: Path, chat_model: Path) -> None:
    with caching(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        for number in range(20):
            assert how(ask(gateway, f"kill {number}")) == "miss"
        eventually(lambda: stats(gateway)["entries"] == 20)
        gateway.stop(signal.SIGKILL)
    with caching(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        assert {how(ask(gateway, f"kill {number}")) for number in range(20)} == {"hit"}


def test_off_by_default(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        assert [how(ask(gateway, "x")) for _ in range(2)] == [None, None]
        assert stats(gateway)["enabled"] is False
        assert gateway.request("POST", "/v1/cache/clear", key=ADMIN).json() == {"cleared": 0}
        assert not list(gateway.data_dir.glob("*cache*"))


# --- several gateways


@pytest.mark.timeout(40)
def test_gateways_share_answers_over_redis(tmp_path: Path, chat_model: Path) -> None:
    """Each with a copy of the file, at another time and place; and when Redis is away, both go on without."""
    with running_redis(tmp_path / "redis") as redis, contextlib.ExitStack() as stack:
        gateways = []
        for name in ("one", "two"):
            copy = tmp_path / name / "tiny.gguf"
            copy.parent.mkdir()
            shutil.copy(chat_model, copy)
            variables = {"MODEL_PATH": str(copy), "REDIS_URL": redis.url}
            gateways.append(stack.enter_context(caching(tmp_path / name / "house", **variables)))
        one, two = gateways
        for gateway in gateways:  # until its file has been read, nothing can be said about it
            eventually(lambda gateway=gateway: how(ask(gateway, "warm up")) is not None, 8)  # type: ignore[misc]
        first = ask(one, "shared")
        assert how(first) == "miss"
        second = eventually(lambda: reply if how(reply := ask(two, "shared")) == "hit" else False, 5)
        assert isinstance(second, Response)
        assert second.body == first.body
        assert how(ask(two, "shared", key=OTHER)) == "miss"
        assert stats(two)["store"] == "redis"
        assert one.request("POST", "/v1/cache/clear", key=ADMIN).json()["cleared"] >= 2
        assert how(ask(two, "shared")) == "miss"
        redis.stop()
        assert {how(ask(two, "shared")) for _ in range(4)} == {"miss"}
