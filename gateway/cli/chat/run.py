"""`corral chat`: one answer, or a talk, with a model of a running gateway."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from gateway.cli.chat.commands import LEAVE, run_command
from gateway.cli.chat.screen import Screen
from gateway.cli.chat.talk import Asked, Gateway, Piece, Talk, Told, read_grammar
from gateway.cli.client import Failed

INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    from gateway.environment import terminal_variables

    screen = Screen(terminal_variables())
    try:
        first, goes_on = _what_to_do(args, screen)
        talk = Talk(model=args.model, system=args.system, params=_params(args))
        asked = _whom(args, talk)
    except Failed as failed:
        screen.error(str(failed))
        return failed.code
    return _go_on(talk, asked, screen, first) if goes_on else _once(talk, asked, screen, first or "")


def _what_to_do(args: argparse.Namespace, screen: Screen) -> tuple[str | None, bool]:
    """What is said first, and whether the talk goes on after that. Raises Failed."""
    if args.input is not None:
        text = _all_of_stdin() if args.input == "-" else args.input
        if args.input == "-" and args.interactive:
            raise Failed("--input - takes all of stdin, and -i would read on there", 2)
    elif args.interactive or screen.talks:
        return None, True
    elif screen.typed:
        raise Failed("nothing to say: give --input TEXT, or -i to talk", 2)
    else:
        text = _all_of_stdin()
    if not text.strip():
        raise Failed("the input is empty: give --input TEXT, or pipe a text in", 2)
    return text, args.interactive


def _all_of_stdin() -> str:
    """Raises Failed."""
    try:
        return sys.stdin.read() if sys.stdin is not None else ""
    except UnicodeDecodeError:
        raise Failed("the input is not UTF-8", 2) from None


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Raises Failed."""
    given = {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "grammar": read_grammar(args.grammar),
    }
    return {name: value for name, value in given.items() if value is not None}


def _whom(args: argparse.Namespace, talk: Talk) -> Asked:
    """Raises Failed."""
    if args.nats is None:
        if args.subject is not None:
            raise Failed("--subject is for NATS: give --nats URL, too", 2)
        from gateway.cli.models import make_client

        return Gateway(make_client(args), args.timeout)
    if args.url is not None or args.key is not None:
        raise Failed("--url and --key are for HTTP, --nats is for NATS: give one of them", 2)
    from gateway.cli.chat.nats import Workers

    return Workers(args.nats, args.subject, talk, args.timeout)


def _once(talk: Talk, asked: Asked, screen: Screen, text: str) -> int:
    talk.turns.append({"role": "user", "content": text})
    try:
        asked.answer(talk, screen.piece)
    except Failed as failed:
        screen.error(str(failed))
        return failed.code
    except KeyboardInterrupt:
        screen.end_answer()
        return INTERRUPTED
    screen.end_answer()
    return 0


def _go_on(talk: Talk, asked: Asked, screen: Screen, first: str | None) -> int:
    """Until the end of the input, /quit, or a second Ctrl-C; 1 where a script's message got no answer."""
    screen.notice("/help tells the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    code, leaving = 0, False
    while True:
        try:
            text = first if first is not None else screen.read()
            first = None
            leaving = False
            if text.startswith("/") and not text.startswith("//"):
                if run_command(text, talk, asked, screen) is LEAVE:
                    return code
            elif text.strip():
                leaving = not _answered(talk, asked, screen, text.removeprefix("/") if text[:2] == "//" else text)
        except Failed as failed:
            screen.error(str(failed))
            code = 0 if screen.talks else 1
        except EOFError:
            screen.end_answer()
            screen.notice("")
            return code
        except KeyboardInterrupt:
            if leaving or not screen.talks:
                screen.show("")
                return 0 if screen.talks else INTERRUPTED
            leaving = True
            screen.show("")
            screen.notice("(Ctrl-C again, Ctrl-D or /quit leaves)")


def _answered(talk: Talk, asked: Asked, screen: Screen, text: str) -> bool:
    """False where the user stopped the answer; what there was of it stays in the history. Raises Failed."""
    said: list[str] = []

    def emit(piece: Piece) -> None:
        if piece.kind == "answer":
            said.append(piece.text)
        screen.piece(piece)

    begin = time.monotonic()
    talk.turns.append({"role": "user", "content": text})
    try:
        told = asked.answer(talk, emit)
    except Failed:
        talk.turns.pop()  # so that it can be said again
        raise
    except KeyboardInterrupt:
        screen.end_answer()
        if not screen.talks:
            raise
        screen.notice("(stopped)")
        _remember(talk, said)
        return False
    screen.end_answer()
    _remember(talk, said)
    screen.notice(_summary(told, time.monotonic() - begin))
    return True


def _remember(talk: Talk, said: list[str]) -> None:
    if said:
        talk.turns.append({"role": "assistant", "content": "".join(said)})
    else:
        talk.turns.pop()


def _summary(told: Told, seconds: float) -> str:
    tokens = f"{told.tokens} tokens, " if told.tokens else ""
    cut = ", cut at the bound" if told.finish_reason == "length" else ""
    return f"({tokens}{seconds:.1f} s{cut})"
