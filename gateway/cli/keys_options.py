"""The command line of `corral keys`."""

from __future__ import annotations

import argparse
from pathlib import Path

from gateway.stores.keys.file import PRIORITIES

# Options that become words of the key's line, under the same names.
ATTRIBUTES = ("scope", "models", "tpm", "concurrency", "priority", "budget")

_EXAMPLES = """\
examples:
  corral keys generate --name alice
  corral keys generate --name ci --rate-limit 30 --expires 30d --models 'qwen-*' --priority low
  corral keys generate --name grafana --scope metrics --quiet > key.txt
  corral keys list --json
  corral keys rotate --name alice --grace 48h
  corral keys remove --name alice
  corral keys check - < key.txt
"""


def add_shared_options(parser: argparse._ActionsContainer) -> None:
    """Options that may stand anywhere on the line: on every level, and silent where not given, or an inner level's
    default would overwrite what the outer one has read."""
    parser.add_argument("--file", type=Path, default=argparse.SUPPRESS, metavar="PATH", help="the keys file")
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help="the result alone, no hints")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="the result as JSON")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "keys",
        help="make, list, rotate, remove and check API keys",
        description="API keys, in AUTH_KEYS_FILE (default $DATA_DIR/api_keys.txt) or --file. A running gateway follows "
        "the file: no restart.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shared_options(parser)
    commands = parser.add_subparsers(title="commands", dest="keys_command", required=True, metavar="COMMAND")

    def command(name: str, does: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example:\n  corral keys {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_shared_options(sub)
        return sub

    generate = command("generate", "make a key and show it, once", "generate --name alice --expires 30d")
    _add_name(generate)
    _add_secret_options(generate)
    generate.add_argument("--rate-limit", type=_whole, metavar="N", help="requests a minute; 0 = no limit")
    generate.add_argument("--scope", metavar="LIST", help="of infer, metrics, admin; default infer; admin is all three")
    generate.add_argument("--models", metavar="GLOBS", help="model ids it may use, such as 'qwen-*,llama-8b'")
    generate.add_argument("--tpm", metavar="N", help="tokens a minute; 0 = no limit")
    generate.add_argument("--concurrency", metavar="N", help="requests at once; 0 = no limit")
    generate.add_argument("--priority", choices=PRIORITIES, help="the highest its requests may have; default high")
    generate.add_argument("--budget", metavar="N[/day]", help="tokens a day; 0 = no limit")

    command("list", "list the keys, never their secrets (limits: - is the gateway's default, 0 is none)", "list --json")

    rotate = command("rotate", "give a key a new secret, the old one working for a while", "rotate --name alice")
    _add_name(rotate)
    _add_secret_options(rotate)
    rotate.add_argument(
        "--grace", default="24h", metavar="TIME", help="how long the old one works; default 24h, 0 ends it at once"
    )

    _add_name(command("remove", "remove a key, at once", "remove --name alice"))

    check = command("check", "say whose key it is and whether it works (exit 0) or not (1)", "check - < key.txt")
    check.add_argument("key", metavar="KEY", help="the key; - reads it from stdin, which keeps it out of ps")
    return parser


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, metavar="ID", help="the key's id: letters, digits, - and _")


def _add_secret_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--expires", metavar="WHEN", help="when the key ends: 30d, 24h, 60m, or 2027-01-31T12:00Z")
    parser.add_argument("--secret", help="your own, 16 to 128 characters, not a random one; - reads it from stdin")
    parser.add_argument("--plaintext", action="store_true", help="keep the secret readable in the file")


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 for no limit, not '{text}'")
    return int(text)
