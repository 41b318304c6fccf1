"""What of a multipart form has to be known here: the model that it names. The form itself is forwarded as it came."""

from __future__ import annotations

import re

from gateway.errors import BadRequest

MOST_HEAD_BYTES = 4096  # of one part
MOST_VALUE_BYTES = 1024
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_DISPOSITION = re.compile(rb"^content-disposition:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)
_NAME = re.compile(rb';\s*name=(?:"([^"]*)"|([^\s;"]+))', re.IGNORECASE)


def form_field(body: bytes, content_type: str, name: str) -> str | None:
    """The text of the first field with this name; None where there is none, or an empty one. Raises BadRequest."""
    found = _BOUNDARY.search(content_type)
    if found is None:
        raise BadRequest("Content-Type names no boundary, so the form cannot be read")
    delimiter = b"--" + (found[1] or found[2]).encode()
    start = 0 if body.startswith(delimiter) else body.find(b"\r\n" + delimiter) + 2
    if start == 1:
        return None
    start += len(delimiter)
    while body.startswith(b"\r\n", start):
        end = body.find(b"\r\n" + delimiter, start)
        if end < 0:
            return None
        head_end = body.find(b"\r\n\r\n", start, min(end, start + MOST_HEAD_BYTES))
        if head_end >= 0 and _name_in(body[start + 2 : head_end]) == name.encode():
            return _text(body, head_end + 4, end, name)
        start = end + 2 + len(delimiter)
    return None


def _name_in(head: bytes) -> bytes | None:
    about = _DISPOSITION.search(head)
    named = _NAME.search(about[1]) if about else None
    return (named[1] or named[2]) if named else None


def _text(body: bytes, start: int, end: int, name: str) -> str | None:
    if end - start > MOST_VALUE_BYTES:
        raise BadRequest(f"{name} has {end - start} bytes: at most {MOST_VALUE_BYTES} are allowed", param=name)
    try:
        return body[start:end].decode().strip() or None
    except UnicodeDecodeError:
        raise BadRequest(f"{name} is not UTF-8", param=name) from None
