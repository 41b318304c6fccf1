"""What a child process writes, read in whole heaps: line by line it would cost more than the requests it tells of."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections import deque
from collections.abc import Callable
from typing import cast

READ_EVERY_SECONDS = 0.05
_PIPE_BYTES = 1 << 20  # what a process without privileges may ask for; a full pipe would stop llama-server
_WHOLE_READ = 65536  # bytes; where so many came there may be more at once
_TAIL_LINES = 40


class Output(asyncio.Protocol):
    """A pipe's reading end. All of it goes to `take`, and the last lines are kept."""

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self.ended = asyncio.Event()
        self._take = take
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._partial = b""
        self._pipe: asyncio.ReadTransport | None = None
        self._resting: asyncio.TimerHandle | None = None

    @property
    def last_lines(self) -> list[str]:
        return [*self._tail, self._partial.decode(errors="replace")] if self._partial else list(self._tail)

    async def open(self) -> int:
        """The writing end, for the child; who has passed it on closes it."""
        readable, writable = os.pipe()
        with contextlib.suppress(OSError, AttributeError):  # this user's pipes have all they may, or it is no Linux
            fcntl.fcntl(writable, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            await asyncio.get_running_loop().connect_read_pipe(lambda: self, os.fdopen(readable, "rb", 0))
        except BaseException:
            os.close(writable)
            raise
        return writable

    def hurry(self) -> None:
        """The process has ended: what is left is read at once."""
        if self._resting is not None:
            self._resting.cancel()
            self._read_on()

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._pipe = cast(asyncio.ReadTransport, transport)

    def data_received(self, data: bytes) -> None:
        self._take(data)
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()[-4096:]
        self._tail.extend(line.decode(errors="replace") for line in lines[-_TAIL_LINES:])
        if len(data) < _WHOLE_READ and self._pipe is not None and not self._pipe.is_closing():
            self._pipe.pause_reading()
            self._resting = asyncio.get_running_loop().call_later(READ_EVERY_SECONDS, self._read_on)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._resting is not None:
            self._resting.cancel()
        self.ended.set()

    def _read_on(self) -> None:
        self._resting = None
        if self._pipe is not None and not self._pipe.is_closing():
            self._pipe.resume_reading()
