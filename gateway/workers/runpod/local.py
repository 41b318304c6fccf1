"""RunPod's worker tried on any machine: one job from the command line, or the SDK's own test API."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from gateway.errors import ConfigError
from gateway.runtime import Runtime
from gateway.workers.runpod.handler import Handler, Job
from gateway.workers.runpod.worker import load_sdk


async def outputs_of(runtime: Runtime, job: Job) -> tuple[list[Any], str | None]:
    """All outputs of one job, and its error."""
    outputs: list[Any] = []
    async for output in Handler(runtime).handle(job):
        if isinstance(output, dict) and isinstance(output.get("error"), str):
            return outputs, output["error"]
        outputs.append(output)
    return outputs, None


async def serve_api(runtime: Runtime, host: str, port: int, stop: asyncio.Event) -> None:
    """The SDK's test API (`/run`, `/runsync`, `/stream/{id}`, `/status/{id}`) until `stop`. Raises ConfigError."""
    server = await asyncio.to_thread(_make_server, runtime, host, port)
    serving = asyncio.create_task(server.serve(), name="runpod test API")
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await serving
    finally:
        stopping.cancel()
        serving.cancel()


def _make_server(runtime: Runtime, host: str, port: int) -> Any:
    load_sdk()
    uvicorn = importlib.import_module("uvicorn")
    api = importlib.import_module("runpod.serverless.modules.rp_fastapi")

    class Server(uvicorn.Server):  # type: ignore[misc, name-defined]
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:  # signals are ours
            yield

        async def startup(self, sockets: Any = None) -> None:
            try:
                await super().startup(sockets)
            except SystemExit:  # what it does where it cannot listen
                raise ConfigError([f"--rp_api_host {host} --rp_api_port {port}: cannot listen there"]) from None

    app = api.WorkerAPI({"handler": Handler(runtime).handle}).rp_app
    return Server(uvicorn.Config(app, host=host, port=port, log_config=None, log_level="warning", access_log=False))
