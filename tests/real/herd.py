"""A gateway with several models, and what can be seen of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.make_model import Shape, make_model
from tests.house import ADMIN, Gateway, Response, eventually, running_gateway

CHAT = "/v1/chat/completions"
SMALL = {"CTX": "512", "PARALLEL": "2", "MAX_REQUESTS_PER_MINUTE": "0", "VRAM_MARGIN_MB": "0"}


def make_models(folder: Path, count: int) -> list[str]:
    """Of different sizes and seeds: each answers with other words. Their ids."""
    for number in range(count):
        make_model(folder / f"m{number}.gguf", seed=100 + number, shape=Shape(layers=2 + number % 4))
    return [f"m{number}" for number in range(count)]


@contextlib.contextmanager
def herd(
    folder: Path, models: Path | dict[str, Any], system: dict[str, Any] | None = None, **more: str
) -> Iterator[Gateway]:
    """`models` is a folder, or the `models` of a models file."""
    variables = SMALL | more
    if isinstance(models, Path):
        variables["MODELS_DIR"] = str(models)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        variables["CONFIG_PATH"] = str(folder / "models.json")
        write_models(folder, models, system)
    with running_gateway(folder, variables) as running:
        yield running


def write_models(folder: Path, models: dict[str, Any], system: dict[str, Any] | None = None) -> None:
    (folder / "models.json").write_text(json.dumps({"system": system or {}, "models": models}))


def ask(gateway: Gateway, model: str, **fields: Any) -> Response:
    return gateway.chat(model=model, temperature=0, **fields)


def text_of(reply: Response) -> str:
    return str(reply.json()["choices"][0]["message"]["content"])


def rows(gateway: Gateway) -> dict[str, dict[str, Any]]:
    return {row["model_id"]: row for row in gateway.get("/status", key=ADMIN).json()["instances"]}


def states(gateway: Gateway) -> dict[str, str]:
    return {name: row["state"] for name, row in rows(gateway).items()}


def loads(gateway: Gateway) -> int:
    return int(gateway.get("/status", key=ADMIN).json()["loads_total"])


def need_mb(gateway: Gateway, model: str) -> int:
    return int(gateway.request("POST", "/v1/plan", {"model": model}, key=ADMIN).json()["need_mb"])


def children(gateway: Gateway) -> set[int]:
    """The processes that the gateway has now."""
    found: set[int] = set()
    for thread in Path(f"/proc/{gateway.process.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in (thread / "children").read_text().split()}
    return found


def until(gateway: Gateway, model: str, *wanted: str, seconds: float = 10) -> dict[str, Any]:
    def look() -> dict[str, Any] | bool:
        row = rows(gateway).get(model)
        return row if row is not None and row["state"] in wanted else False

    return eventually(look, seconds)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stage:
    """A program that stands where llama-server should: it notes how it is started, and becomes the real one."""

    path: Path
    log: Path

    def starts(self, model: str, *, glances: bool = False) -> int:
        """How often the model was started; or how often llama-server was only asked what it would need."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return sum(f"--alias {model} " in f"{line} " and line.endswith("--port 0") is glances for line in lines)


def stage(folder: Path, server: Path, prologue: str = "") -> Stage:
    """`prologue` is shell; it sees the model's id as $model, and $glance is set for a start that loads nothing."""
    made = Stage(folder / "staged-server", folder / "starts")
    made.path.write_text(
        f"""#!/bin/sh
echo "$*" >> {made.log}
model=$(echo "$*" | sed -n 's/.*--alias \\([^ ]*\\).*/\\1/p')
case "$*" in *"--port 0") glance=1;; *) glance=;; esac
{prologue}
exec {server} "$@"
"""
    )
    made.path.chmod(0o755)
    return made
