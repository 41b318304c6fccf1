"""The command line of `corral chat`; what it does is imported only when it is asked for."""

from __future__ import annotations

import argparse
import math

_EPILOG = """\
examples:
  corral chat                                          talk; /help tells the commands, Ctrl-C stops an answer
  corral chat --input "Why is the sky blue?"           one answer, then the end
  corral chat -i --model qwen-7b --system "Be brief."
  git diff | corral chat --system "Write a commit message for this change." > message.txt
  corral chat --input "Is 7 prime?" --grammar 'root ::= "yes" | "no"'
  corral chat --nats nats://queue:4222 --subject inference.request.qwen-7b --input "Hello!"

The gateway is that of --url, else CORRAL_URL, else the one on this machine's PORT; the key that of --key, else
CORRAL_API_KEY. Without --input and -i, what comes by a pipe is the input.
exit codes: 0 answered, 1 failed, 2 used wrongly, 130 interrupted"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model of a running gateway",
        description="Talk to a model, over HTTP or NATS.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", metavar="TEXT", help="say this and print the answer; - reads it from stdin")
    parser.add_argument("-i", "--interactive", action="store_true", help="go on talking; each line is a message")
    parser.add_argument("--model", metavar="ID", help="id or alias; default: the gateway's own")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--grammar", metavar="GRAMMAR", help="a name, a text with ::=, or @FILE: what answers may be")
    parser.add_argument("--max-tokens", type=_count, metavar="N", help="the longest answer")
    parser.add_argument("--temperature", type=_temperature, metavar="T", help="0 to 2; 0: always the likeliest")
    parser.add_argument("--url", help="the gateway, such as http://127.0.0.1:8000")
    parser.add_argument("--key", help="the API key; CORRAL_API_KEY keeps it out of ps")
    parser.add_argument("--nats", metavar="URL", help="by NATS instead, such as nats://127.0.0.1:4222")
    parser.add_argument("--subject", help="where jobs go; default: inference.request.MODEL")
    parser.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="the longest silence; default 600"
    )
    parser.set_defaults(run=_run)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a number of tokens, at least 1, not '{text}'")
    return int(text)


def _temperature(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be a number, at least 0, not '{text}'")
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be seconds, more than 0, not '{text}'")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _run(args: argparse.Namespace) -> int:
    from gateway.cli.chat import run as chat

    return chat.run(args)
