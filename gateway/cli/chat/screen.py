"""What a person sees and types: plain text where it goes to a file or to a terminal that knows no more."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping

from gateway.cli.chat.talk import Piece
from gateway.cli.client import Failed, one_line

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
PROMPT, MORE = "> ", ". "


class Screen:
    """`variables` are those of the terminal: TERM and NO_COLOR."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._tty = sys.stdout.isatty()
        self.typed = sys.stdin is not None and sys.stdin.isatty()  # there is none where it was closed
        self.talks = self.typed and self._tty
        clever = variables.get("TERM", "dumb") != "dumb"
        self._dims = self._tty and clever and not variables.get("NO_COLOR")
        self._column_used = self._thinking = False
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        if self.talks and clever:
            _edit_lines()

    def read(self) -> str:
        """One message: a line, and further ones as long as they end in a backslash. Raises EOFError, Failed."""
        lines = [self._line(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._line(MORE))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        self._column_used = False
        if sys.stdin is None:
            raise EOFError
        try:
            return input(prompt if self.talks else "")
        except UnicodeDecodeError:
            raise Failed("the line is not UTF-8") from None

    def piece(self, piece: Piece) -> None:
        """Shows it at once. Thoughts are for who watches, not for a pipe."""
        thinking = piece.kind == "thought"
        if thinking and not self.talks:
            return
        if thinking != self._thinking:
            self._turn(thinking)
        self._write(_harmless(piece.text) if self._tty else piece.text)

    def end_answer(self) -> None:
        if self._thinking:
            self._turn(False)
        if self._column_used:
            self._write("\n")

    def notice(self, text: str) -> None:
        """Of ours, not of the model's: to a person only."""
        if self.talks:
            self._fresh_line()
            self._write(f"{_DIM}{text}{_PLAIN}\n" if self._dims else f"{text}\n")

    def show(self, text: str) -> None:
        """What was asked for by a command."""
        self._fresh_line()
        self._write(text + "\n")

    def error(self, text: str) -> None:
        self.end_answer()
        print(f"corral chat: {one_line(text)}", file=sys.stderr, flush=True)

    def _turn(self, thinking: bool) -> None:
        self._thinking = thinking
        if not thinking:
            self._fresh_line()
        if self._dims:
            sys.stdout.write(_DIM if thinking else _PLAIN)

    def _fresh_line(self) -> None:
        if self._column_used:
            self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._column_used = not text.removesuffix(_PLAIN).endswith("\n")


def _harmless(text: str) -> str:
    """A model may be made to write escape sequences, which a terminal would obey."""
    return text.translate(_CONTROLS)


def _edit_lines() -> None:
    """Arrow keys and the lines typed before; they are kept nowhere."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste off")
    readline.parse_and_bind("tab: self-insert")
    readline.set_auto_history(True)
