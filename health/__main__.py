"""`python -m health`: reads its settings, listens, and lives as long as it should. Run by path it starts twice as fast
(`python -I -S health/__main__.py`), because nothing of site-packages is looked at."""

from __future__ import annotations

import os
import signal
import sys

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120 - pathlib is slow

from health.server import Server, listen, raise_file_limit
from health.settings import WrongSetting, read_settings

USAGE = """usage: python -m health [--with-parent PID] [--own-state]

Answers /ping, /health and /status on PORT_HEALTH from what the gateway wrote to STATE_FILE.

  --with-parent PID   live exactly as long as the parent, which has this PID; no signal but KILL ends it before
  --own-state         remove STATE_FILE and its folder at the end

  STATE_FILE=/dev/shm/state.json PORT_HEALTH=8001 python -m health
"""


class WrongUsage(Exception):
    """The arguments make no sense."""


def read_arguments(arguments: list[str]) -> tuple[int | None, bool]:
    """The parent's PID, if we are to follow it, and whether the state file is ours to remove."""
    parent: int | None = None
    own_state = False
    rest = iter(arguments)
    for argument in rest:
        if argument == "--own-state":
            own_state = True
        elif argument == "--with-parent" and (pid := next(rest, "")).isdecimal():
            parent = int(pid)
        else:
            raise WrongUsage(f"{argument}: unknown, or its value is missing; see --help")
    return parent, own_state


def follow_signals(parent: int | None) -> None:
    """A signal to the whole group (Ctrl-C, systemd) must not silence us: the gateway drains, and we have to say so."""
    if parent is None:
        signal.signal(signal.SIGTERM, _end)
        signal.signal(signal.SIGINT, _end)
    else:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def remove_state(path: str) -> None:
    from pathlib import Path  # only here: at the start it would cost a fifth of the time

    file = Path(path)
    try:
        for leftover in file.parent.glob(f"*{file.name}*"):  # the gateway may have died between writing and renaming
            leftover.unlink(missing_ok=True)
        file.parent.rmdir()
    except OSError as error:
        sys.stderr.write(f"health: cannot remove {path}: {error}\n")


def serve(parent: int | None) -> int:
    """Until the parent is gone, or for ever. Raises WrongSetting."""
    settings = read_settings(os.environ)
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        sys.stderr.write(f"health: cannot listen on HOST={settings.host} PORT_HEALTH={settings.port}: {error}\n")
        return 1
    server = Server(settings, listener, max_connections=raise_file_limit())
    server.run(lambda: parent is not None and os.getppid() != parent)
    server.close()
    return 0


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        sys.stdout.write(USAGE)
        return 0
    own_state = False
    try:
        parent, own_state = read_arguments(arguments)
        follow_signals(parent)
        return serve(parent)
    except (WrongSetting, WrongUsage) as error:
        sys.stderr.write(f"health: {error}\n")
        return 2
    finally:
        if own_state:
            remove_state(os.environ.get("STATE_FILE", ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
