"""A port that was free when it was chosen, and that a stranger listens on before our llama-server does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house import ADMIN, eventually, llama_server, running_gateway
from tests.real.herd import stage
from tests.real.llama import running_llama

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


def test_a_stranger_on_the_port_is_not_taken_for_ours(tmp_path: Path, chat_model: Path) -> None:
    """It is well, as it tells everybody, and it would even share the port; but it does not know this start's key."""
    gate = tmp_path / "gate"
    closed = f'while [ -z "$glance" ] && [ ! -e {gate} ]; do sleep 0.02; done'
    staged = stage(tmp_path, llama_server(), closed)
    variables = {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(staged.path)}
    with running_gateway(tmp_path / "gateway", variables, ready=False) as gateway:
        port = eventually(lambda: gateway.model()["state"] == "loading" and int(gateway.model()["port"]))
        with running_llama(chat_model, "--api-key", "of-somebody-else", port=port):
            reason = f"another program answers at http://127.0.0.1:{port}, where this llama-server should"
            eventually(lambda: reason.encode() in gateway.get("/v1/models/status", key=ADMIN).body)
            gate.touch()
            gateway.wait_ready()
            assert gateway.model()["port"] != port and gateway.chat().status == 200
