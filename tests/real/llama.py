"""A real llama-server alone: started on a free port, ended by its process id."""

from __future__ import annotations

import http.client
import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.house import eventually, free_port, llama_server


@dataclass(frozen=True)
class Llama:
    port: int

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=8)) as connection:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read()

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        return self.request("POST", path, body)


@contextmanager
def running_llama(model: Path, *arguments: str, port: int | None = None) -> Iterator[Llama]:
    """llama-server with the model and further arguments, ready, with two slots and the alias "demo"."""
    llama = Llama(port or free_port())
    command = [str(llama_server()), "-m", str(model), "--host", "127.0.0.1", "--port", str(llama.port)]
    command += ["-c", "8192", "-np", "2", "-t", "1", "--no-webui", "--fit", "off", "--jinja", "--alias", "demo"]
    log = model.parent / f"llama-{llama.port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def ready() -> bool:
        assert process.poll() is None, f"llama-server has ended:\n{log.read_text()[-2000:]}"
        return llama.request("GET", "/health")[0] == 200

    try:
        eventually(ready, 8)
        yield llama
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
