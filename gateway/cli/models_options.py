"""The command line of `corral models`; what it does is imported only when it is asked for."""

from __future__ import annotations

import argparse
import math

TEST_SECONDS = 300.0

_EXAMPLES = """\
examples:
  corral models list
  corral models status --watch
  corral models load qwen-7b
  corral models eject qwen-7b --force
  corral models test --url http://gpu-box:8000 --json

The gateway is that of --url, else CORRAL_URL, else the one on this machine's PORT; the key that of --key, else
CORRAL_API_KEY. load, eject and reset need a key with scope=admin.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "models",
        help="see, load, unload and test the models of a running gateway",
        description="The models of a running gateway, over HTTP.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_shared_options(parser)
    parser.set_defaults(run=_run)
    commands = parser.add_subparsers(title="commands", dest="models_command", required=True, metavar="COMMAND")

    def command(name: str, does: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  corral models {example}" for example in examples)
        sub = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example{'s' if len(examples) > 1 else ''}:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_shared_options(sub)
        return sub

    command("list", "list the models that the key may use, with their files", "list", "list --json")

    load = command(
        "load", "load models, and show how it goes (exit 1 if one fails)", "load qwen-7b", "load a b --no-wait"
    )
    _add_names(load, "+")
    load.add_argument("--no-wait", action="store_true", help="ask for it and return at once")

    eject = command("eject", "unload models when their running requests are done", "eject qwen-7b")
    _add_names(eject, "+")
    eject.add_argument("--force", action="store_true", help="do not wait: running requests are cut")

    _add_names(command("reset", "let failed models be tried again", "reset qwen-7b"), "+")

    status = command("status", "show what the models do", "status", "status qwen-7b --watch")
    _add_names(status, "*")
    status.add_argument("--watch", action="store_true", help="go on showing it, until Ctrl-C")

    test = command(
        "test", "send a small request to each model (exit 1 if one fails)", "test", "test qwen-7b --timeout 60"
    )
    _add_names(test, "*")
    test.add_argument(
        "--timeout",
        type=_seconds,
        default=TEST_SECONDS,
        metavar="SECONDS",
        help=f"for each model, its load included; default {TEST_SECONDS:g}",
    )


def _add_shared_options(parser: argparse._ActionsContainer) -> None:
    """On every level, and silent where not given: an inner default would overwrite what the outer one has read."""
    parser.add_argument("--url", default=argparse.SUPPRESS, help="the gateway, such as http://127.0.0.1:8000")
    parser.add_argument("--key", default=argparse.SUPPRESS, help="the API key; CORRAL_API_KEY keeps it out of ps")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="the result as JSON")


def _add_names(parser: argparse.ArgumentParser, how_many: str) -> None:
    default = "; default: all" if how_many == "*" else ""
    parser.add_argument("models", nargs=how_many, metavar="MODEL", help=f"ids or aliases{default}")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"must be seconds, more than 0, not '{text}'")
    return seconds


def _run(args: argparse.Namespace) -> int:
    from gateway.cli import models

    return models.run(args)
