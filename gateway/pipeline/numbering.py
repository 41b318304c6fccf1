"""The places of events in a stream of OpenAI's responses, which llama-server leaves out.

Seen on build 11669: its events carry neither `sequence_number` nor `output_index`, without which openai-python's
`responses.stream` fails.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.errors import CorralError
from gateway.framing import frame
from gateway.pipeline.splice import Splice

MOST_HELD = 16 * 1024 * 1024
_NAME = re.compile(rb"event: response\.([a-z_]+)\.?([a-z_]*)\ndata: \{")
_ITEM_ID = re.compile(rb'"item_id":"([^"\\]{1,256})"')
_OF_A_PART = frozenset({b"content_part", b"output_text", b"refusal", b"reasoning_text"})
_OF_AN_ITEM = frozenset({*_OF_A_PART, b"output_item", b"function_call_arguments", b"reasoning_summary_text"})


class Numbering:
    """Follows one stream and gives each event its place. What it does not know, it lets pass as it is."""

    def __init__(self) -> None:
        self._held = b""  # an event that is not whole yet
        self._sequence = 0
        self._items: dict[bytes, int] = {}  # by id, in the order of their coming: `output_index`
        self._parts: dict[int, int] = {}  # how many each item has

    def pass_on(self, payload: bytes, last: bool) -> bytes:
        """What of `payload` can go out, and what was held back before it."""
        data = self._held + payload
        if b"\r\n" in data:  # not llama-server's own way to write events
            self._held = b""
            return data
        end = len(data) if last or len(data) > MOST_HELD else data.rfind(b"\n\n") + 2
        if end < 2:
            self._held = data
            return b""
        self._held = data[end:]
        return b"\n\n".join([self._numbered(event) for event in data[:end].split(b"\n\n")])

    def error(self, event: bytes) -> bytes:
        """Our own error event, which has its place too."""
        return event.replace(b'"sequence_number":0', b'"sequence_number":%d' % self._sequence)

    def _numbered(self, event: bytes) -> bytes:
        name = _NAME.match(event)
        if name is None or b'"sequence_number":' in event:
            return event
        subject, happened = name[1], name[2]
        place = b'"sequence_number":%d,' % self._sequence
        self._sequence += 1
        if subject in _OF_AN_ITEM and b'"output_index":' not in event:
            index = self._index(event, subject, happened)
            place += b'"output_index":%d,' % index
            if subject in _OF_A_PART:
                if subject == b"content_part" and happened == b"added":
                    self._parts[index] = self._parts.get(index, 0) + 1
                place += b'"content_index":%d,' % max(0, self._parts.get(index, 0) - 1)
            if subject == b"output_text" and b'"logprobs":' not in event:
                place += b'"logprobs":[],'
        elif b'"output":' not in event:  # the response as it begins
            event = event.replace(b'"response":{', b'"response":{"output":[],', 1)
        return event[: name.end()] + place + event[name.end() :]

    def _index(self, event: bytes, subject: bytes, happened: bytes) -> int:
        if subject == b"output_item":
            item = _id_of_item(event)
            if happened == b"added":
                self._items[item] = len(self._items)
        else:
            found = _ITEM_ID.search(event)
            item = found[1] if found else b""
        return self._items.get(item, max(0, len(self._items) - 1))


def _id_of_item(event: bytes) -> bytes:
    try:
        item = msgspec.json.decode(event.partition(b"\ndata: ")[2])["item"]
        return str(item.get("id") or item.get("call_id")).encode()
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError, AttributeError):
        return b""


class NumberedSplice(Splice):
    """For a client of `/v1/responses` that streams."""

    def __init__(self, *about: Any, **more: Any) -> None:
        super().__init__(*about, **more)
        self._numbering = Numbering()

    def error_frame(self, error: CorralError) -> bytes:
        return self._numbering.error(super().error_frame(error))

    def feed(self, raw: bytes, payload: bytes, last: bool) -> None:
        payload = self._numbering.pass_on(payload, last)
        if payload or last:
            super().feed(frame(payload) if payload else b"", payload, last)

    def _go_straight(self) -> None:
        """Every event is looked at."""
