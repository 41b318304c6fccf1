"""A container as an operator runs it: started, asked, looked into, stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.house import USER, alive, eventually
from tests.image.conftest import Images
from tests.image.engine import RUN, Container, Engine, bind, model, running_container

pytestmark = [pytest.mark.image, pytest.mark.timeout(300), pytest.mark.xdist_group("image")]

IMAGE_USER = 10001
GENERATE = ("corral", "keys", "generate", "--name", "ada", "--quiet")


def volume(path: Path, owner: int = IMAGE_USER) -> Path:
    path.mkdir()
    os.chown(path, owner, owner)
    return path


def logs(data: Path) -> dict[str, str]:
    """Text by folder and kind."""
    found = {f"{path.parent.name}/{path.name.split('_')[2]}": path.read_text() for path in data.glob("logs/*/*.log")}
    assert all((data / "logs" / folder / "latest.txt").exists() for folder in ("_boot", "llama"))
    return found


def test_it_starts_answers_and_is_healthy(container: Container) -> None:
    assert container.ping() == 200
    answer = container.chat("hello").json()
    assert answer["usage"]["completion_tokens"] == 8
    assert container.chat("hello", key="sk-wrong-0123456789abcdef").status == 401
    assert container.at(container.port_health).get("/health", key=None).json()["status"] == "ready"
    container.engine.podman("healthcheck", "run", container.name)
    state = json.loads(container.engine.podman("inspect", container.name))[0]["State"]
    assert state["Health"]["Status"] == "healthy"
    eventually(lambda: "Corral is ready: " in container.stdout)


def test_its_processes_and_who_they_are(container: Container) -> None:
    assert container.execute("cat", "/proc/1/comm") == "tini\n"
    names = sorted(container.processes().values())
    assert names == ["llama-server", "python", "python", "sh", "tini"], "sh is llama-server's guard"
    assert container.execute("id").startswith(f"uid={IMAGE_USER}(corral) gid={IMAGE_USER}(corral)")
    capabilities = container.execute("grep", "CapEff", "/proc/1/status")
    assert int(capabilities.split()[1], 16) == 0


def test_the_command_line_inside(container: Container) -> None:
    assert "corral keys" in container.execute("corral", "keys", "--help")
    assert container.execute("corral", "--version").startswith("corral ")


def test_stopped_it_leaves_nothing_but_the_volume(
    engine: Engine, images: Images, tmp_path: Path, chat_model: Path
) -> None:
    """A key from the command line, an answer by it, a clean end, the logs."""
    data = volume(tmp_path / "data")
    key = engine.podman("run", *RUN, "--rm", *bind(data, "/data"), images.cpu, *GENERATE).strip()
    flags = (*bind(data, "/data"), *model(chat_model))
    with running_container(engine, images.cpu, tmp_path / "run", *flags, variables={"API_KEY": ""}) as container:
        assert container.chat("hello", key=key).status == 200
        assert container.chat("hello", key=USER).status == 401
        family = container.processes()
        assert container.end() == 0
        assert not any(map(alive, family))
    found = logs(data)
    assert "boot: serve, data_dir=/data" in found["_boot/boot"]
    assert "server.ready" in found["llama/gateway"]
    assert "listening" in found["llama/server"]
    assert key not in "".join(found.values())
    assert (data / "api_keys.txt").stat().st_mode & 0o777 == 0o600
    assert {path.stat().st_uid for path in data.rglob("*") if "models" not in path.parts} == {IMAGE_USER}


def test_arguments_go_to_the_command_line(engine: Engine, images: Images) -> None:
    run = ("run", *RUN, "--rm", "--health-interval", "disable", images.cuda)
    assert engine.podman(*run, "--version") == engine.podman(*run, "corral", "--version")
    assert "usage: corral" in engine.podman(*run, "corral")
    assert not engine.succeeds(*run, "bash")


@pytest.mark.parametrize(
    ("mounted", "chosen"),
    [(["/workspace"], "/workspace"), (["/workspace", "/runpod-volume"], "/runpod-volume"), ([], "/data")],
    ids=["pod", "serverless", "plain"],
)
def test_the_platform_is_recognised_by_its_volume(
    engine: Engine, images: Images, tmp_path: Path, chat_model: Path, mounted: list[str], chosen: str
) -> None:
    """Although the image has a /data. And RunPod's one port: no health server, the gateway answers in its place."""
    variables = {"RUNPOD_POD_ID": "abc123", "PORT_HEALTH": "", "MODEL_PATH": "/models/tiny.gguf"} if mounted else {}
    flags = [part for path in mounted for part in bind(volume(tmp_path / path[1:]), path)]
    flags += bind(chat_model, variables.get("MODEL_PATH", "/data/models/tiny.gguf"), "ro")
    with running_container(engine, images.cpu, tmp_path / "run", *flags, variables=variables) as container:
        assert f"data_dir={chosen}" in container.stderr
        container.engine.podman("healthcheck", "run", container.name)
        gateways = [name for name in container.processes().values() if name == "python"]
        assert len(gateways) == (1 if mounted else 2), "with the health server"
        instance = container.execute("sh", "-c", f"ls {chosen}/logs/llama")
        assert ("abc123" in instance) is bool(mounted)
        assert container.end() == 0
    assert [path for path in mounted if (tmp_path / path[1:] / "logs").exists()] == [
        path for path in mounted if path == chosen
    ]


def test_read_only_without_capabilities_as_anyone(
    engine: Engine, images: Images, tmp_path: Path, chat_model: Path
) -> None:
    flags = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges")
    with running_container(
        engine, images.cuda, tmp_path, *flags, "--user", "12345:12345", *model(chat_model), variables={"NGL": "0"}
    ) as container:
        assert container.execute("id", "-u") == "12345\n"
        assert container.chat("hello").status == 200
        eventually(lambda: "server.ready" in container.execute("sh", "-c", "cat /data/logs/llama/*_gateway_*.log"))
        assert "warning" not in container.stderr.lower()
        assert container.end() == 0


def test_a_volume_of_roots_is_complained_of_and_borne(
    engine: Engine, images: Images, tmp_path: Path, chat_model: Path
) -> None:
    data = volume(tmp_path / "data", owner=0)
    (data / "models").mkdir()
    flags = (*bind(data, "/data"), *model(chat_model))
    with running_container(engine, images.cpu, tmp_path / "run", *flags) as container:
        assert container.chat("hello").status == 200
        assert "no boot log: /data/logs/_boot cannot be written" in container.stderr
        eventually(lambda: "server.ready" in container.stderr)
        assert container.end() == 0
    assert [path.name for path in data.iterdir()] == ["models"]
    said = engine.podman("run", *RUN, "--rm", *bind(data, "/data"), "--user", "0:0", images.cpu, *GENERATE)
    assert said.startswith("sk-ada-"), "root itself can write there"


def test_debug_shell_shows_the_environment_without_secrets_and_waits(
    engine: Engine, images: Images, tmp_path: Path
) -> None:
    variables = {"DEBUG_SHELL": "true", "MODEL_NAME": "some.gguf"}
    with running_container(engine, images.cpu, tmp_path, variables=variables, ready=False) as container:
        container.wait_ping(204)
        eventually(lambda: "holding the container" in container.stderr)
        assert container.execute("corral", "--version").startswith("corral ")
        assert container.end() == 0
        shown = container.stdout
    assert "MODEL_NAME=some.gguf" in shown
    assert "API_KEY=***" in shown and USER not in shown
