"""`corral config check`: every problem of the configuration at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gateway.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("config", help="check the configuration")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="print every problem",
        description="Check the environment, .env and the models file; print every problem, exit 1 if there is any.",
        epilog="example:\n  PORT=80800 corral config check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a models file; default: CONFIG_PATH")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    from gateway.runtime import check_configuration
    from gateway.settings import load_settings

    try:
        settings = load_settings()
        check_configuration(settings)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 1
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("ok")
    return 0
