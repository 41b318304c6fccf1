"""What tests of the response cache have in common: keys, requests, and how an answer was come by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from gateway.pipeline.cache.key import Wish
from gateway.pipeline.call import Call, read_fields
from gateway.pipeline.routes import ROUTES
from gateway.stores.keys.file import Key
from tests.house import ADMIN, USER, Gateway, Response

OTHER = "sk-other-0123456789abcdefghijABCDEFGHIJ"
FEW = "sk-few-0123456789abcdefghijABCDEFGHIJ"
KEYS = [f"admin:{ADMIN}:0 scope=admin", f"user:{USER}:0", f"other:{OTHER}:0", f"few:{FEW}:3 tpm=100"]

HI = {"messages": [{"role": "user", "content": "hi"}]}
GREEDY = {**HI, "temperature": 0}


def write_keys(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "api_keys.txt").write_text("\n".join(KEYS) + "\n")


def how(reply: Response) -> str | None:
    assert reply.status == 200, reply.body
    return reply.headers.get("x-cache")


def stats(gateway: Gateway) -> dict[str, Any]:
    found: dict[str, Any] = gateway.get("/v1/cache/stats", key=ADMIN).json()
    return found


def call_of(body: dict[str, Any], route: str = "/v1/chat/completions", cache: Wish | None = None) -> Call:
    text = msgspec.json.encode(body)
    call = Call(
        route=ROUTES[route],
        key=Key(id="k"),
        caller="k",
        request_id="r",
        traceparent="",
        received_at=0.0,
        model=None,
        fields={},
        size=len(text),
    )
    read_fields(call, text)
    call.cache = cache
    return call
