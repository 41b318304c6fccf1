"""An answer's way to an HTTP client: llama-server's bytes from socket to socket in whole chunks, unparsed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from gateway.connection import Reply
from gateway.errors import BackendError, CorralError
from gateway.framing import LAST_CHUNK, SIZE_LINES, Framing, frame
from gateway.pipeline.account import MOST_CHUNKS, Meter
from gateway.pipeline.dialects import Dialect, error_in
from gateway.pipeline.progress import ProgressFilter
from gateway.refusals import translate_event

PING = b": ping\n\n"
_MOST_STRAIGHT = len(SIZE_LINES)
LINGER_SECONDS = 10.0  # a client that does not read its last bytes is cut then

Headers = list[tuple[str, str]]


# Where an error event begins, in any dialect; see dialects.error_in.
_ERROR = re.compile(rb'^(?:data: ?\{"error"|event: ?error)', re.MULTILINE)


class _Wire(Enum):
    """How what comes is put on the client's wire."""

    PLAIN = auto()  # a body of known length, or an HTTP/1.0 client
    AS_IT_COMES = auto()  # chunks as llama-server made them
    FRAMED_ANEW = auto()


class Answer(Protocol):
    """Where the spine sends an answer to; each door has one."""

    meter: Meter

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None: ...

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None: ...

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        """An answer that is there all at once."""

    @property
    def failure(self) -> CorralError | None:
        """What went wrong inside the stream itself, once it has ended."""


class Splice:
    """Writes to a client's transport. `head(status, headers)` gives the bytes of a response head.

    What stands on the wire is always whole chunks, so that a ping or an error frame can be put behind them.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        head: Callable[[int, Headers], bytes],
        dialect: Dialect,
        meter: Meter,
        *,
        stream: bool,
        chunked: bool,
    ) -> None:
        self.meter = meter
        self.begun = False  # bytes have gone to the client: there is no second status line
        self.finished = False
        self.was_cut = False
        self.failure: CorralError | None = None
        self.quiet = 0  # looks of the pinger since something was written
        self.stream = stream
        self._transport = transport
        self._head = head
        self._dialect = dialect
        self._chunked = chunked  # the client speaks HTTP/1.1
        self._wire = _Wire.PLAIN
        self._straight = False
        self._progress: ProgressFilter | None = None
        self._counted = False  # the client was told a length: nothing may be put between
        self._behind = False  # the client reads slowly; it may have been so before llama-server's answer began
        self._pending = b""  # the head, until it can go out with the first bytes
        self._reply: Reply | None = None

    # --- the spine's side

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self._reply = reply
        self._progress = ProgressFilter(self.meter) if skip_progress else None
        framing = reply.framing
        counted = framing in (Framing.LENGTH, Framing.NONE) and not skip_progress
        if not self._chunked or (counted and not self.begun):
            self._wire = _Wire.PLAIN
        else:
            self._wire = _Wire.AS_IT_COMES if framing is Framing.CHUNKED else _Wire.FRAMED_ANEW
        if self.begun:
            return  # pings have gone out: the client has its head
        headers = [("Content-Type", reply.headers.get("content-type", "application/json"))]
        self._counted = counted
        if not counted:
            headers += self._open_ended()
        elif framing is Framing.LENGTH:
            headers.append(("Content-Length", reply.headers["content-length"]))
        if self.stream:
            headers += _STREAM_HEADERS
        self._pending = self._head(reply.status, headers)

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        """From the socket of llama-server; see backend.Sink."""
        if self.failure is not None or self.finished:
            return
        if self._progress is not None:
            payload = self._progress.pass_on(payload, last)
            raw = frame(payload) if payload else b""
            if self._progress.over:
                self._progress = None
        if self.stream and b"error" in payload and (error := _ERROR.search(payload)):
            self.failure = translate_event(error_in(payload[error.start() :]) or {})
            payload = payload[: error.start()]  # what came before it is the client's
            raw = frame(payload) if payload else b""
        if payload:
            self.meter.see(payload)
        if self._wire is _Wire.AS_IT_COMES:
            out = raw
        elif self._wire is _Wire.PLAIN or not payload:
            out = payload
        else:
            out = frame(payload)
        if last and self.failure is None:
            out += self._end()
        if out or self.finished:  # a head alone commits to nothing: until then an error has a status of its own
            self._write(out)
        if self._behind and self._reply is not None:
            self._reply.pause()
        self._go_straight()

    def _go_straight(self) -> None:
        """The head is out: what follows goes through as it is, but for what `_through` does not know."""
        fit = self.begun and self.stream and self._wire is _Wire.AS_IT_COMES and self._progress is None
        fit = fit and self.failure is None and not self.finished
        if fit is not self._straight and self._reply is not None:
            self._straight = fit
            self._reply.go_straight(self, self._through if fit else None)

    def _through(self, raw: bytes) -> bool:
        """A token's way; see connection.Straight."""
        total = len(raw)
        if total >= _MOST_STRAIGHT or not raw.startswith(SIZE_LINES[total]) or not raw.endswith(b"\r\n"):
            return False
        if b"error" in raw or self._transport.is_closing():
            return False
        self._transport.write(raw)
        self.quiet = 0
        meter = self.meter
        meter.chunks.append(raw)
        if len(meter.chunks) >= MOST_CHUNKS:
            meter.look()
        return True

    def _end(self) -> bytes:
        """What closes the body on the client's wire."""
        if self.stream and not self._dialect.ended_well(self.meter.tail):
            self.failure = BackendError("llama-server ended its answer before it was complete")
            return b""
        self.finished = True
        return b"" if self._wire is _Wire.PLAIN else LAST_CHUNK

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.finished = True
        self._write(self._head(status, [("Content-Type", content_type), ("Content-Length", str(len(body)))]) + body)

    # --- the door's side

    def ping(self) -> None:
        """A comment on a silent stream, so that nobody on the way takes it for dead. The first one commits a 200."""
        if self.finished or self._counted or self._transport.is_closing():
            return
        if not self.begun and not self._pending:
            headers = [("Content-Type", "text/event-stream"), *self._open_ended(), *_STREAM_HEADERS]
            self._pending = self._head(200, headers)
        if self._between_events:
            self._write(frame(PING) if self._chunked else PING)

    def fail(self, error: CorralError) -> None:
        """The answer has begun and cannot go on: one error frame, then the connection is cut, never ended cleanly."""
        if self.stream and not self._counted and not self._transport.is_closing():
            text = self.error_frame(error)
            if not self._between_events:
                text = b"\n\n" + text
            self._write(frame(text) if self._chunked else text)
        self.cut()

    def error_frame(self, error: CorralError) -> bytes:
        return self._dialect.error_frame(error.body())

    def cut(self) -> None:
        self.finished = self.was_cut = True
        self._go_straight()
        if self._reply is not None:
            self._reply.close()
        if not self._transport.is_closing():
            self._transport.close()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._transport.abort)

    def pause_writing(self) -> None:
        """The client reads slowly: stop reading from llama-server until it has caught up."""
        self._behind = True
        if self._reply is not None:
            self._reply.pause()

    def resume_writing(self) -> None:
        self._behind = False
        if self._reply is not None:
            self._reply.resume()

    @property
    def _between_events(self) -> bool:
        return not self.meter.tail or self.meter.tail.endswith((b"\n\n", b"\r\n\r\n"))

    def _open_ended(self) -> Headers:
        return [("Transfer-Encoding", "chunked")] if self._chunked else []

    def _write(self, data: bytes) -> None:
        if self._pending:
            data, self._pending = self._pending + data, b""
        if data:
            self.begun = True
            self.quiet = 0
            if not self._transport.is_closing():  # reset by the client: uvloop raises, and takes the wrong side down
                self._transport.write(data)


_STREAM_HEADERS: Headers = [("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]


class Pinger:
    """Sends pings on streams that have been silent; one pass over all of them, no timer for each."""

    LOOKS = 4  # in each interval: a ping comes after 1 to 1.25 intervals of silence

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._next = 0.0
        self._streams: set[Splice] = set()

    def add(self, splice: Splice) -> None:
        if self._interval:
            self._streams.add(splice)

    def discard(self, splice: Splice) -> None:
        self._streams.discard(splice)

    def tick(self, now: float) -> None:
        if now < self._next:
            return
        step = self._interval / self.LOOKS
        looks = 1 + int((now - self._next) / step) if self._next and step else 1  # a short step is shorter than a tick
        self._next = now + step
        for splice in tuple(self._streams):
            splice.quiet += looks
            if splice.quiet > self.LOOKS:
                splice.ping()
                splice.quiet = 1
