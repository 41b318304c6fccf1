"""A browser on another site: what it may read, on answers of every kind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.house import USER, Gateway, running_gateway

pytestmark = pytest.mark.real

HOME, SECOND, FOREIGN = "https://app.example", "http://localhost:3000", "https://evil.example"
CHAT = "/v1/chat/completions"
KINDS = ("limit", "remaining", "reset")


def started(folder: Path, model: Path, origins: str) -> Any:
    (folder / "api_keys.txt").write_text(f"user:{USER}:0\nonce:{USER}-once:1\n")
    return running_gateway(folder, MODEL_PATH=str(model), CORS_ORIGINS=origins)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with started(tmp_path_factory.mktemp("listed"), chat_model, f"{HOME}, {SECOND}") as running:
        yield running


@pytest.fixture(scope="module")
def anyone(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Gateway]:
    with started(tmp_path_factory.mktemp("anyone"), chat_model, "*") as running:
        yield running


def everything(gateway: Gateway, origin: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Status and headers of answers from every part of the gateway."""
    mine = {"Origin": origin}
    once = f"{USER}-once"
    replies = [
        gateway.get("/ping", key=None, headers=mine),
        gateway.get("/v1/models", headers=mine),
        gateway.chat(headers=mine),
        gateway.chat(headers=mine, max_tokens=80),
        gateway.chat(headers=mine, stream=True),
        gateway.chat(headers=mine, key=None),
        gateway.chat(headers=mine, n=0),
        gateway.chat(headers=mine, temperature="hot"),
        gateway.request("POST", "/reload", headers=mine),
        gateway.get("/nothing", headers=mine),
        gateway.get(CHAT, headers=mine),
        gateway.chat(headers=mine | {"Content-Type": "text/plain"}),
        gateway.request("POST", "/v1/messages", {}, headers=mine),
        gateway.request("POST", "/v1/embeddings", {"input": "a"}, headers=mine),
        *(gateway.chat(headers=mine, key=once) for _ in range(2)),
        gateway.request("POST", CHAT, b" " * 11_000_000, headers=mine),
    ]
    expected = [200, 200, 200, 200, 200, 401, 400, 400, 403, 404, 405, 415, 400, 501, 200, 429, 413]
    assert [reply.status for reply in replies[:14]] == expected[:14]
    assert (replies[15].status, replies[16].status) == (429, 413)
    for reply in replies:
        yield reply.status, reply.headers


@pytest.mark.parametrize("origin", [HOME, SECOND])
def test_an_allowed_origin_may_read_everything(listed: Gateway, origin: str) -> None:
    for status, headers in everything(listed, origin):
        assert headers["access-control-allow-origin"] == origin, status
        assert "Origin" in headers["vary"]
        exposed = headers["access-control-expose-headers"].split(", ")
        assert not {name for name in headers if name.startswith("x-")} - {*exposed, "x-accel-buffering"}
        assert {f"x-ratelimit-{what}-{of}" for what in KINDS for of in ("requests", "tokens")} <= set(exposed)
        assert "request-id" in exposed, "Anthropic's clients look for it"


@pytest.mark.parametrize("path", ["/", "/openapi.json"])
def test_what_is_compressed_differs_by_more_than_the_origin(listed: Gateway, path: str) -> None:
    reply = listed.get(path, key=None, headers={"Origin": HOME, "Accept-Encoding": "gzip"})
    assert reply.headers["vary"] == "Accept-Encoding, Origin"


def test_a_foreign_origin_may_read_nothing(listed: Gateway) -> None:
    for status, headers in everything(listed, FOREIGN):
        assert not [name for name in headers if name.startswith("access-control")], status


@pytest.mark.parametrize("origin", [HOME.upper(), f"{HOME}/", f"{HOME}.evil.example", "null", "*"])
def test_an_origin_must_be_the_very_same(listed: Gateway, origin: str) -> None:
    assert "access-control-allow-origin" not in listed.get("/ping", headers={"Origin": origin}).headers


def test_star_means_everyone(anyone: Gateway) -> None:
    for _, headers in everything(anyone, FOREIGN):
        assert headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in headers
    assert "access-control-allow-origin" not in anyone.get("/ping").headers


def preflight(gateway: Gateway, origin: str, path: str = CHAT) -> tuple[int, dict[str, str]]:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    reply = gateway.request("OPTIONS", path, key=None, headers=asked)
    return reply.status, reply.headers


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nothing", "/reload"])
def test_preflight(listed: Gateway, path: str) -> None:
    status, headers = preflight(listed, HOME, path)
    assert status == 204
    assert headers["access-control-allow-origin"] == HOME
    assert "POST" in headers["access-control-allow-methods"].split(", ")
    assert headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert int(headers["access-control-max-age"]) > 0


def test_preflight_of_a_foreign_origin(listed: Gateway) -> None:
    status, headers = preflight(listed, FOREIGN)
    assert status == 204
    assert not [name for name in headers if name.startswith("access-control")]


def test_preflight_where_everyone_may(anyone: Gateway) -> None:
    status, headers = preflight(anyone, FOREIGN)
    assert (status, headers["access-control-allow-origin"]) == (204, "*")


def test_it_is_off_by_default(gateway: Gateway) -> None:
    status, headers = preflight(gateway, HOME)
    assert status == 204
    headers |= gateway.chat(headers={"Origin": HOME}).headers
    assert not [name for name in headers if name.startswith("access-control")]
