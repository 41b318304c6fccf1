"""`corral serve`: open the house, say when it is ready, close it on a signal."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import logging
import resource
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine

import uvloop

from gateway import garbage
from gateway.cli.config import load_configuration
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
    stop, hurry = asyncio.Event(), asyncio.Event()
    on_signals(stop, hurry)
    async with open_runtime(settings, writer, load_configuration) as runtime:
        from gateway.app import listening  # while llama-server loads: importing aiohttp takes longer than all before

        async with listening(runtime), _jobs_of_nats(runtime):
            reload_on_sighup(runtime)
            host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "") else settings.host
            host = f"[{host}]" if ":" in host else host
            announce_when_ready(
                runtime, f"listening on {settings.host}:{settings.port}", f"http://{host}:{settings.port}/v1 serves"
            )
            runtime.accept()
            garbage.keep_what_stands()
            await stop.wait()
            await runtime.drain(hurry)
        if hurry.is_set():
            runtime.manager.kill()


@contextlib.asynccontextmanager
async def _jobs_of_nats(runtime: Runtime) -> AsyncIterator[None]:
    """Where NATS_URL is set; what it needs is imported in a thread, so that HTTP does not wait for it."""
    if runtime.settings.nats_url is None:
        yield
        return
    nats = await asyncio.to_thread(importlib.import_module, "gateway.workers.nats.worker")
    async with nats.taking_jobs(runtime):
        yield


def on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first SIGTERM or SIGINT drains, a second one ends it at once."""

    def received() -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, received)


def reload_on_sighup(runtime: Runtime) -> None:
    running: set[asyncio.Task[object]] = set()

    def reload() -> None:
        task: asyncio.Task[object] = asyncio.create_task(runtime.reload(), name="reload")
        running.add(task)
        task.add_done_callback(running.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)


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
