"""What a child process writes, read in whole heaps: line by line it would cost more than the requests it tells of."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import fcntl
import os
import re
from collections import deque
from collections.abc import Callable

READ_EVERY_SECONDS = 0.05
MOST_OF_A_LINE = 4096  # bytes
_PIPE_BYTES = 1 << 20  # what a process without privileges may ask for; a full pipe would stop llama-server
_TAIL_LINES = 40

# Behind these llama-server quotes requests and answers, on as many lines as those have. Found on build 11669, with
# a marker in every field of requests that it refuses, and in its programs' texts.
_QUOTES = (
    b"exception: ",  # got exception: {"error":{"code":500,"message":"Failed to parse messages: …","type":"…"}}
    b"parsing grammar: ",  # and then all of it
    b"sampler for grammar:",
    b"conversion was incomplete: ",  # of a JSON schema
    b": unparsed ",  # an answer in which it looked for tool calls
    b"Responses tool type ",
    b"content part",
    b"tool without function: ",
    b"accepting piece: ",
)
_QUOTE = re.compile(b"|".join(map(re.escape, _QUOTES)))
# Where it speaks for itself again: `0.01.443.868 I slot …`, without the time `slot …`; or it dies.
_OWN_WORDS = re.compile(
    rb"(?:\x1b\[[\d;]*m)*(?:\d+\.\d\d\.\d{3}\.\d{3} |(?:srv|slot|que|cmn|spec) )|terminate called |\S+:\d+: GGML_"
)
# An echoed grammar may have others' words in its midst: it is written in pieces, past the logger, which ends it so.
_GRAMMAR, _GRAMMAR_ENDED = b"parsing grammar: ", b"failed to parse grammar"
_ERROR = re.compile(rb'\{"error":\{"code":(\d+),')
_KIND = re.compile(rb',"type":"(\w+)"\}\}$')


class Discretion:
    """What may be told of one llama-server's output: all but what it quotes of requests and answers."""

    def __init__(self) -> None:
        self._quoting = self._in_grammar = False

    def __call__(self, heap: bytes) -> bytes:
        """`heap` is of whole lines, and so is what is left of it. Nearly always nothing is quoted: that is quick."""
        if not self._quoting and not any(quote in heap for quote in _QUOTES):
            return heap
        return b"".join([told + b"\n" for line in heap.split(b"\n")[:-1] if (told := self._told(line)) is not None])

    def _told(self, line: bytes) -> bytes | None:
        own, quote = _OWN_WORDS.match(line), _QUOTE.search(line)
        if self._quoting and not own:
            self._in_grammar |= _GRAMMAR in line
            return None
        self._in_grammar &= _GRAMMAR_ENDED not in line
        self._quoting = self._in_grammar
        if quote is None:
            return line
        quoted = line[quote.end() :]
        self._in_grammar |= quote[0] == _GRAMMAR
        self._quoting |= not _ERROR.match(quoted)  # in JSON a line's end is written as \n
        return line[: quote.end()] + b"[left out" + _about(quoted) + b"]"


def _about(quoted: bytes) -> bytes:
    """What an error says of itself that is no quotation."""
    code, kind = _ERROR.match(quoted), _KIND.search(quoted)
    words = [name + found[1] for name, found in ((b"code ", code), (b"type ", kind)) if found]
    return b": " + b", ".join(words) if words else b""


class Output:
    """A pipe's reading end, and the only owner of its descriptor. The last lines are kept, without quotations.

    All of it goes to `take` as it is, in heaps of whole lines; of a long one the beginning.
    """

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self.ended = asyncio.Event()
        self._take = take
        self._discretion = Discretion()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._partial = b""
        self._left_out = 0  # bytes of the line that has not ended
        self._loop = asyncio.get_running_loop()
        self._readable: int | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._rests = True

    @property
    def last_lines(self) -> list[str]:
        if not self._partial:
            return list(self._tail)
        last = copy.copy(self._discretion)(self._partial + b"\n")
        return [*self._tail, *last.decode(errors="replace").splitlines()]

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
            if self._partial:
                self._pass_on(b"\n")
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
        self._pass_on(data)
        if self._rests:
            self._loop.remove_reader(self._readable)
            self._resting = self._loop.call_later(READ_EVERY_SECONDS, self._read_on)

    def _pass_on(self, data: bytes) -> None:
        *lines, partial = (self._partial + data).split(b"\n")
        if lines:
            if self._left_out or max(map(len, lines)) > MOST_OF_A_LINE:
                lines = [_shortened(lines[0], self._left_out), *map(_shortened, lines[1:])]
                self._left_out = 0
            heap = b"\n".join([*lines, b""])
            self._take(heap)
            told = self._discretion(heap).rsplit(b"\n", _TAIL_LINES + 1)
            self._tail.extend(line.decode(errors="replace") for line in told[-_TAIL_LINES - 1 : -1])
        self._partial = partial[:MOST_OF_A_LINE]
        self._left_out += len(partial) - len(self._partial)

    def _read_on(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
        if self._readable is not None:
            self._loop.add_reader(self._readable, self._read)


def _shortened(line: bytes, left_out: int = 0) -> bytes:
    surplus = left_out + max(0, len(line) - MOST_OF_A_LINE)
    return line[:MOST_OF_A_LINE] + b" [%d bytes left out]" % surplus if surplus else line
