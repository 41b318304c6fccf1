"""A command before a real pseudo-terminal: what it shows is read, keys are typed."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.house import ROOT, eventually

CTRL_C, CTRL_D = "\x03", "\x04"


@dataclass
class Terminal:
    process: subprocess.Popen[bytes]
    _keys: int
    _shown: bytearray = field(default_factory=bytearray)
    _seen: int = 0

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace").replace("\r\n", "\n")

    def expect(self, text: str, seconds: float = 8) -> str:
        """Waits until `text` is shown, behind what was expected last; what stands before it since then."""

        def look() -> bool:
            assert self.process.poll() is None or text in self.shown[self._seen :], f"it has ended:\n{self.shown}"
            return text in self.shown[self._seen :]

        try:
            eventually(look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{text!r} is not shown: {error}\n{self.shown}") from None
        begin = self._seen
        at = self.shown.index(text, begin)
        self._seen = at + len(text)
        return self.shown[begin:at]

    def type(self, text: str) -> None:
        os.write(self._keys, text.encode())

    def line(self, text: str) -> None:
        self.type(text + "\n")

    def ends(self, seconds: float = 5) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def terminal(folder: Path, *argv: str, **variables: str) -> Iterator[Terminal]:
    """`corral ARGV…` with nothing of our environment."""
    keys, other = pty.openpty()
    around = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(folder), "TERM": "xterm"} | variables
    command = [sys.executable, "-m", "gateway", *argv]
    process = subprocess.Popen(
        command, cwd=folder, env=around, stdin=other, stdout=other, stderr=other, preexec_fn=_own_session
    )
    os.close(other)
    shown = Terminal(process, keys)

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while part := os.read(keys, 65536):
                shown._shown.extend(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield shown
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)
        os.close(keys)


def _own_session() -> None:
    """So that Ctrl-C on this terminal becomes a signal."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
