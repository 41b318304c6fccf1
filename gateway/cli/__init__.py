"""The `corral` command. Each subcommand is a module that is imported only when it is asked for, or for its help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gateway import __version__
from gateway.errors import ConfigError

_EPILOG = """examples:
  corral serve                           serve what the environment names
  corral keys generate --name ada        make an API key
  corral config check                    print every problem of the configuration"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 ok, 1 failed, 2 usage."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given == ["serve"]:  # the container's start: nothing else needs to be imported before llama-server runs
        from gateway.cli import serve

        return serve.run()
    try:
        args = _parser().parse_args(given)
        code: int = args.run(args)
    except ConfigError as error:
        for problem in error.problems:
            print(f"corral: {problem}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    from gateway.cli import config, keys, serve

    parser = argparse.ArgumentParser(
        prog="corral",
        description="A trustworthy front for llama.cpp's llama-server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"corral {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve.add_parser(commands)
    keys.add_parser(commands, _keys_file)
    config.add_parser(commands)
    return parser


def _keys_file() -> Path:
    from gateway.settings import load_settings

    return load_settings().auth_keys_file
