"""What begins with a slash in a talk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gateway.cli.chat.screen import Screen
from gateway.cli.chat.talk import Asked, Talk
from gateway.cli.client import Failed, one_line

LEAVE = object()

_HELP = """\
/model [ID]      choose a model; without ID: which there are
/system [TEXT]   set the system prompt; without TEXT: show it; /system - takes it away
/clear           forget what has been said
/history         show what has been said
/save FILE       write it to FILE, as JSON messages
/quit            leave; so do Ctrl-D, and Ctrl-C at the prompt after another
A line that ends in \\ goes on in the next one. A message that begins with a slash is written with two: //like this"""


def run_command(line: str, talk: Talk, asked: Asked, screen: Screen) -> object:
    """LEAVE where the talk is over. Raises Failed."""
    name, _, rest = line[1:].partition(" ")
    name, rest = name.strip().lower(), rest.strip()
    if name in ("quit", "exit", "q"):
        return LEAVE
    if name not in _COMMANDS:
        raise Failed(f"there is no /{name}; /help tells the commands")
    _COMMANDS[name](rest, talk, asked, screen)
    return None


def _help(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    screen.show(_HELP)


def _model(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    if rest:
        asked.choose(talk, rest)
        screen.show(f"(the next answers are of {rest}; what has been said stays)")
        return
    known = asked.models()
    if not known:
        screen.show(talk.model or "(which models there are cannot be asked by NATS)")
        return
    for name in known:
        screen.show(f"{'*' if name == talk.model else ' '} {one_line(name)}")


def _system(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    if rest:
        talk.system = None if rest == "-" else rest
    screen.show(talk.system or "(no system prompt)")


def _clear(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    talk.turns.clear()
    screen.show("(forgotten)")


def _history(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    if not talk.turns:
        screen.show("(nothing has been said)")
    for turn in talk.turns:
        screen.show(f"{turn['role']}: {turn['content'].strip()}")


def _save(rest: str, talk: Talk, asked: Asked, screen: Screen) -> None:
    if not rest:
        raise Failed("/save needs a file's name")
    try:
        Path(rest).expanduser().write_text(json.dumps(talk.messages(), ensure_ascii=False, indent=2) + "\n")
    except (OSError, RuntimeError) as error:
        raise Failed(f"{rest} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    screen.show(f"(written to {rest})")


_COMMANDS: dict[str, Callable[[str, Talk, Asked, Screen], None]] = {
    "help": _help,
    "model": _model,
    "models": _model,
    "system": _system,
    "clear": _clear,
    "history": _history,
    "save": _save,
}
