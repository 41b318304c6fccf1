"""What only a real start shows of the configuration: the ports of two processes, a server's address, a reload."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.house import ADMIN, ROOT, free_port, running_gateway
from tests.real.herd import ask, herd
from tests.real.llama import running_llama

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


def test_a_models_file_that_gives_away_the_health_servers_port_is_told(tmp_path: Path) -> None:
    port = free_port()
    file = tmp_path / "config.yaml"
    file.write_text(f"api: {{port: {port}}}\nmodels: {{m: {{url: 'http://127.0.0.1:1'}}}}\n")
    environment = {"PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path), "HOST": "127.0.0.1", "PORT_HEALTH": str(port)}
    done = subprocess.run(
        [str(ROOT / "entrypoint.sh")], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("corral: ")]
    assert done.returncode == 1
    assert line.startswith(f"corral: {file}: api.port={port}: must differ from PORT_HEALTH")


def test_the_address_that_OpenAIs_clients_are_given_serves(tmp_path: Path, chat_model: Path) -> None:
    with running_llama(chat_model) as llama:
        url = f"http://127.0.0.1:{llama.port}/v1/"
        with running_gateway(tmp_path / "one", LLAMA_URL=url) as gateway:
            assert gateway.chat().status == 200
            assert "LLAMA_URL ends in /v1" in gateway.stderr
        with herd(tmp_path / "many", {"far": {"url": url}}) as gateway:
            assert ask(gateway, "far").status == 200


def test_a_reload_brings_an_edited_template_into_force(tmp_path: Path, chat_model: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    models = {"m": {"model_path": str(chat_model), "chat_template_file": str(template)}}

    def reload() -> list[str]:
        return list(gateway.request("POST", "/reload", {}, key=ADMIN).json()["models"]["changed"])

    def prompt() -> str:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        return str(gateway.request("POST", "/apply-template", body).json()["prompt"])

    with herd(tmp_path / "run", models) as gateway:
        assert prompt() == "hi" and reload() == []
        template.write_text("edited: {{ messages[0].content }}")
        assert reload() == ["m"]
        assert prompt() == "edited: hi"
