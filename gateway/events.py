"""Things that happen to the service rather than to a request: one line in the log, and one call to each listener."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("corral.events")


@dataclass(frozen=True, slots=True)
class Event:
    """`code` is a dotted name such as `model.loaded`; `data` holds the figures behind the message."""

    code: str
    message: str
    level: int = logging.INFO
    data: dict[str, Any] = field(default_factory=dict)
    ts: float = field(default_factory=time.time)


class Events:
    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def listen(self, callback: Callable[[Event], None]) -> None:
        self._listeners.append(callback)

    def emit(self, code: str, message: str, level: int = logging.INFO, **data: Any) -> None:
        event = Event(code, message, level, data)
        log.log(level, "%s: %s", code, message, extra={"model": data.get("model")})
        for listener in self._listeners:
            listener(event)
