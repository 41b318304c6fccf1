"""`corral worker runpod`: the house with RunPod's queue as its only door, or with a local stand-in for that."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway import garbage
from gateway.errors import ConfigError

if TYPE_CHECKING:
    from gateway.logs import LogWriter
    from gateway.runtime import Runtime
    from gateway.settings import Settings

TEST_FILE = Path("test_input.json")  # the SDK's own name for it
_NOT_HERE = (
    "RUNPOD_WEBHOOK_GET_JOB is not set: this is no worker of a queue-based RunPod endpoint; "
    "to try it here: corral worker runpod --rp_serve_api"
)
_EPILOG = """\
examples:
  corral worker runpod                                  on RunPod: takes jobs from the endpoint's queue
  corral worker runpod --rp_serve_api --rp_api_port 9000   anywhere: the SDK's test API, see http://localhost:9000/docs
  corral worker runpod --test_input '{"input": {"prompt": "Hello!", "params": {"max_tokens": 8}}}'

The forms of a job, and all settings of an endpoint: docs/RUNPOD.md."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "runpod",
        help="take jobs from RunPod's queue",
        description="Take jobs from the queue of a RunPod endpoint. Settings are those of `corral serve`.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rp_serve_api", action="store_true", help="serve the SDK's test API instead")
    parser.add_argument("--rp_api_host", default="localhost", metavar="HOST", help="where; default localhost")
    parser.add_argument("--rp_api_port", default=8000, type=_port, metavar="PORT", help="default 8000")
    parser.add_argument("--test_input", type=_job, metavar="JOB", help="run this one job, JSON, and print its outputs")
    parser.set_defaults(run=_run)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to 65535, not '{text}'")
    return int(text)


def _job(text: str) -> dict[str, Any]:
    try:
        job = json.loads(text)
    except (ValueError, RecursionError):
        job = None
    if not isinstance(job, dict) or "input" not in job:
        raise argparse.ArgumentTypeError("""must be a job, such as '{"input": {"prompt": "Hello!"}}'""")
    return job


def _run(args: argparse.Namespace) -> int:
    from gateway.cli.serve import run_house

    return run_house(lambda settings, writer: _live(args, settings, writer))


async def _live(args: argparse.Namespace, settings: Settings, writer: LogWriter) -> int:
    from gateway.cli.config import load_configuration
    from gateway.cli.signals import Signals
    from gateway.runtime import open_runtime
    from gateway.state import ServiceState

    job = args.test_input or _job_in_file(args)
    if job is None:
        _check_place(args)
    signals = Signals()
    async with open_runtime(settings, writer, load_configuration) as runtime:
        signals.reload_on_hangup(runtime)
        runtime.board.set_service(ServiceState.LOADING, "loading")
        runtime.board.refresh()
        if job is not None:
            code = await _one_job(runtime, job, signals.stop)
        elif args.rp_serve_api:
            from gateway.workers.runpod.local import serve_api

            await serve_api(runtime, args.rp_api_host, args.rp_api_port, signals.stop)
            await runtime.drain(signals.hurry)
            code = 0
        else:
            from gateway.workers.runpod.worker import take_jobs

            garbage.keep_what_stands()
            code = await take_jobs(runtime, signals.stop, signals.hurry)
        signals.kill_when_hurried(runtime)
    return code


def _job_in_file(args: argparse.Namespace) -> dict[str, Any] | None:
    """Raises ConfigError."""
    if args.rp_serve_api or _on_queue() or not TEST_FILE.is_file():
        return None
    try:
        return _job(TEST_FILE.read_text())
    except (OSError, UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise ConfigError([f"{TEST_FILE}: {error}"]) from None


def _check_place(args: argparse.Namespace) -> None:
    """Before anything is started. Raises ConfigError."""
    if importlib.util.find_spec("runpod") is None:
        from gateway.workers.runpod.worker import MISSING

        raise ConfigError([MISSING])
    if not args.rp_serve_api and not _on_queue():
        raise ConfigError([_NOT_HERE])


def _on_queue() -> bool:
    from gateway.environment import child_environment

    return bool(child_environment(("RUNPOD_WEBHOOK_GET_JOB",), ()))


async def _one_job(runtime: Runtime, job: dict[str, Any], stop: asyncio.Event) -> int:
    from gateway.workers.runpod.local import outputs_of

    running = asyncio.create_task(outputs_of(runtime, job))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not running.done():
        running.cancel()
        await asyncio.wait({running})
        return 130
    stopping.cancel()
    outputs, error = running.result()
    print(json.dumps({"error": error} if error is not None else {"output": outputs}, ensure_ascii=False), flush=True)
    return 0 if error is None else 1
