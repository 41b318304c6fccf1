"""Keys as they work on a running gateway: what each may do, and what a change of their file does to whom, and when."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gateway.stores.keys import hashes
from tests.house import ADMIN, FAKE_LLAMA, USER, Gateway, Response, eventually, running_gateway
from tests.real.scrape import Growth, Scrape
from tests.real.wire import chat, request, wire

pytestmark = pytest.mark.real

CHAT = "/v1/chat/completions"
SEEN_WITHIN = 2.0  # CONTRACT 5


def secret(name: str) -> str:
    return f"sk-{name}-0123456789abcdefghijABCDEFGHIJ"


def code(reply: Response) -> str:
    return str(reply.json()["error"]["code"])


def keys_file(gateway: Gateway) -> Path:
    return Path(gateway.environment["AUTH_KEYS_FILE"])


def write_keys(gateway: Gateway, *lines: str) -> None:
    """As an editor does it: another file takes the place of the old one."""
    path = keys_file(gateway)
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(f"{line}\n" for line in (f"admin:{ADMIN} scope=admin", *lines)))
    fresh.replace(path)


# --- what a key may do

LINES = [
    f"admin:{ADMIN} scope=admin",
    f"user:{USER}",
    f"watcher:{secret('watcher')} scope=metrics",
    f"both:{secret('both')} scope=infer,metrics",
    f"mine:{secret('mine')} models=ti*,other",
    f"stranger:{secret('stranger')} models=qwen-*",
    f"old:{secret('old')}::2024-01-01T00:00:00Z",
    f"twice:{secret('twice-a')}",
    f"twice:{secret('twice-b')}",
    f"paced:{secret('paced')}:2",
    "broken",
]


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "api_keys.txt").write_text("\n".join(["# all kinds", "", *LINES]) + "\n")
    more: dict[str, Any] = {"METRICS_AUTH_ENABLED": "true", "API_KEY": f"{secret('env-a')}, {secret('env-b')}"}
    with running_gateway(folder, MODEL_PATH=str(chat_model), **more) as running:
        yield running


MAY = [  # key, what it gets for: metrics, chat, models, reload
    (ADMIN, 200, 200, 200, 200),
    (USER, 403, 200, 200, 403),
    (secret("watcher"), 200, 403, 403, 403),
    (secret("both"), 200, 200, 200, 403),
    (secret("mine"), 403, 200, 200, 403),
    (secret("stranger"), 403, 403, 200, 403),
    (secret("old"), 401, 401, 401, 401),
    (secret("twice-a"), 403, 200, 200, 403),
    (secret("twice-b"), 403, 200, 200, 403),
    (secret("env-a"), 403, 200, 200, 403),
    (secret("env-b"), 403, 200, 200, 403),
    (None, 401, 401, 401, 401),
]


@pytest.mark.parametrize(("key", "metrics", "talk", "models", "reload"), MAY)
def test_scopes(keyed: Gateway, key: str | None, metrics: int, talk: int, models: int, reload: int) -> None:
    replies = [
        keyed.get("/metrics", key=key),
        keyed.chat(key=key),
        keyed.get("/v1/models", key=key),
        keyed.request("POST", "/reload", key=key),
    ]
    assert [reply.status for reply in replies] == [metrics, talk, models, reload]
    for number, reply in enumerate(replies):
        if reply.status == 403:
            stranger = (key, number) == (secret("stranger"), 1)
            assert code(reply) == ("model_not_allowed" if stranger else "insufficient_scope")
        if reply.status == 401:
            assert code(reply) == ("missing_api_key" if key is None else "expired_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"


def test_a_list_of_models(keyed: Gateway) -> None:
    """Who may not use a model does not see it either."""
    stranger = secret("stranger")
    for path in ("/v1/models", "/models", "/v1/models/status", "/status", "/v1/queue/stats"):
        assert b'"tiny"' in keyed.get(path, key=secret("mine")).body
        assert b"tiny" not in keyed.get(path, key=stranger).body, path
    for path in ("/v1/models/tiny", "/v1/models/status/tiny", "/v1/models/tiny/status"):
        reply = keyed.get(path, key=stranger)
        assert (reply.status, code(reply)) == (404, "model_not_found")
        nothing = keyed.get(path.replace("tiny", "none"), key=stranger)
        assert nothing.body == reply.body.replace(b"tiny", b"none"), "nor does it learn that there is one"
    reply = keyed.chat(key=stranger)
    assert (reply.status, code(reply), reply.json()["error"]["param"]) == (403, "model_not_allowed", "model")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {USER}"},
        {"Authorization": f"bearer {USER}"},
        {"Authorization": USER},
        {"x-api-key": USER},
        {"X-API-Key": USER, "Authorization": "Bearer "},
    ],
)
def test_ways_to_send_a_key(keyed: Gateway, headers: dict[str, str]) -> None:
    assert keyed.chat(key=None, headers=headers).status == 200


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer"}, {"Authorization": ""}, {"x-api-key": ""}, {"Cookie": USER}]
)
def test_ways_to_send_none(keyed: Gateway, headers: dict[str, str]) -> None:
    reply = keyed.chat(key=None, headers=headers)
    assert (reply.status, code(reply)) == (401, "missing_api_key")
    assert keyed.get(f"/v1/models?key={USER}", key=None).status == 401


def test_counters_by_key_stand_only_behind_a_key(keyed: Gateway, gateway: Gateway) -> None:
    growth = Growth(keyed)
    keyed.chat()
    keyed.chat(key=secret("mine"), max_tokens=5)
    keyed.chat(key=secret("env-a"))
    keyed.chat(key=secret("stranger"))
    assert growth.of("gateway_key_requests_total", key="user") == 1
    assert growth.of("gateway_key_requests_total", key="env") == 1
    assert growth.of("gateway_key_requests_total", key="stranger") == 1
    assert growth.of("gateway_key_tokens_total", key="mine", direction="out") == 5
    assert growth.of("gateway_key_tokens_total", key="stranger") == 0
    assert Scrape(keyed).values("key") <= {*"admin user both mine stranger twice env paced watcher".split()}
    gateway.chat()
    assert not Scrape(gateway).values("key")


def test_a_limit_of_its_own(keyed: Gateway) -> None:
    paced = secret("paced")
    assert [keyed.chat(key=paced).status for _ in range(3)] == [200, 200, 429]
    reply = keyed.chat(key=paced)
    assert (code(reply), reply.headers["x-ratelimit-limit-requests"]) == ("rate_limit_exceeded", "2")
    assert keyed.chat().status == 200


def test_a_bad_line_takes_nobody_down_and_is_reported_without_its_text(keyed: Gateway) -> None:
    bad = LINES.index("broken") + 3
    eventually(lambda: f"line {bad}: " in keyed.stderr)
    reply = keyed.request("POST", "/reload", key=ADMIN).json()["keys"]
    assert reply["loaded"] == len(LINES) - 1 + 2
    assert [f"line {bad}: " in problem for problem in reply["problems"]] == [True]


# --- the file changes


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    """Before a stand-in for llama-server, whose pace can be ordered."""
    folder = tmp_path_factory.mktemp("slow")
    more = {"LLAMA_SERVER_PATH": str(FAKE_LLAMA), "TRUSTED_PROXIES": "127.0.0.1"}
    with running_gateway(folder, MODEL_PATH=str(chat_model), **more) as running:  # type: ignore[arg-type]
        yield running


ADDRESSES = itertools.count(1)


def knock(gateway: Gateway, key: str) -> Response:
    """Each time from another address, because of too many failures only the first few would be looked at."""
    number = next(ADDRESSES)
    return gateway.get("/v1/models", key=key, headers={"X-Forwarded-For": f"10.0.{number // 256}.{number % 256}"})


def changes(gateway: Gateway, key: str, status: int) -> float:
    """Seconds until a key gets another answer."""
    begun = time.monotonic()
    eventually(lambda: knock(gateway, key).status == status, SEEN_WITHIN + 3)
    return time.monotonic() - begun


def test_a_change_is_seen_and_loses_no_request(slow: Gateway) -> None:
    fresh, gone = secret("fresh"), secret("gone")
    write_keys(slow, f"user:{USER}", f"gone:{gone}")
    changes(slow, gone, 200)
    with wire(slow) as running:
        prompt = {"role": "user", "content": "{{fake: tokens=60 interval=0.05}}"}
        running.send(request("POST", CHAT, chat(stream=True, messages=[prompt], max_tokens=60), key=gone))
        eventually(lambda: slow.model()["inflight"] == 1)
        write_keys(slow, f"user:{USER}", f"fresh:{fresh}")
        took = changes(slow, fresh, 200)
        reply = knock(slow, gone)
        assert (reply.status, code(reply)) == (401, "invalid_api_key")
        assert slow.model()["inflight"] == 1, "it is still running"
        answer = running.answer()
    assert took < SEEN_WITHIN
    assert answer.whole
    assert answer.events[-1] == "[DONE]"
    assert len(answer.events) > 60


def test_a_change_is_seen_while_many_requests_come(slow: Gateway) -> None:
    """Nobody whose key stays is refused at any moment."""
    write_keys(slow, f"user:{USER}")
    changes(slow, USER, 200)
    over = threading.Event()

    def keep_asking() -> set[int]:
        seen = set()
        while not over.is_set():
            seen.add(slow.get("/v1/models").status)
        return seen

    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(keep_asking) for _ in range(2)]
        try:
            for number in range(3):
                write_keys(slow, f"user:{USER}", f"k{number}:{secret(f'k{number}')}")
                assert changes(slow, secret(f"k{number}"), 200) < SEEN_WITHIN
        finally:
            over.set()
        assert [each.result() for each in asking] == [{200}, {200}]


def test_reload_is_at_once(slow: Gateway) -> None:
    prompt = secret("prompt")
    assert knock(slow, prompt).status == 401
    write_keys(slow, f"user:{USER}", f"prompt:{prompt}")
    reply = slow.request("POST", "/reload", key=ADMIN)
    assert reply.status == 200
    assert reply.json()["keys"] == {"loaded": 3, "problems": []}
    assert slow.get("/v1/models", key=prompt).status == 200


def test_sighup(slow: Gateway) -> None:
    """Also where nothing has changed: the file is read, and that is told."""
    slow.chat(headers={"x-request-id": "until-now"})
    eventually(lambda: "until-now" in slow.stderr)  # all that was told before is written
    before = slow.stderr.count("keys.reloaded")
    slow.process.send_signal(signal.SIGHUP)
    eventually(lambda: slow.stderr.count("keys.reloaded") == before + 1)
    assert slow.get("/v1/models").status == 200


def test_a_file_that_is_gone_leaves_the_keys_in_force(slow: Gateway) -> None:
    content = keys_file(slow).read_text()
    keys_file(slow).unlink()
    try:
        reply = slow.request("POST", "/reload", key=ADMIN).json()["keys"]
        assert reply["loaded"] >= 2
        assert "is gone" in reply["problems"][0]
        assert slow.get("/v1/models").status == 200
    finally:
        keys_file(slow).write_text(content)
    eventually(lambda: slow.request("POST", "/reload", key=ADMIN).json()["keys"]["problems"] == [])


def test_a_key_expires_while_it_is_used(slow: Gateway) -> None:
    brief = secret("brief")
    end = (datetime.now(UTC) + timedelta(seconds=1.2)).isoformat()
    write_keys(slow, f"user:{USER}", f"brief:{brief}::{end}")
    slow.request("POST", "/reload", key=ADMIN)
    assert slow.get("/v1/models", key=brief).status == 200
    changes(slow, brief, 401)
    reply = slow.get("/v1/models", key=brief)
    assert code(reply) == "expired_api_key"
    assert datetime.now(UTC) >= datetime.fromisoformat(end)


# --- no usable key, no keys at all


def test_no_usable_key(tmp_path: Path, chat_model: Path) -> None:
    (tmp_path / "api_keys.txt").write_text(f"old:{secret('old')}::2024-01-01T00:00:00Z\n")
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        for path in ("/ping", "/healthz", "/readyz", "/health", "/metrics"):
            assert gateway.get(path, key=None).status == 200
        for key in (None, USER, secret("old")):
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", "/reload"), ("GET", "/nothing")):
                assert gateway.request(method, path, key=key).status == 401, (key, path)
        eventually(lambda: f"corral keys generate --name me --file {keys_file(gateway)}" in gateway.stderr)
        keys_file(gateway).write_text(f"user:{USER}\n")  # as an editor does that keeps the file
        assert changes(gateway, USER, 200) < SEEN_WITHIN


@contextlib.contextmanager
def without_keys(folder: Path, model: Path, **more: Any) -> Iterator[Gateway]:
    with running_gateway(
        folder, MODEL_PATH=str(model), AUTH_ENABLED="false", MAX_REQUESTS_PER_MINUTE="2", **more
    ) as running:
        yield running


def test_auth_off(tmp_path: Path, chat_model: Path) -> None:
    with without_keys(tmp_path, chat_model, TRUSTED_PROXIES="127.0.0.0/8,192.0.2.128/25") as gateway:
        assert gateway.get("/v1/models", key=None).status == 200
        assert gateway.request("POST", "/reload", key=None).status == 200
        assert gateway.get("/nothing", key=None).status == 404
        assert gateway.get("/v1/models", key="whatever").status == 200
        assert gateway.get("/health").json()["authentication"]["enabled"] is False
        assert "keys generate" not in gateway.stderr

        def talk(forwarded: str) -> int:
            return gateway.chat(key=None, headers={"X-Forwarded-For": forwarded}).status

        assert [talk("192.0.2.1") for _ in range(3)] == [200, 200, 429]
        assert talk("192.0.2.2") == 200
        assert talk("203.0.113.9, 192.0.2.1") == 429, "only what a trusted proxy saw counts"
        assert talk("192.0.2.1, 192.0.2.200") == 429, "a trusted proxy's own address does not"
        assert talk("192.0.2.3, 192.0.2.200, 127.0.0.9") == 200
        with wire(gateway) as client:  # a proxy that adds a line of its own
            sent = request("POST", CHAT, chat(), key=None, headers={"X-Forwarded-For": "203.0.113.7"})
            client.send(sent.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n", 1))
            assert client.answer().status == 429
        eventually(lambda: "key_id=anonymous" in gateway.stderr)


def test_nobody_is_trusted_by_default(tmp_path: Path, chat_model: Path) -> None:
    with without_keys(tmp_path, chat_model) as gateway:
        sent = [gateway.chat(key=None, headers={"X-Forwarded-For": f"192.0.2.{number}"}) for number in range(3)]
        assert [reply.status for reply in sent] == [200, 200, 429]


def test_failures_are_throttled_per_address_and_valid_keys_are_not(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), TRUSTED_PROXIES="127.0.0.1") as gateway:

        def guess(number: int, address: str = "192.0.2.1") -> Response:
            return gateway.get("/v1/models", key=secret(f"guess{number}"), headers={"X-Forwarded-For": address})

        statuses = [guess(number).status for number in range(25)]
        assert statuses[:20] == [401] * 20
        assert statuses[-1] == 429
        reply = guess(99)
        assert code(reply) == "rate_limit_exceeded"
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert guess(100, "192.0.2.2").status == 401
        assert gateway.get("/v1/models", headers={"X-Forwarded-For": "192.0.2.1"}).status == 200
        scrape = Scrape(gateway)
        assert scrape.total("gateway_auth_failures_total") == statuses.count(401) + 1
        assert scrape.total("gateway_rate_limited_total", reason="auth_failures") == statuses.count(429) + 1


def test_a_chosen_key_is_never_throttled(tmp_path: Path, chat_model: Path) -> None:
    """Neither many first uses at once, nor one from an address that sent too many wrong keys."""
    keys = tmp_path / "api_keys.txt"
    chosen = ["my-own-secret-0123456789", "another-secret-0123456789"]
    keys.write_text("".join(f"own{number}:{hashes.slow_hash(each)}\n" for number, each in enumerate(chosen)))
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:

        def knock(key: str) -> int:
            return gateway.get("/v1/models", key=key).status

        with ThreadPoolExecutor(30) as pool:
            assert set(pool.map(knock, [chosen[0]] * 30)) == {200}
        assert [knock("wrong-secret-0123456789") for _ in range(25)][-1] == 429
        assert knock(chosen[1]) == 200
