"""What a child process writes, read in whole heaps: line by line it would cost more than the requests it tells of."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable

READ_EVERY_SECONDS = 0.05
_PIPE_BYTES = 1 << 20  # what a process without privileges may ask for; a full pipe would stop llama-server
_TAIL_LINES = 40
_MOST_OF_A_LINE = 4096


class Output:
    """A pipe's reading end, and the only owner of its descriptor. All of it goes to `take`; the last lines are kept."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self.ended = asyncio.Event()
        self._take = take
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        self._readable: int | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._rests = True

    @property
    def last_lines(self) -> list[str]:
        return [*self._tail, self._partial.decode(errors="replace")] if self._partial else list(self._tail)

    def open(self) -> int:
        """The writing end, for the child; who has passed it on closes it."""
        self._readable, writable = os.pipe()
        os.set_blocking(self._readable, False)
        with contextlib.suppress(OSError, AttributeError):  # this user's pipes have all they may, or it is no Linux
            fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._loop.add_reader(self._readable, self._read)
        return writable

    def hurry(self) -> None:
        """The process has ended: what is left is read at once."""
        self._rests = False
        if self._resting is not None:
            self._read_on()

    def close(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._readable is not None:
            self._loop.remove_reader(self._readable)
            os.close(self._readable)
            self._readable = None
        self.ended.set()

    def _read(self) -> None:
        """A heap, and then a rest, in which the next one grows."""
        assert self._readable is not None
        try:
            data = os.read(self._readable, _PIPE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self._take(data)
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()[-_MOST_OF_A_LINE:]
        self._tail.extend(line[-_MOST_OF_A_LINE:].decode(errors="replace") for line in lines[-_TAIL_LINES:])
        if self._rests:
            self._loop.remove_reader(self._readable)
            self._resting = self._loop.call_later(READ_EVERY_SECONDS, self._read_on)

    def _read_on(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._readable is not None:
            self._loop.add_reader(self._readable, self._read)
