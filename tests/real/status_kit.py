"""A gateway before a folder of small models: two that chat, one with a name that a URL must quote, one that embeds, one
that cannot be loaded; a key that may use two of them alone; and the stream of their states."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.make_model import make_model
from tests.house import ADMIN, USER, Gateway, eventually, running_gateway

MODELS = ("a", "b", "broken", "c d", "embed")
COMMANDS = ("/v1/models/load", "/v1/models/eject", "/v1/models/a/reset", "/v1/plan")
LIMITED = "sk-limited-0123456789abcdefghijABCDEF"


@contextlib.contextmanager
def running_herd(folder: Path, chat: Path, embedding: Path, **variables: str) -> Iterator[Gateway]:
    """Nothing is loaded at its start. `chat` and `embedding` are the models that are copied."""
    models = folder / "models"
    models.mkdir(parents=True)
    for name in ("a", "c d"):
        shutil.copy(chat, models / f"{name}.gguf")
    make_model(models / "b.gguf", seed=7)
    shutil.copy(embedding, models / "embed.gguf")
    (models / "broken.gguf").write_bytes(b"GGUF, but no more than that")
    keys = folder / "api_keys.txt"
    keys.write_text(f"admin:{ADMIN} scope=infer,admin\nuser:{USER}\nlimited:{LIMITED} models=b*\n")
    keys.chmod(0o600)
    with running_gateway(folder, variables, MODELS_DIR=str(models), CTX="1024", PARALLEL="2") as gateway:
        yield gateway


def make_cold(herd: Gateway) -> Gateway:
    """With no model loaded, and none that has failed."""
    for name in MODELS:
        assert command(herd, "eject", name)["status"] in ("off", "failed")
        herd.request("POST", f"/v1/models/{name.replace(' ', '%20')}/reset", key=ADMIN)
    return herd


def command(gateway: Gateway, what: str, name: str, **more: Any) -> Any:
    reply = gateway.request("POST", f"/v1/models/{what}", {"model": name} | more, key=ADMIN)
    assert reply.status == (202 if what == "load" else 200), reply.body
    return reply.json()


def state(gateway: Gateway, name: str) -> str:
    status: str = gateway.get(f"/v1/models/{name}/status").json()["status"]
    return status


def load(gateway: Gateway, name: str) -> None:
    command(gateway, "load", name)
    eventually(lambda: state(gateway, name) == "ready")


@dataclass
class Events:
    """An open stream of states."""

    reply: http.client.HTTPResponse

    def next(self) -> tuple[str, Any]:
        """(name, data); ("", None) at a clean end."""
        lines: list[str] = []
        while line := self.reply.readline().decode().rstrip("\n"):
            lines.append(line)
        if not lines:
            return "", None
        name, data = lines
        assert name.startswith("event: ") and data.startswith("data: "), lines
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def until(self, **wanted: Any) -> list[dict[str, Any]]:
        """The updates of all models up to the first with these fields."""
        seen: list[dict[str, Any]] = []
        while True:
            name, data = self.next()
            assert name, "the stream has ended"
            if name == "model_update":
                seen.append(data)
                if wanted.items() <= data.items():
                    return seen


@contextlib.contextmanager
def watching(gateway: Gateway, key: str = USER) -> Iterator[Events]:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=8)
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models/status/stream", headers={"Authorization": f"Bearer {key}"})
        reply = connection.getresponse()
        assert (reply.status, reply.headers["Content-Type"]) == (200, "text/event-stream")
        yield Events(reply)
