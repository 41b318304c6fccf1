"""`corral worker`: the same core, fed by a queue instead of by HTTP."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from gateway.cli import worker_nats, worker_runpod

    parser = subparsers.add_parser(
        "worker",
        help="take jobs from a queue",
        description="Take jobs from a queue instead of requests by HTTP. Settings are those of `corral serve`.",
        epilog="examples:\n  NATS_URL=nats://127.0.0.1:4222 corral worker nats\n"
        "  MODEL_NAME=qwen.gguf corral worker runpod",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="queues", required=True, metavar="QUEUE")
    worker_nats.add_parser(commands)
    worker_runpod.add_parser(commands)
