"""Progress events of the prefill, which the gateway asks for on its own account and takes out again.

Why: before its first event llama-server does not look whether its client is still there, unless nothing at all
happens in it for a second. With `return_progress` it sends an event after each batch, and so notices. Seen on build
11669: a client that left during the prefill, beside other work: 0.5 s with it, the whole prefill without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.pipeline.call import Fields
from gateway.pipeline.dialects import Dialect

if TYPE_CHECKING:
    from gateway.pipeline.account import Meter

PROGRESS_FIELD = "return_progress"
# In /v1/messages it changes nothing; in /v1/responses it takes the place of an event that clients may wait for.
TELL_PROGRESS = frozenset({Dialect.CHAT, Dialect.COMPLETIONS, Dialect.NATIVE})
_MARK = b'"prompt_progress":{'


def ask_progress(dialect: Dialect, fields: Fields) -> bool:
    """Add the field to a streaming request, unless the client decided on it itself; whether it was added."""
    if dialect not in TELL_PROGRESS or PROGRESS_FIELD in fields:
        return False
    fields[PROGRESS_FIELD] = msgspec.Raw(b"true")
    return True


class ProgressFilter:
    """Looks at the first events of a stream and drops those of progress; `over` at the first other one.

    `meter` is left the last one dropped: of a stream that is cut nothing else tells how long its prompt was.
    """

    __slots__ = ("_held", "_meter", "over")

    def __init__(self, meter: Meter) -> None:
        self.over = False
        self._meter = meter
        self._held = b""  # an event that is not whole yet

    def pass_on(self, payload: bytes, last: bool) -> bytes:
        """What of `payload` is for the client."""
        data = self._held + payload
        self._held = b""
        if b"\r\n" in data:  # not llama-server's own way to write events: it knows nothing of progress either
            self.over = True
            return data
        while (end := data.find(b"\n\n")) >= 0:
            if data.find(_MARK, 0, end) < 0:
                self.over = True
                return data
            self._meter.prefill = data[:end]
            data = data[end + 2 :]
        if last:
            self.over = True
            return data
        self._held = data
        return b""
