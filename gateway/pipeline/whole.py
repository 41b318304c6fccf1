"""Collects the stream that was asked for on behalf of a client that wants its answer in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import CorralError
from gateway.pipeline.account import Meter
from gateway.pipeline.assemble import StreamFailed, assembler
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.frames import FrameParser
from gateway.pipeline.progress import ProgressFilter
from gateway.refusals import translate_event


class WholeAnswer:
    """A backend.Sink; `result()` is the JSON that llama-server would have given without streaming."""

    def __init__(self, dialect: Dialect, request: Mapping[str, Any], meter: Meter) -> None:
        self._frames = FrameParser()
        self._assembler = assembler(dialect, request)
        self._meter = meter
        meter.assembled = True  # also if it is cut before there is a whole answer
        self._progress: ProgressFilter | None = ProgressFilter(meter)
        self._failure: CorralError | None = None

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        if self._progress is not None:
            payload = self._progress.pass_on(payload, last)
            if self._progress.over:
                self._progress = None
        if self._failure is not None or not payload:
            return
        self._meter.see(payload)
        try:
            for each in self._frames.feed(payload):
                self._assembler.feed(each)
        except CorralError as error:  # it must not be raised into the socket's callback
            self._failure = error

    def result(self) -> bytes:
        """Raises BackendError where the stream was cut, and what llama-server's error in it stands for."""
        if self._failure is not None:
            raise self._failure
        try:
            return self._assembler.result()
        except StreamFailed as failed:
            raise translate_event(failed.error) from None
