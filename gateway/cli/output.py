"""The standard streams, where they are closed, full or without a reader."""

from __future__ import annotations

import os
import sys
from pathlib import Path


class Unwritten(OSError):
    """Stdout is closed or full."""


def fill_streams() -> None:
    """Puts something where Python has None for a closed stream (`>&-`): writing to stdout then raises an OSError, as
    it does on a full disk, and what is for stderr does not end up in stdout."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open()
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")


def write(text: str) -> None:
    """A line on stdout, at once. Raises BrokenPipeError where its reader has left, else Unwritten."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Unwritten(error.errno, error.strerror) from None


def stdout_failed() -> bool:
    """Whether an OSError is stdout's: what it could not take is still in its buffer, and fails again."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return not sys.stdout.writable()


def drop_stdout() -> None:
    """Forgets what stdout could not take, or Python would complain of it again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def why(error: OSError) -> str:
    """Why stdout could not be written, in a few words."""
    return error.strerror or "stdout is closed"
