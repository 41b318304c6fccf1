"""Server-sent events of the board. What waits for a reader are names, not events: however slowly it reads, it gets the
newest state, and takes no more room than there are models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from gateway.state import Board

HEARTBEAT_SECONDS = 15.0
HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(name: str, data: Mapping[str, Any]) -> bytes:
    """One event. It has no `id:`, with which clients of streams take a comment line for an event."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Changes:
    """What has changed on the board since its reader last looked: model ids, and None for the service."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._names: set[str | None] = set()
        self._news = asyncio.Event()
        self._stop: Callable[[], None] | None = None

    def __enter__(self) -> Changes:
        self._stop = self._board.listen(self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stop is not None:
            self._stop()

    def _note(self, name: str | None) -> None:
        self._names.add(name)
        self._news.set()

    async def take(self, within: float) -> set[str | None]:
        """The names, as soon as there is one; none after `within` seconds."""
        try:
            async with asyncio.timeout(within):
                await self._news.wait()
        except TimeoutError:
            return set()
        self._news.clear()
        names, self._names = self._names, set()
        return names
