"""The `corral` command. Each subcommand is a module that is imported only when it is asked for, or for its help."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from gateway import __version__, garbage
from gateway.cli import output
from gateway.errors import ConfigError

_EPILOG = """\
examples:
  corral serve                           serve what the environment names
  corral keys generate --name ada        make an API key
  corral chat                            talk to a model of a running gateway
  corral models status --watch           see what the models of a running gateway do
  corral logs --since 1h --status 5xx    print the records of requests
  corral config check                    print every problem of the configuration

Variables and more: README.md. `corral COMMAND --help` has further examples."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, with the mend; the parsers of subcommands become of this class too.

    What it parsed knows by `parser` whose the last word was.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 ok, 1 failed, 2 usage, 130 interrupted."""
    given = sys.argv[1:] if argv is None else list(argv)
    if argv is None and given[:1] in (["serve"], ["worker"]):
        garbage.look_rarely()
        for number in (signal.SIGTERM, signal.SIGINT):  # until the loop listens to them; half a second is imports
            signal.signal(number, lambda *_: sys.exit(0))
    if given == ["serve"]:  # the container's start: nothing else needs to be imported before llama-server runs
        from gateway.cli import serve

        return serve.run()
    output.fill_streams()
    if not given:
        make_parser().print_help(sys.stderr)
        return 2
    try:
        args, unknown = make_parser().parse_known_args(given)
        if unknown:
            args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        code: int = args.run(args)
        sys.stdout.flush()
    except ConfigError as error:
        for problem in error.problems:
            print(f"corral: {problem}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        output.drop_stdout()
        return 1
    except OSError as error:
        if not output.stdout_failed():
            raise
        output.drop_stdout()
        print(f"corral: nothing more can be shown ({output.why(error)}); send the output elsewhere", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def make_parser() -> argparse.ArgumentParser:
    from gateway.cli import config, keys, keys_options, logs_options, models_options, serve, worker
    from gateway.cli.chat import options as chat_options

    parser: argparse.ArgumentParser = Parser(
        prog="corral",
        description="A trustworthy front for llama.cpp's llama-server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"corral {__version__}")
    keys_options.add_shared_options(parser.add_argument_group("anywhere on the line"))
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve.add_parser(commands)
    keys.add_parser(commands, _keys_file)
    models_options.add_parser(commands)
    chat_options.add_parser(commands)
    logs_options.add_parser(commands)
    worker.add_parser(commands)
    config.add_parser(commands)
    return parser


def _keys_file() -> Path:
    from gateway.environment import load_settings

    return load_settings().auth_keys_file
