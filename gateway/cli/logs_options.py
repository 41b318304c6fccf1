"""The command line of `corral logs`; what it does is imported only when it is asked for."""

from __future__ import annotations

import argparse
import re
from datetime import datetime

_EXAMPLES = """\
examples:
  corral logs
  corral logs --since 1h --status 5xx
  corral logs --key alice --model qwen-7b --follow
  corral logs --since 30d --json > requests.jsonl

The gateway is that of --url, else CORRAL_URL, else the one on this machine's PORT; the API key that of --api-key, else
CORRAL_API_KEY. It needs scope=admin.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "logs",
        help="print and export the records of requests of a running gateway",
        description="The records of requests of a running gateway, oldest first, over HTTP.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--since", type=_when, metavar="WHEN", help="such as 1h, 30m, 7d, or an ISO time (UTC where it names none)"
    )
    parser.add_argument("--key", dest="key_id", type=_key_id, metavar="ID", help="those of the key with this id")
    parser.add_argument("--model", metavar="ID", help="those of this model")
    parser.add_argument("--status", type=_status, help="those with this status, such as 429 or 5xx")
    parser.add_argument("--limit", type=_count, metavar="N", help="the newest N; default 50, or all with --since")
    parser.add_argument("--follow", "-f", action="store_true", help="go on showing what is new, until Ctrl-C")
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object a line")
    parser.add_argument("--url", help="the gateway, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key", dest="key", help="the API key; CORRAL_API_KEY keeps it out of ps")
    parser.set_defaults(run=_run)


def _key_id(text: str) -> str:
    if text.startswith("sk-") and len(text) > 43:  # as `corral models` takes it; it would end in the gateway's URL
        raise argparse.ArgumentTypeError("is the id of a key; the API key itself goes into --api-key or CORRAL_API_KEY")
    return text


def _when(text: str) -> str:
    """As the gateway will read it: what it would refuse is wrong usage."""
    try:
        if not re.fullmatch(r"\d{1,9}[smhdw]|\d{9,11}(\.\d+)?", text, re.ASCII):
            datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be such as 1h, 30m or an ISO time, not '{text}'") from None
    return text


def _status(text: str) -> str:
    if not re.fullmatch(r"[1-5](\d\d|xx)", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be such as 429 or 5xx, not '{text}'")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not '{text}'")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from gateway.cli import logs

    return logs.run(args)
