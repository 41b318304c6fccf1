"""HTTP/1.1 response framing, without sockets: the head, how the body ends, and chunks passed on whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from types import MappingProxyType

MAX_WHOLE_CHUNK = 64 * 1024  # a larger chunk is passed on in pieces, each framed anew
MAX_SIZE_LINE = 1024
LAST_CHUNK = b"0\r\n\r\n"


class Framing(Enum):
    NONE = auto()
    LENGTH = auto()
    CHUNKED = auto()
    UNTIL_CLOSE = auto()


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """`length` is that of the body in bytes, where its framing is LENGTH."""

    status: int
    headers: Mapping[str, str]  # lower-case names
    framing: Framing
    length: int
    keep_alive: bool


def parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Status, headers (lower-case names; the last of a repeated one) and whether the connection stays open.

    Raises ValueError.
    """
    lines = head.decode("latin-1").split("\r\n")
    version, _, rest = lines[0].partition(" ")
    code = rest.partition(" ")[0]
    if version not in ("HTTP/1.1", "HTTP/1.0") or not (code.isascii() and code.isdigit() and len(code) == 3):
        raise ValueError(f"{lines[0][:60]!r}")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(f"{line[:60]!r}")
        name, value = name.strip().lower(), value.strip()
        if name == "content-length" and headers.get(name, value) != value:
            raise ValueError("two lengths")
        headers[name] = value
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection if version == "HTTP/1.1" else "keep-alive" in connection
    return int(code), headers, keep_alive


def body_framing(method: str, status: int, headers: Mapping[str, str]) -> tuple[Framing, int]:
    """How a response's body ends (RFC 9112, section 6.3), and its length where that is known.

    Raises ValueError.
    """
    if method == "HEAD" or status < 200 or status in (204, 304):
        return Framing.NONE, 0
    if encoding := headers.get("transfer-encoding"):
        if encoding.lower() != "chunked":
            raise ValueError(f"transfer-encoding {encoding[:40]!r}")
        return Framing.CHUNKED, 0
    if (length := headers.get("content-length")) is not None:
        if not (length.isascii() and length.isdigit()):
            raise ValueError(f"content-length {length[:40]!r}")
        return Framing.LENGTH, int(length)
    return Framing.UNTIL_CLOSE, 0


def frame(payload: bytes) -> bytes:
    """`payload` as one HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


@lru_cache(maxsize=256)
def read_head(method: str, head: bytes) -> ResponseHead:
    """Raises ValueError. Remembered, because llama-server's heads differ in nothing but a length."""
    status, headers, keep_alive = parse_head(head)
    framing, length = body_framing(method, status, headers)
    return ResponseHead(status, MappingProxyType(headers), framing, length, keep_alive)


def chunk_size(line: bytes) -> int:
    """Raises ValueError; extensions behind `;` are ignored."""
    digits = line.partition(b";")[0].strip() if b";" in line else line
    if not digits.isalnum() or len(digits) > 15 or b"x" in digits or b"X" in digits:
        raise ValueError(f"size {line[:20]!r}")
    return int(digits, 16)


def whole_chunk(data: bytes) -> int:
    """Where the payload begins if `data` is exactly one chunk, as llama-server writes one for each token; else 0."""
    total = len(data)
    line = SIZE_LINES[total] if total < len(SIZE_LINES) else _size_line(total)
    return len(line) if data.startswith(line) and data.endswith(b"\r\n") else 0


def _size_line(total: int) -> bytes:
    """The size line of the only chunk of so many bytes in all; where there is none, one that is longer still."""
    for digits in range(1, 16):
        size = total - digits - 4
        if size > 0 and len(b"%x" % size) == digits:
            return b"%x\r\n" % size
    return b"\n" * (total + 1)


SIZE_LINES = [_size_line(total) for total in range(2048)]  # looked at with each token


class ChunkReader:
    """Follows chunked framing over any boundaries and lets only whole chunks through.

    Whole, because an error frame that the gateway must add later can then never fall into the middle of one.
    """

    __slots__ = ("_left", "_line_end", "_rest", "excess")

    def __init__(self) -> None:
        self._rest = b""  # of a chunk that is not whole yet
        self._left = 0  # bytes still to come of a large chunk
        self._line_end = 0  # and of the line end behind it
        self.excess = False  # something followed the body's end

    @property
    def between(self) -> bool:
        """Whether a chunk begins with the next byte."""
        return not (self._rest or self._left or self._line_end)

    def feed(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """Returns the raw whole chunks without the terminator, their payload, and whether the body has ended.

        Raises ValueError where this is not chunked framing.
        """
        if not (self._rest or self._left or self._line_end) and (begin := whole_chunk(data)):
            return data, data[begin:-2], False
        return self._follow(data)

    def _follow(self, data: bytes) -> tuple[bytes, bytes, bool]:
        if self._rest:
            data, self._rest = self._rest + data, b""
        raw: list[bytes] = []
        payload: list[bytes] = []
        pos = self._large(data, 0, raw, payload) if self._left or self._line_end else 0
        begun, last = pos, False  # `begun`: where the run of untouched chunks begins
        while not (self._left or self._line_end):
            eol = data.find(b"\r\n", pos)
            if eol < 0:
                if len(data) - pos > MAX_SIZE_LINE:
                    raise ValueError("its size line does not end")
                break
            size = chunk_size(data[pos:eol])
            begin, end = eol + 2, eol + 2 + size
            if size == 0:
                last = self._terminator(data, eol)
                break
            if end + 2 <= len(data):
                if data[end : end + 2] != b"\r\n":
                    raise ValueError("it is longer than it says")
                payload.append(data[begin:end])
                pos = end + 2
            elif size > MAX_WHOLE_CHUNK:
                if pos > begun:
                    raw.append(data[begun:pos])
                self._left, self._line_end = size, 2
                begun = pos = self._large(data, begin, raw, payload)
            else:
                break
        if pos > begun:
            raw.append(data[begun:pos])
        if not last:
            self._rest = data[pos:]
        return _joined(raw), _joined(payload), last

    def _terminator(self, data: bytes, eol: int) -> bool:
        """Whether the last chunk is whole; trailers are dropped."""
        end = data.find(b"\r\n\r\n", eol)
        if end < 0:
            if len(data) - eol > 64 * MAX_SIZE_LINE:
                raise ValueError("its trailers do not end")
            return False
        self.excess = end + 4 < len(data)
        return True

    def _large(self, data: bytes, pos: int, raw: list[bytes], payload: list[bytes]) -> int:
        """Pass on what has come of a large chunk; returns where in `data` that ends."""
        piece = data[pos : pos + self._left]
        if piece:
            self._left -= len(piece)
            pos += len(piece)
            payload.append(piece)
            raw.append(frame(piece))
        if self._left == 0:
            tail = data[pos : pos + self._line_end]
            if tail != b"\r\n"[2 - self._line_end :][: len(tail)]:
                raise ValueError("it is longer than it says")
            self._line_end -= len(tail)
            pos += len(tail)
        return pos


def _joined(parts: list[bytes]) -> bytes:
    return parts[0] if len(parts) == 1 else b"".join(parts)
