"""A port that was free when it was chosen, and that a stranger listens on before our llama-server does."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, eventually, llama_server, running_gateway
from tests.real.herd import stage
from tests.real.llama import running_llama

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


class _AllIsWell(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def website(host: str, port: int) -> Iterator[None]:
    """It says 200 to every GET."""
    with http.server.ThreadingHTTPServer((host, port), _AllIsWell) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


Stranger = Callable[[Path, int], AbstractContextManager[object]]
STRANGERS: dict[str, Stranger] = {
    "with a key of its own": lambda model, port: running_llama(model, "--api-key", "of-somebody-else", port=port),
    "without a key": lambda model, port: running_llama(model, port=port),
    "a website": lambda _, port: website("127.0.0.1", port),
    "a website on all addresses": lambda _, port: website("0.0.0.0", port),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_on_the_port_is_not_taken_for_ours(tmp_path: Path, chat_model: Path, stranger: str) -> None:
    """It is well, as it tells everybody, and it may even share the port."""
    gate = tmp_path / "gate"
    closed = f'while [ -z "$glance" ] && [ ! -e {gate} ]; do sleep 0.02; done'
    staged = stage(tmp_path, llama_server(), closed)
    variables = {"MODEL_PATH": str(chat_model), "LLAMA_SERVER_PATH": str(staged.path)}
    with running_gateway(tmp_path / "gateway", variables, ready=False) as gateway:
        port = eventually(lambda: gateway.model()["state"] == "loading" and int(gateway.model()["port"]))
        with STRANGERS[stranger](chat_model, port):
            reason = f"another program answers at http://127.0.0.1:{port}, where this llama-server should"
            eventually(lambda: reason.encode() in gateway.get("/v1/models/status", key=ADMIN).body)
            gate.touch()
            gateway.wait_ready()
            assert gateway.model()["port"] != port and gateway.chat().status == 200


@pytest.mark.parametrize("way", ["exec env", "env"])
def test_a_server_that_knows_no_keys_is_ours_all_the_same(tmp_path: Path, chat_model: Path, way: str) -> None:
    """Some build, or a wrapper, may not check them: whose process listens is what counts then."""
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n{way} -u LLAMA_API_KEY {install(tmp_path)} "$@"\n')
    wrapper.chmod(0o755)
    with running_gateway(tmp_path / "gateway", MODEL_PATH=str(chat_model), LLAMA_SERVER_PATH=str(wrapper)) as gateway:
        assert gateway.chat().status == 200
    assert "another program" not in gateway.stderr
