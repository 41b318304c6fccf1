"""`corral serve`: open the house, say when it is ready, close it on a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import resource
import sys
from collections.abc import AsyncIterator, Callable, Coroutine

import uvloop

from gateway import garbage
from gateway.cli.config import load_configuration
from gateway.cli.signals import Signals, ignore_hangups
from gateway.environment import instance_name, secrets_in_force
from gateway.errors import ConfigError
from gateway.logs import LogWriter, log_folder, logging_to
from gateway.runtime import Runtime, open_runtime
from gateway.settings import Settings
from gateway.state import ServiceState

log = logging.getLogger("corral.serve")

SWITCH_SECONDS = 0.001  # the loop gets the interpreter back from other threads so soon; Python's own 5 ms are felt


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="run the gateway",
        description="Run the gateway alone. Everything is set by environment variables; see README.md.",
        epilog="example:\n  MODEL_NAME=qwen.gguf DATA_DIR=/srv/corral corral serve",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda _: run())


def run() -> int:
    return run_house(_serve)


def run_house(live: Callable[[Settings, LogWriter], Coroutine[object, object, int | None]]) -> int:
    """Settings, logs and a loop for `live`; its exit code. What is wrong with the configuration is told on stderr."""
    ignore_hangups()
    try:
        settings = load_configuration()
    except ConfigError as error:
        return _refuse(error)
    allow_many_connections()
    sys.setswitchinterval(SWITCH_SECONDS)
    folder = log_folder(settings.data_dir, settings.log_name, settings.worker_type)
    with logging_to(
        folder,
        instance_name(),
        level=settings.log_level,
        as_json=settings.log_format == "json",
        secrets=secrets_in_force(settings),
    ) as writer:
        for warning in settings.warnings:
            log.warning("%s", warning)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(live(settings, writer)) or 0
        except ConfigError as error:
            return _refuse(error)


def allow_many_connections() -> None:
    """Every client costs two descriptors; shells and containers often allow 1,024 softly and far more if asked."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(settings: Settings, writer: LogWriter) -> None:
    signals = Signals()
    async with open_runtime(settings, writer, load_configuration) as runtime:
        from gateway.app import listening  # while llama-server loads: importing aiohttp takes longer than all before

        async with listening(runtime), _jobs_of_nats(runtime):
            signals.reload_on_hangup(runtime)
            host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
            host = f"[{host}]" if ":" in host else host
            announce_when_ready(
                runtime, f"listening on {settings.host}:{settings.port}", f"http://{host}:{settings.port}/v1 serves"
            )
            runtime.accept()
            garbage.keep_what_stands()
            await signals.stop.wait()
            await runtime.drain(signals.hurry)
        signals.kill_when_hurried(runtime)


@contextlib.asynccontextmanager
async def _jobs_of_nats(runtime: Runtime) -> AsyncIterator[None]:
    """Where NATS_URL is set; what it needs is imported in a thread, so that HTTP does not wait for it."""
    if runtime.settings.nats_url is None:
        yield
        return
    nats = await asyncio.to_thread(importlib.import_module, "gateway.workers.nats.worker")
    async with nats.taking_jobs(runtime):
        yield


def announce_when_ready(runtime: Runtime, event: str, what: str) -> None:
    """One stable line on stdout at the first readiness, `what` and the models; platforms wait for it."""
    said = False

    def changed(_: str | None) -> None:
        nonlocal said
        if said or runtime.board.status is not ServiceState.READY:
            return
        said = True
        names = ", ".join(runtime.manager.registry.specs)
        runtime.events.emit("server.ready", event)
        try:
            print(f"Corral is ready: {what} {names}", flush=True)
        except OSError:
            log.warning("stdout is closed; nobody saw the ready line")

    runtime.board.listen(changed)


def _refuse(error: ConfigError) -> int:
    for problem in error.problems:
        print(f"corral: {problem}", file=sys.stderr)
    return 1
