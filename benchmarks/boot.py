"""How soon Corral is there: from entrypoint.sh to the first answered /ping, and to the start of llama-server."""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path

from benchmarks.contenders import ROOT
from benchmarks.environments import compiled
from benchmarks.processes import BenchError, Command, ask, free_port, running, wait_until
from scripts.make_model import make_model

_STARTED = re.compile(r"stand-in started at (\d+\.\d+)")  # CLOCK_MONOTONIC, which all processes share


def measured(folder: Path, times: int) -> dict[str, float]:
    """Medians of a few starts with warm file caches; the stand-in takes llama-server's place. Raises BenchError."""
    folder.mkdir(parents=True)
    model = folder / "model.gguf"
    make_model(model)
    starts = [_start(folder / str(number), model) for number in range(times)]
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}


def _start(folder: Path, model: Path) -> dict[str, float]:
    health = free_port()
    variables = {
        "DATA_DIR": str(folder / "data"),
        "MODEL_PATH": str(model),
        "LLAMA_SERVER_PATH": str(compiled("upstream")),
        "API_KEY": "sk-bench-0123456789abcdefghijABCDEFGHIJ",
        "NGL": "0",
        "CTX": "4096",
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "PORT_HEALTH": str(health),
        "PORT_BACKEND": str(free_port()),
    }
    begun = time.monotonic()
    with running(Command([str(ROOT / "entrypoint.sh")], variables), folder) as process:
        wait_until(lambda: ask(health, "/ping") > 0, process, "the first /ping")
        answered = time.monotonic()
        wait_until(lambda: ask(health, "/ping") == 200, process, "the model")
        ready = time.monotonic()
    spawned = _spawned(folder)  # the log is complete when Corral has ended
    return {
        "boot_ping_ms": (answered - begun) * 1000,
        "boot_spawn_ms": (spawned - begun) * 1000,
        "boot_ready_ms": (ready - begun) * 1000,
    }


def _spawned(folder: Path) -> float:
    for log in (folder / "data" / "logs").rglob("*_server_*.log"):
        if found := _STARTED.search(log.read_text(errors="replace")):
            return float(found[1])
    raise BenchError("no log of llama-server tells when it started")
