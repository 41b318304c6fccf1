"""Where a model may come from: a llama-server that someone else runs, and an address to fetch a file from."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.house import Gateway, eventually, free_port, llama_server, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]

FOREIGN_KEY = "foreign-key-0123456789"


@contextlib.contextmanager
def foreign_server(model: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A llama-server that is not the gateway's child."""
    environment = {"PATH": os.environ["PATH"], "LLAMA_API_KEY": FOREIGN_KEY}
    command = [
        str(llama_server()),
        "-m",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-c",
        "4096",
        "-np",
        "3",
    ]
    process = subprocess.Popen(
        [*command, "-t", "1"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class TestLlamaUrl:
    @pytest.fixture
    def variables(self, tmp_path: Path) -> dict[str, str]:
        keyfile = tmp_path / "llama.key"
        keyfile.write_text(f"{FOREIGN_KEY}\n")
        return {"LLAMA_URL": f"http://127.0.0.1:{free_port()}", "LLAMA_API_KEY_FILE": str(keyfile)}

    def port(self, variables: dict[str, str]) -> int:
        return int(variables["LLAMA_URL"].rpartition(":")[2])

    def test_it_serves_and_nothing_is_spawned(
        self, tmp_path: Path, chat_model: Path, variables: dict[str, str]
    ) -> None:
        with (
            foreign_server(chat_model, self.port(variables)) as foreign,
            running_gateway(tmp_path / "run", variables) as gateway,
        ):
            assert gateway.chat().status == 200
            assert [row["id"] for row in gateway.get("/v1/models").json()["data"]] == ["default"]
            assert gateway.get("/v1/models/default").json()["meta"] | {"aliases": []} == {
                "task": None,
                "slots": 3,
                "n_ctx": 1536,
                "aliases": [],
            }
            assert children(gateway) == []
            assert gateway.stop() == 0
            assert foreign.poll() is None, "it is not ours to stop"

    def test_it_may_come_later_go_away_and_come_back(
        self, tmp_path: Path, chat_model: Path, variables: dict[str, str]
    ) -> None:
        port = self.port(variables)
        with running_gateway(tmp_path / "run", variables, ready=False, MODEL_NAME="mine") as gateway:
            eventually(lambda: gateway.get("/readyz", key=None).body == b"loading")
            waited = gateway.chat(headers={"X-Request-Timeout": "0.5"})
            assert (waited.status, waited.json()["error"]["code"]) == (503, "model_loading")
            with foreign_server(chat_model, port):
                gateway.wait_ready()
                assert gateway.chat().status == 200
            gone = gateway.chat(headers={"X-Request-Timeout": "1"})
            assert (gone.status, gone.json()["error"]["code"]) == (503, "model_loading")
            eventually(lambda: gateway.get("/readyz", key=None).status == 503)
            with foreign_server(chat_model, port):
                gateway.wait_ready()
                assert gateway.chat().status == 200


class TestModelUrl:
    @contextlib.contextmanager
    def site(self, folder: Path) -> Iterator[str]:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_address[1]}"
            server.shutdown()

    def test_it_is_fetched_checked_served_and_kept(self, tmp_path: Path, chat_model: Path) -> None:
        checksum = hashlib.sha256(chat_model.read_bytes()).hexdigest()
        with self.site(chat_model.parent) as url:
            variables = {"MODEL_URL": f"{url}/{chat_model.name}", "MODEL_SHA256": checksum}
            with running_gateway(tmp_path, variables) as gateway:
                assert gateway.chat().json()["model"] == "tiny"
                assert (gateway.data_dir / "models" / chat_model.name).read_bytes() == chat_model.read_bytes()
        with running_gateway(tmp_path, variables) as gateway:  # the site is gone
            assert gateway.chat().status == 200

    def test_a_wrong_checksum_fails_with_the_reason(self, tmp_path: Path, chat_model: Path) -> None:
        with (
            self.site(chat_model.parent) as url,
            running_gateway(
                tmp_path, ready=False, MODEL_URL=f"{url}/{chat_model.name}", MODEL_SHA256="0" * 64
            ) as gateway,
        ):
            health = eventually(
                lambda: (reply := gateway.get("/health", key=None).json())["state"] == "failed" and reply
            )
            assert "sha" in health["detail"].lower() or "checksum" in health["detail"].lower()


def children(gateway: Gateway) -> list[str]:
    command = ["pgrep", "-P", str(gateway.process.pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
