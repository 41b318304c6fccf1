"""`corral worker nats`: jobs of a JetStream work queue, and no HTTP."""

from __future__ import annotations

import argparse
import asyncio
import importlib

from gateway import garbage
from gateway.cli.config import load_configuration
from gateway.cli.serve import announce_when_ready, run_house
from gateway.cli.signals import Signals
from gateway.errors import ConfigError
from gateway.logs import LogWriter
from gateway.runtime import open_runtime
from gateway.settings import Settings
from gateway.state import ServiceState

_EPILOG = """\
examples:
  NATS_URL=nats://127.0.0.1:4222 MODEL_NAME=qwen.gguf corral worker nats
  NATS_URL=nats://a:4222,nats://b:4222 NATS_CREDS_FILE=worker.creds NATS_KEY_ID=batch corral worker nats

`corral serve` takes jobs as well where NATS_URL is set. docs/NATS.md tells how to send them."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "nats",
        help="take jobs from NATS JetStream",
        description="Take jobs from the JetStream stream INFERENCE, for each model as many as it has places.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda _: run_house(_work))


async def _work(settings: Settings, writer: LogWriter) -> None:
    if settings.nats_url is None:
        raise ConfigError(["NATS_URL is not set: a NATS worker needs it, such as nats://127.0.0.1:4222"])
    signals = Signals()
    async with open_runtime(settings, writer, load_configuration) as runtime:
        # while llama-server loads: nats-py takes longer than all before
        nats = await asyncio.to_thread(importlib.import_module, "gateway.workers.nats.worker")
        async with nats.taking_jobs(runtime):
            signals.reload_on_hangup(runtime)
            announce_when_ready(runtime, "taking jobs from NATS", "takes jobs from NATS for")
            runtime.board.set_service(ServiceState.LOADING, "loading")
            runtime.board.refresh()
            garbage.keep_what_stands()
            await signals.stop.wait()
            await runtime.drain(signals.hurry)
        signals.kill_when_hurried(runtime)
