"""From the entrypoint's start: health first, llama-server early, states that can be believed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from scripts.make_model import Shape, make_model
from tests.house import ROOT, Gateway, alive, eventually, free_port, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


def ping(gateway: Gateway, port: int | None = None) -> int:
    port = port or int(gateway.environment["PORT_HEALTH"])
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_204_until_the_model_answers_then_200(tmp_path: Path) -> None:
    model = tmp_path / "large.gguf"
    make_model(model, shape=Shape(layers=8, embd=1024, heads=8, kv_heads=8))  # takes a moment to load
    with running_gateway(tmp_path / "run", entrypoint=True, ready=False, MODEL_PATH=str(model)) as gateway:
        seen: list[int] = []

        def look() -> bool:
            seen.append(ping(gateway))
            return seen[-1] == 200

        eventually(look, 30)
        assert set(seen) == {204, 200}
        assert gateway.get("/readyz", key=None).status == 200
        assert gateway.chat().status == 200
        assert "Corral is ready: " in gateway.stdout


def test_a_reload_that_is_asked_for_during_the_start_is_no_end(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, ready=False, MODEL_PATH=str(chat_model)) as gateway:
        eventually(lambda: "tiny" in gateway.stderr)  # llama-server is being started, and nobody listens yet
        gateway.process.send_signal(signal.SIGHUP)
        gateway.wait_ready()
        assert gateway.chat().status == 200


def test_503_when_the_gateway_is_stopped_and_200_when_it_goes_on(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, entrypoint=True, MODEL_PATH=str(chat_model)) as gateway:
        eventually(lambda: ping(gateway) == 200)
        os.kill(gateway.process.pid, signal.SIGSTOP)
        begun = time.monotonic()
        try:
            eventually(lambda: ping(gateway) == 503, 15)
            assert time.monotonic() - begun < 12
        finally:
            os.kill(gateway.process.pid, signal.SIGCONT)
        eventually(lambda: ping(gateway) == 200, 3)


def test_the_health_port_may_be_the_gateways_own(tmp_path: Path, chat_model: Path) -> None:
    port = free_port()
    with running_gateway(
        tmp_path, entrypoint=True, MODEL_PATH=str(chat_model), PORT=str(port), PORT_HEALTH=str(port)
    ) as gateway:
        assert ping(gateway, port) == 200
        assert len(children(gateway.process.pid)) == 1, "no health server"


@pytest.mark.parametrize(
    ("host", "told", "reached"),
    [("::", "127.0.0.1", ("127.0.0.1", "[::1]")), ("::1", "[::1]", ("[::1]",))],
)
def test_the_ready_line_tells_an_address_that_is_listened_on(
    host: str, told: str, reached: tuple[str, ...], tmp_path: Path, chat_model: Path
) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), HOST=host, ready=False) as gateway:
        line = f"Corral is ready: http://{told}:{gateway.port}/v1 serves tiny\n"
        eventually(lambda: gateway.stdout == line)
        for address in reached:
            with urllib.request.urlopen(f"http://{address}:{gateway.port}/ping", timeout=2) as reply:
                assert reply.status == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_loop_listens_ends_it_too(number: signal.Signals) -> None:
    probe = (
        "import os, sys, gateway.cli, gateway.cli.serve as serve\n"
        f"serve.run = lambda: os.kill(os.getpid(), {number})\n"
        "sys.argv[1:] = ['serve']\n"
        "gateway.cli.main()\n"
        "sys.exit('it went on')"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_draining_and_the_end(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, entrypoint=True, MODEL_PATH=str(chat_model)) as gateway:
        eventually(lambda: ping(gateway) == 200)
        family = children(gateway.process.pid)
        assert len(family) == 2, "llama-server and the health server"
        assert gateway.stop() == 0
        eventually(lambda: not any(alive(pid) for pid in family), 2)


def test_llama_server_is_spawned_before_the_slow_imports(tmp_path: Path, chat_model: Path) -> None:
    """The order that makes it early; how early is measured by scripts/bench, not by a test."""
    probe = (
        "import sys, gateway.cli, gateway.cli.serve\n"
        "slow = {'aiohttp', 'yarl', 'redis', 'nats', 'yaml', 'passlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported before the spawn: {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]
