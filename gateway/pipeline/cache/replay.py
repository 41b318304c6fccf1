"""An answer recorded while it passes, and given again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from gateway.connection import Reply
from gateway.errors import CorralError
from gateway.framing import Framing, frame
from gateway.pipeline.account import Meter
from gateway.pipeline.progress import ProgressFilter
from gateway.pipeline.splice import Answer
from gateway.stores.cache.answers import MOST_ENTRY, Stored

PIECE = 32 * 1024  # bytes at once: a slow client stops it between two


class Recording:
    """An Answer that passes everything on to another one and keeps what a client gets of it, up to MOST_ENTRY."""

    def __init__(self, answer: Answer, too_large: Callable[[], None]) -> None:
        self._answer = answer
        self._too_large = too_large
        self.meter: Meter = answer.meter
        self._content_type = "application/json"
        self._progress: ProgressFilter | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._complete = False

    @property
    def failure(self) -> CorralError | None:
        return self._answer.failure

    def made(self, now: float) -> Stored | None:
        """None where it did not come to its end, or is too large; `now` is unix seconds."""
        whole = self._complete and self.failure is None and self._size <= MOST_ENTRY
        return Stored(b"".join(self._parts), self._content_type, now) if whole else None

    def begin(self, reply: Reply, *, skip_progress: bool = False) -> None:
        self._parts, self._size, self._complete = [], 0, False  # of a server that died nothing has been passed on
        self._progress = ProgressFilter(self.meter) if skip_progress else None
        self._content_type = reply.headers.get("content-type", self._content_type)
        self._answer.begin(reply, skip_progress=skip_progress)

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        self._answer.feed(raw, payload, last)
        if self._progress is not None:
            payload = self._progress.pass_on(payload, last)
            if self._progress.over:
                self._progress = None
        self._keep(payload)
        self._complete = last

    def whole(self, status: int, content_type: str, body: bytes) -> None:
        self._parts, self._size = [], 0
        self._content_type = content_type
        self._keep(body)
        self._complete = status == 200
        self._answer.whole(status, content_type, body)

    def _keep(self, payload: bytes) -> None:
        before, self._size = self._size, self._size + len(payload)
        if self._size <= MOST_ENTRY:
            self._parts.append(payload)
        elif before <= MOST_ENTRY:
            self._parts = []
            self._too_large()


class Replay(Reply):
    """A response of no connection: what a Splice asks of one."""

    __slots__ = ("_going",)

    def __init__(self, headers: Mapping[str, str], framing: Framing) -> None:
        self.status, self.headers, self.framing = 200, headers, framing
        self._going = asyncio.Event()
        self._going.set()

    async def going(self) -> None:
        """Until whoever takes it can take more."""
        await self._going.wait()

    def pause(self) -> None:
        self._going.clear()

    def resume(self) -> None:
        self._going.set()

    def close(self, error: CorralError | None = None) -> None:
        self._going.set()

    def go_straight(self, sink: object, through: object) -> None:
        """There is no socket to go straight from."""


async def replay(stored: Stored, answer: Answer, *, stream: bool) -> None:
    """Raises what `answer` finds wrong with it."""
    body, headers = stored.body, {"content-type": stored.content_type}
    if not stream:
        headers["content-length"] = str(len(body))
    reply = Replay(headers, Framing.CHUNKED if stream else Framing.LENGTH)
    answer.begin(reply)
    for start in range(0, len(body), PIECE):
        await reply.going()
        piece, last = body[start : start + PIECE], start + PIECE >= len(body)
        answer.feed(frame(piece) if stream else piece, piece, last)
    if answer.failure is not None:
        raise answer.failure
