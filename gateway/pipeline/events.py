"""Answers for doors that speak another format than llama-server's: all at once, or event by event."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from gateway.connection import Reply
from gateway.errors import BackendError, CorralError, ShuttingDown
from gateway.pipeline.account import Meter, Record
from gateway.pipeline.call import Call
from gateway.pipeline.dialects import Dialect, error_in
from gateway.pipeline.forward import Spine
from gateway.pipeline.frames import Frame, FrameParser
from gateway.pipeline.progress import ProgressFilter
from gateway.refusals import translate_event

MOST_WAITING = 256  # events that nobody has taken yet; then llama-server's connection is read no further


class Collected:
    """An Answer that is kept in memory until it is complete."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.failure: CorralError | None = None
        self.content_type = "application/json"
        self._parts: list[bytes] = []

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self.content_type = reply.headers.get("content-type", self.content_type)

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        self.meter.see(payload)
        self._parts.append(payload)

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.content_type = content_type
        self._parts = [body]


class Events:
    """An Answer whose events are taken by `async for`; that ends with the answer, or raises what went wrong.

    `record` is there when it has ended. While MOST_WAITING events wait to be taken, nothing more is read.
    """

    def __init__(self, dialect: Dialect, meter: Meter) -> None:
        self.meter = meter
        self.failure: CorralError | None = None
        self.record: Record | None = None
        self._dialect = dialect
        self._reply: Reply | None = None
        self._progress: ProgressFilter | None = None
        self._frames = FrameParser()
        self._waiting: deque[Frame] = deque()
        self._paused = self._ended = False
        self._error: CorralError | None = None
        self._news = asyncio.Event()

    # --- the spine's side

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self._reply = reply
        self._progress = ProgressFilter(self.meter) if skip_progress else None

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        if self.failure is not None:
            return
        if self._progress is not None:
            payload = self._progress.pass_on(payload, last)
            if self._progress.over:
                self._progress = None
        if payload:
            self.meter.see(payload)
            self._take(payload)
        if last and self.failure is None and not self._dialect.ended_well(self.meter.tail):
            self.failure = BackendError("llama-server ended its answer before it was complete")
        self._news.set()

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        self._waiting.append(Frame(None, body))
        self._news.set()

    def _take(self, payload: bytes) -> None:
        try:
            frames = self._frames.feed(payload)
        except CorralError as error:  # it must not be raised into the socket's callback
            self.failure = error
            return
        for frame in frames:
            if frame.event == "error" or frame.data.startswith(b'{"error"'):
                self.failure = translate_event(error_in(b"data: " + frame.data) or {})
                return
            self._waiting.append(frame)
        if len(self._waiting) > MOST_WAITING and self._reply is not None:
            self._paused = True
            self._reply.pause()

    # --- the door's side

    def end(self, error: CorralError | None) -> None:
        """The spine has done with it."""
        self._ended, self._error = True, error
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Frame]:
        while True:
            while self._waiting:
                yield self._waiting.popleft()
            if self._ended:
                if self._error is not None:
                    raise self._error
                return
            if self._paused and self._reply is not None:
                self._paused = False
                self._reply.resume()
            self._news.clear()
            await self._news.wait()


async def collected(spine: Spine, call: Call, meter: Meter) -> tuple[Collected, Record]:
    """The whole answer of a call that does not stream. Raises CorralError."""
    answer = Collected(meter)
    record = await spine.forward(call, answer)
    return answer, record


@contextlib.asynccontextmanager
async def events_of(spine: Spine, call: Call, meter: Meter) -> AsyncIterator[Events]:
    """The events of a call that streams; leaving the block early ends the call, and frees its slot."""
    events = Events(call.route.dialect, meter)
    left = False

    async def run() -> None:
        try:
            events.record = await spine.forward(call, events)
        except CorralError as error:
            events.end(error)
        except asyncio.CancelledError:
            events.end(ShuttingDown("the service is shutting down", retry_after=5))
            if left:
                raise
        except BaseException:
            events.end(CorralError("something went wrong inside the gateway"))
            raise
        else:
            events.end(None)

    task = asyncio.create_task(run(), name=f"call {call.request_id}")
    try:
        yield events
    finally:
        left = True
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def text_in(dialect: Dialect, frame: Frame) -> str:
    """The generated text in one event of a stream, of the first answer where there are several; most often a token.

    Empty for events without any. Raises BackendError for one that cannot be read.
    """
    if frame.data == b"[DONE]" or frame.data == b"null":
        return ""
    try:
        event = msgspec.json.decode(frame.data)
        found = _text(dialect, event)
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise BackendError(f"llama-server sent an event that cannot be read: {error}") from None
    return found if isinstance(found, str) else ""


def _text(dialect: Dialect, event: dict[str, object]) -> object:
    told: dict[str, object] = event
    if dialect is Dialect.CHAT or dialect is Dialect.COMPLETIONS:
        choices = told.get("choices")
        if not isinstance(choices, list) or not choices or choices[0].get("index"):
            return None
        return choices[0]["delta"].get("content") if dialect is Dialect.CHAT else choices[0].get("text")
    if dialect is Dialect.NATIVE:
        return None if told.get("index") else told.get("content")
    if dialect is Dialect.MESSAGES:
        delta = told.get("delta")
        return delta.get("text") if isinstance(delta, dict) else None
    return told.get("delta") if told.get("type") == "response.output_text.delta" else None
