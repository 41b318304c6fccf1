"""Whose process listens on a port of 127.0.0.1, as far as /proc tells it."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"
_LOCAL = int.from_bytes(socket.inet_aton("127.0.0.1"), sys.byteorder)
_ADDRESSES = (("tcp", f"{_LOCAL:08X}"), ("tcp", "0" * 8), ("tcp6", "0" * 32))


def who_listens(port: int, pid: int) -> tuple[bool, bool]:
    """Whether `pid` or a process that it has started does, and whether another one does. Blocking.

    Both, where they share the port. Neither is told of processes that cannot be seen: another user's, another
    container's, or all where there is no such /proc.
    """
    ours = others = False
    for inode in _listening(port):
        if _has_open(pid, inode):  # most often: then nobody else need be looked at
            ours = True
        elif holders := [holder for holder in _processes() if _has_open(holder, inode)]:
            family = any(_started_by(holder, pid) for holder in holders)
            ours, others = ours or family, others or not family
    return ours, others


def _listening(port: int) -> list[str]:
    """The inodes of the sockets that get connections to it; one that listens on all addresses, if no other does."""
    for table, address in _ADDRESSES:
        with contextlib.suppress(OSError):
            rows = [line.split() for line in (_PROC / "net" / table).read_text().splitlines()[1:]]
            if found := [row[9] for row in rows if row[1] == f"{address}:{port:04X}" and row[3] == _LISTEN]:
                return found
    return []


def _processes() -> list[int]:
    return [int(folder.name) for folder in _PROC.iterdir() if folder.name.isdecimal()]


def _has_open(pid: int, inode: str) -> bool:
    with contextlib.suppress(OSError):  # it is not ours to see, or ends
        for file in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                if str(file.readlink()) == f"socket:[{inode}]":
                    return True
    return False


def _started_by(process: int, pid: int) -> bool:
    """Whether it is of the session that `pid` leads, or descends from it; so too if it has just ended."""
    try:
        if os.getsid(process) == pid:
            return True
        while process > 1:
            if process == pid:
                return True
            process = int((_PROC / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return True
    return False
