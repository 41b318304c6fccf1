"""Server-sent events out of bytes that may be cut anywhere, for the assemblers and the doors of another format."""

from __future__ import annotations

from typing import NamedTuple

from gateway.errors import BackendError

MAX_FRAME = 16 * 1024 * 1024


class FrameTooLarge(BackendError):
    """One frame (or one line that never ends) is larger than the bound; the stream cannot be followed any further."""


class Frame(NamedTuple):
    """One event: its `event:` name, or None, and its `data:` lines joined by a newline."""

    event: str | None
    data: bytes


class FrameParser:
    """Follows one stream; comments, `id:` and `retry:` are dropped, lines may end in \\n or \\r\\n.

    As in the HTML standard an event without data is no event, and what stands behind the last blank line is not
    one yet: `pending` tells whether there is any. A lone \\r, which the standard also calls a line end, is not
    taken for one: no server sends it, and JSON never holds it.
    """

    __slots__ = ("_data", "_event", "_max", "_partial", "_size")

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max = max_frame
        self._partial: list[bytes] = []  # pieces of a line whose end has not come
        self._data: list[bytes] = []
        self._event: str | None = None
        self._size = 0  # of the frame so far, its partial line included

    @property
    def pending(self) -> bool:
        """Whether bytes of a frame that has not ended are held."""
        return bool(self._partial or self._data or self._event)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order. Raises FrameTooLarge; the parser is of no use after that."""
        head, newline, rest = data.partition(b"\n")
        if not newline:
            if data:
                self._partial.append(data)
                self._grow(len(data))
            return []
        lines = rest.split(b"\n")
        last = lines.pop()
        frames: list[Frame] = []
        if self._partial:
            self._size -= sum(map(len, self._partial))  # _line counts the whole line
            self._partial.append(head)
            head = b"".join(self._partial)
            self._partial.clear()
        self._line(head, frames)
        for line in lines:
            self._line(line, frames)
        if last:
            self._partial.append(last)
            self._grow(len(last))
        return frames

    def _line(self, line: bytes, frames: list[Frame]) -> None:
        if line.endswith(b"\r"):
            line = line[:-1]
        if not line:
            if self._data:
                frames.append(Frame(self._event, self._data[0] if len(self._data) == 1 else b"\n".join(self._data)))
                self._data = []
            self._event = None
            self._size = 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._grow(len(line))
            self._data.append(value[1:] if value.startswith(b" ") else value)
        elif name == b"event":
            self._grow(len(line))
            self._event = (value[1:] if value.startswith(b" ") else value).decode("utf-8", "replace") or None

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max:
            raise FrameTooLarge(f"llama-server sent an event of more than {self._max} bytes")
