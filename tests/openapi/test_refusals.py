"""Every route is asked wrongly in every way that there is: each refusal is one that is described for it."""

from __future__ import annotations

import http.client
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from gateway.http.openapi.document import document
from tests.house import ADMIN, USER, Gateway, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(30)]

DOCUMENT = document()
ENDLESS = ("/v1/models/status/stream", "/metrics/stream")
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
_addresses = itertools.count(1)


@dataclass(frozen=True)
class Wrong:
    """A request that somebody refuses, on some routes at least."""

    status: int  # on one route or another
    key: str | None = ADMIN
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    query: str = ""


WRONG = {
    "no-key": Wrong(401, key=None),
    "unknown-key": Wrong(401, key="sk-nobody-0123456789abcdefghijABCDEFGHIJ"),
    "weak-key": Wrong(403, key=USER),
    "form": Wrong(415, headers=FORM, body=b"a=1"),
    "compressed": Wrong(415, headers=JSON | {"Content-Encoding": "gzip"}, body=b"{}"),
    "no-json": Wrong(400, headers=JSON, body=b"{"),
    "list": Wrong(400, headers=JSON, body=b"[]"),
    "nothing": Wrong(400, headers=JSON, body=b"{}"),
    "model": Wrong(404, headers=JSON, body=b'{"model": "nobody", "messages": [], "input": "a", "prompt": "a"}'),
    "priority": Wrong(400, headers=JSON | {"X-Request-Priority": "now"}, body=b"{}"),
    "too-large": Wrong(413, headers={"Content-Length": "99999999"}),
    "long-line": Wrong(414, query="?" + "a" * 9000),
    "long-header": Wrong(431, headers={"X-Long": "a" * 9000}),
    "parameter": Wrong(400, query="?nonsense=1&limit=none"),
}
ROUTES = [
    (method.upper(), path, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
]


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, embedding_model: Path) -> Iterator[Gateway]:
    """With two models, so that a model's name may be wrong; wrong keys come from many addresses."""
    folder = tmp_path_factory.mktemp("herd")
    models = folder / "models"
    models.mkdir()
    for model in (chat_model, embedding_model):
        (models / model.name).symlink_to(model)
    more = {"MODELS_DIR": str(models), "DEFAULT_MODEL": "tiny", "TRUSTED_PROXIES": "127.0.0.1/32", "CTX": "512"}
    with running_gateway(folder, more, LOG_LEVEL="error") as running:
        yield running


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(gateway: Gateway, method: str, path: str, wrong: Wrong) -> Answer:
    """The body may be shorter than announced: the refusal comes before it."""
    number = next(_addresses)
    headers = wrong.headers | {"X-Forwarded-For": f"10.1.{number >> 8}.{number & 255}", "Connection": "close"}
    if wrong.key is not None:
        headers["Authorization"] = f"Bearer {wrong.key}"
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    try:
        connection.request(
            method,
            path.format(model="tiny", name="none", file="none", what="slots") + wrong.query,
            headers=headers,
            body=wrong.body,
        )
        reply = connection.getresponse()
        return Answer(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def follow(node: dict[str, Any]) -> dict[str, Any]:
    name = node.get("$ref", "").rpartition("/")[2]
    return DOCUMENT["components"]["responses"][name] if name else node


def check(answer: Answer, method: str, path: str, operation: dict[str, Any]) -> None:
    about = f"{method} {path}: {answer.status} {answer.body[:300]!r}"
    assert str(answer.status) in operation["responses"], about
    described = follow(operation["responses"][str(answer.status)])
    if answer.status < 400 or "x-codes" not in described or method == "HEAD":
        return
    schema = described["content"]["application/json"]["schema"]
    body = json.loads(answer.body)
    schemas = {"components": {"schemas": DOCUMENT["components"]["schemas"]}}
    assert jsonschema_rs.is_valid(schema | schemas, body), about
    error = body["error"]
    code = body["code"] if isinstance(error, str) else error.get("code")
    if body.get("type") != "error":  # Anthropic's shape has no codes
        assert code in described["x-codes"], about
    for name in ("www-authenticate",) if answer.status == 401 else ():
        assert name in answer.headers


@pytest.mark.parametrize("name", WRONG)
def test_each_refusal_is_described(herd: Gateway, name: str) -> None:
    wrong, seen = WRONG[name], set()
    refused_before = wrong.status in (401, 413, 414, 431)
    for method, path, operation in ROUTES:
        if path in ENDLESS and not refused_before:
            continue
        sent = wrong if method in ("POST", "PUT") or wrong.body is None else Wrong(wrong.status, wrong.key)
        answer = ask(herd, method, path, sent)
        check(answer, method, path, operation)
        seen.add(answer.status)
    assert wrong.status in seen
