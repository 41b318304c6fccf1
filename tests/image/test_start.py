"""How long a container takes until it can be used, beside a bare llama-server in the same image."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.house import eventually, free_port
from tests.image.conftest import Images
from tests.image.engine import RUN, Engine, model, running_container

pytestmark = [pytest.mark.image, pytest.mark.timeout(300), pytest.mark.xdist_group("image")]

ROUNDS = 3
BARE = ("-c", "16384", "-np", "4", "-ngl", "0", "--no-kv-unified", "--fit", "off", "--no-webui", "--jinja", "-t", "1")


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return int(reply.status) == 200
    except urllib.error.HTTPError as error:
        error.close()
        return False


def bare_seconds(engine: Engine, image: str, chat_model: Path, number: int) -> float:
    port, name = free_port(), f"bare-{os.getpid()}-{number}"
    arguments = ("-m", "/data/models/tiny.gguf", "--host", "127.0.0.1", "--port", str(port), *BARE)
    flags = ("--rm", "--name", name, "--health-interval", "disable", "--entrypoint", "/app/llama-server")
    command = engine.command("run", *RUN, *flags, *model(chat_model), image, *arguments)
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: ready(f"http://127.0.0.1:{port}/health"), 30)
        return time.monotonic() - begun
    finally:
        engine.succeeds("kill", name)
        process.wait(20)


def container_seconds(engine: Engine, image: str, folder: Path, chat_model: Path) -> float:
    begun = time.monotonic()
    with running_container(engine, image, folder, *model(chat_model), ready=False) as container:
        eventually(lambda: ready(f"http://127.0.0.1:{container.port_health}/ping"), 30)
        seconds = time.monotonic() - begun
        assert container.chat().status == 200
        return seconds


def test_ready_hardly_later_than_a_bare_llama_server(
    engine: Engine, images: Images, tmp_path: Path, chat_model: Path
) -> None:
    """0.6 s is what is promised and seen on an idle machine; the bound leaves room for whoever else is at work here."""
    bare, ours = [], []
    for number in range(ROUNDS):
        bare.append(bare_seconds(engine, images.cpu, chat_model, number))
        ours.append(container_seconds(engine, images.cpu, tmp_path / str(number), chat_model))
    sys.stdout.write(f"seconds to ready: llama-server alone {min(bare):.2f}, Corral {min(ours):.2f}\n")
    assert min(ours) - min(bare) < 1.5
