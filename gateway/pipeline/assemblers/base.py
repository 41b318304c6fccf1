"""What all assemblers share: following a stream to its end, and telling whether that end is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.errors import BackendError
from gateway.pipeline.frames import Frame
from gateway.pipeline.usage import Usage

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class StreamCut(BackendError):
    """The stream ended without its dialect's terminator, or an event of it could not be read."""


class StreamFailed(BackendError):
    """llama-server ended the stream with an error; `error` is its object: `code` (an integer), `message`, `type`."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message") or "llama-server reported an error"))
        self.error = error


class Assembler(ABC):
    """Takes a stream's frames and gives the answer that llama-server would have given without streaming.

    Equal but for ids, times and counts of cached tokens, and for an answer that its bound cut off while the stream
    held something back: half a character (else shown as U+FFFD), or tokens that could have begun a stop string.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        self.request = request
        self.finished = False  # the dialect's terminator has come; nothing that matters follows
        self._error: dict[str, Any] | None = None

    def feed(self, frame: Frame) -> None:
        """The next frame. Raises StreamCut if it cannot be read; an error in it is raised by `result`."""
        data = frame.data
        if data == b"[DONE]":
            self.finished = True  # only OpenAI's older dialects end with it, and no other sends it
        elif data != b"null":  # with several answers llama-server may begin the stream with `data: null`
            try:
                self._take(frame.event, data)
            except (*UNREADABLE, LookupError, TypeError, AttributeError) as error:
                raise StreamCut(f"llama-server sent an event that cannot be read: {error}") from error

    def result(self) -> bytes:
        """The answer's JSON. Raises StreamFailed after an error in the stream, StreamCut if it did not end."""
        if self._error is not None:
            raise StreamFailed(self._error)
        if not self.finished:
            raise StreamCut("llama-server's answer broke off")
        return msgspec.json.encode(self._result())

    @property
    @abstractmethod
    def usage(self) -> Usage:
        """All tokens that the stream told of so far. With several answers their sum, unlike the `usage` in the
        result: there llama-server counts the first answer only."""

    @abstractmethod
    def _take(self, event: str | None, data: bytes) -> None: ...

    @abstractmethod
    def _result(self) -> Any: ...

    def _decode(self, data: bytes) -> dict[str, Any] | None:
        """The event as an object; None if it is an error, which is noted."""
        told: dict[str, Any] = _objects.decode(data)
        error = told.get("error")
        if error:
            self._error = error if isinstance(error, dict) else {"message": str(error)}
            return None
        return told


_objects = msgspec.json.Decoder(dict[str, Any])


def merge(old: Any, new: Any) -> Any:
    """A delta's value upon what came before it, which it may change: texts and lists are joined, objects merged."""
    if new is None:
        return old
    if isinstance(old, str) and isinstance(new, str):
        return old + new
    if isinstance(old, list) and isinstance(new, list):
        old += new
        return old
    if isinstance(old, dict) and isinstance(new, dict):
        for name, value in new.items():
            old[name] = merge(old.get(name), value)
        return old
    return new
