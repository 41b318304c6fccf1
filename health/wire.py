"""HTTP/1.1, as much as a probe needs: takes requests off a buffer, builds responses; no sockets, no clocks but Date."""

from __future__ import annotations

import time

MAX_HEAD = 8192
TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
HEX = frozenset(b"0123456789abcdefABCDEF")
REASONS = {
    200: "OK",
    204: "No Content",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}


class Refused(Exception):
    """These bytes are no request that we answer; the connection cannot go on after `status`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Request:
    """`last` means that no further request can follow on this connection."""

    __slots__ = ("last", "method", "old", "path")

    def __init__(self, method: str, path: str, *, last: bool, old: bool) -> None:
        self.method = method
        self.path = path
        self.last = last
        self.old = old  # HTTP/1.0: keep-alive has to be said


def take(buffer: bytearray) -> Request | None:
    """Removes one request head from the front of `buffer`; None if it is not complete yet. Raises Refused."""
    while buffer.startswith((b"\r", b"\n")):  # RFC 9112 2.2: empty lines before a request are to be tolerated
        del buffer[:1]
    end, length = _end_of_head(buffer)
    if (end if length else len(buffer)) > MAX_HEAD:
        raise Refused(431, f"the request's head is longer than {MAX_HEAD} bytes")
    if not length:
        return None
    lines = [line.removesuffix(b"\r") for line in bytes(buffer[:end]).split(b"\n")]
    del buffer[: end + length]
    method, target, version = _request_line(lines[0])
    headers = _headers(lines[1:])
    connection = {word.strip() for word in headers.get(b"connection", b"").lower().split(b",")}
    old = version == b"HTTP/1.0"
    # A body is never read: where one may follow, the connection ends with the answer.
    body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    last = body or b"close" in connection or (old and b"keep-alive" not in connection)
    return Request(method.decode("ascii"), _path(target), last=last, old=old)


def _end_of_head(buffer: bytearray) -> tuple[int, int]:
    """Where the head ends and how long its end mark is; the length is 0 while it is not there."""
    found = [(buffer.find(mark), len(mark)) for mark in (b"\n\r\n", b"\n\n")]
    return min((hit for hit in found if hit[0] >= 0), default=(-1, 0))


def _request_line(line: bytes) -> tuple[bytes, bytes, bytes]:
    words = line.split(b" ")
    if len(words) != 3 or not words[0] or not TOKEN.issuperset(words[0]) or not words[1]:
        raise Refused(400, "malformed request line")
    method, target, version = words
    if not version.startswith(b"HTTP/") or any(byte <= 32 or byte == 127 for byte in target):
        raise Refused(400, "malformed request line")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise Refused(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return method, target, version


def _headers(lines: list[bytes]) -> dict[bytes, bytes]:
    headers: dict[bytes, bytes] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not name or not TOKEN.issuperset(name):
            raise Refused(400, "malformed header line")
        name, value = name.lower(), value.strip()
        headers[name] = headers[name] + b"," + value if name in headers else value
    return headers


def _path(target: bytes) -> str:
    """The decoded path of an origin-form or absolute-form target."""
    if not target.startswith(b"/") and b"://" in target:
        target = b"/" + target.partition(b"://")[2].partition(b"/")[2]
    first, *rest = target.partition(b"?")[0].partition(b"#")[0].split(b"%")
    path = bytearray(first)
    for part in rest:
        pair = part[:2]
        if len(pair) == 2 and HEX.issuperset(pair):
            path += bytes((int(pair, 16),)) + part[2:]
        else:
            path += b"%" + part
    return path.decode("utf-8", "replace")


def response(
    request: Request | None, status: int, body: bytes, content_type: str, headers: tuple[str, ...] = ()
) -> bytes:
    """The whole response; `request` is None where there was none that could be read."""
    last = request is None or request.last
    lines = [f"HTTP/1.1 {status} {REASONS[status]}", f"Date: {_date()}", "Cache-Control: no-store", *headers]
    if status != 204:  # a 204 has neither a body nor a length
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    if last or (request is not None and request.old):
        lines.append("Connection: close" if last else "Connection: keep-alive")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if status == 204 or (request is not None and request.method == "HEAD") else head + body


def stream_head() -> bytes:
    """The head of an event stream, which ends with the connection: good for HTTP/1.0 as well."""
    lines = ["HTTP/1.1 200 OK", f"Date: {_date()}", "Content-Type: text/event-stream", "Cache-Control: no-cache"]
    return "\r\n".join([*lines, "X-Accel-Buffering: no", "Connection: close", "", ""]).encode("latin-1")


def _date() -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
