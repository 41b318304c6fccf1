"""Reads what the gateway published; never fails, never blocks, and hardly ever reads the same bytes twice."""

from __future__ import annotations

import json
import os
import time

from health.decide import Json

READ_INTERVAL = 0.05  # seconds; a storm of probes costs twenty looks at the file a second
MAX_BYTES = 4 << 20


class StateFile:
    """What cannot be read or understood changes nothing: the last good state stands until its heartbeat is stale."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._last: Json | None = None
        self._mark: tuple[int, ...] = ()
        self._next_look = 0.0

    def read(self) -> Json | None:
        now = time.monotonic()
        if now >= self._next_look and self._path:
            self._next_look = now + READ_INTERVAL
            try:  # not contextlib.suppress: its import costs 2 ms
                self._look()
            except (OSError, ValueError, RecursionError):
                pass
        return self._last

    def _look(self) -> None:
        # NONBLOCK: somebody's FIFO in the place of the file must not hold us.
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            stat = os.fstat(fd)
            mark = (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if mark == self._mark:
                return
            raw = os.read(fd, MAX_BYTES)
        finally:
            os.close(fd)
        self._mark = mark  # before parsing: what is corrupt now stays so until it is written anew
        state = json.loads(raw, parse_constant=_no_constant)
        if isinstance(state, dict):
            self._last = state


def _no_constant(name: str) -> None:
    """NaN and Infinity are no JSON, and must not be passed on as such."""
