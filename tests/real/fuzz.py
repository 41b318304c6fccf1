"""The grammar of the fuzzer: what clients may send over one connection, right, wrong and half right.

Heads and framings are made here, bodies in `fuzz_bodies`; `fuzz_campaign` sends them and judges what comes back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from hypothesis import strategies as st

from tests.house import ADMIN, USER
from tests.real.fuzz_bodies import ROUTES, one_body, one_in

ANSWERED_BY_US = (
    "/healthz /ping /readyz /health /metrics /v1/models /v1/models/fuzzed /v1/models/none /v1/models/status /models "
    "/status /v1/queue/stats /upstream/fuzzed/slots /v1/models/failed"
).split()
ODD_TARGETS = """
/ // /v1 /v1/ /v1/../slots /v1/%2e%2e/slots /slots /props /v1/models/%ff%fe /v1/models/%00 /v1/models/a%0d%0ab:c
/v1/models;x /v1%2fmodels /healthz?a=b&a=b /healthz?%zz /healthz#x http://elsewhere/v1/models https://x:1/healthz
http://x:99999999/healthz http://[::1/healthz * x:1 healthz /\xff /a\\b /infer /upstream/fuzzed/nothing
/v1/models/status/%e2%80%ae /v1/chat/completions/ /V1/models /v1/models/..%2f..%2fslots
""".split()
METHODS = "GET POST HEAD PUT DELETE PATCH OPTIONS TRACE CONNECT".split()
ODD_METHODS = ["get", "FOO", "", "G" * 300, "GE T", "PRI", "\0", "GET\t"]
ODD_VERSIONS = [
    "HTTP/0.9",
    "HTTP/1.2",
    "HTTP/2.0",
    "HTTP/3.0",
    "HTTP/1",
    "HTTP/x",
    "SIP/2.0",
    "",
    "http/1.1",
    "HTTP/1.10",
]
KEYS = [f"Authorization: Bearer {USER}"] * 40 + [
    f"Authorization: Bearer {ADMIN}",
    f"Authorization: {USER}",
    f"x-api-key: {USER}",
    f"AUTHORIZATION: bearer {USER}",
    f"Authorization: Bearer {USER}x",
    "Authorization: Bearer ",
    "Authorization: Basic dTpw",
    "",
]
HEADERS = [
    "User-Agent: fuzz",
    "Accept: */*",
    "Accept: application/json",
    "Origin: https://elsewhere",
    "Accept-Encoding: gzip, br, zstd",
    "Cookie: a=b; c=d",
    "Range: bytes=0-1",
    "If-None-Match: *",
    "X-Request-Priority: low",
    "X-Request-Timeout: 30",
    "x-request-id: abc",
    "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "traceparent: 00-zz",
    "X-Forwarded-For: 1.2.3.4, ::1",
    "X-Conversation-Id: abc",
    "Cache-Control: no-cache",
    "Connection: keep-alive",
    "TE: trailers",
    "Content-Encoding: identity",
    "Sec-Fetch-Mode: cors",
    "Access-Control-Request-Method: POST",
    "X: " + "a" * 8000,
    "X: \xe9\xff",
    "X:",
    "X:\t \t",
]
REFUSED_HEADERS = [  # or such as end the connection; rightly framed all the same
    "X-Request-Priority: urgent",
    "X-Request-Timeout: nan",
    "Content-Encoding: gzip",
    "Connection: close",
    "Connection: x-api-key, te",
    "x-request-id: \xff\x80",
]
WILD_HEADERS = [
    "Host: y",
    "X Y: a",
    ": a",
    "nonsense",
    "X: a\0b",
    "X: a\rY: b",
    "X: a\r\n b",
    "X: " + "a" * 9000,
    "\r\n".join(f"X-{n}: a" for n in range(70)),
    "Content-Length: 2",
    "Content-Length: -1",
    "Content-Length: 0x10",
    "Content-Length: 99999999999999999999999",
    "Content-Length: 1, 1",
    "Content-Length : 5",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding:\x0bchunked",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "Expect: a-miracle",
    "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__",
]
TYPES = ["Content-Type: application/json"] * 40 + [
    "Content-Type: application/json; charset=utf-8",
    "Content-Type: application/vnd.api+json",
    "Content-Type: text/plain",
    "Content-Type: ;;=/",
    "Content-Type: multipart/form-data; boundary=x",
    "",
]
CHUNK_ENDS = [b"0\r\n\r\n"] * 6 + [b"0;a=b\r\n\r\n", b"00\r\nX: y\r\n\r\n", b"0\r\nX: y\r\nZ: \xff\r\n\r\n"]
WILD_CHUNKS = [
    b"zz\r\n",
    b"-1\r\n",
    b"0x2\r\n{}\r\n",
    b"f" * 17 + b"\r\n",
    b"2\r\n{}xx",
    b"2\n{}\n",
    b"\r\n",
    b"5\r\n{}",
]
WILD_CHUNKS += [b"0\r\nContent-Length: 5\r\n\r\n", b"0\r\n" + b"X: y\r\n" * 70 + b"\r\n", b"2;\n\r\n{}\r\n", b"0\r\n"]


ODD_BYTES = [b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b":", b"\xff", b"\x80", b""]
ENDS = ["stay"] * 14 + ["half_close", "leave"]
_text = st.text(st.characters(max_codepoint=255), max_size=12)
_odd_headers = st.lists(st.builds("{}: {}".format, _text, _text), max_size=1)


@dataclass(frozen=True, slots=True)
class Request:
    data: bytes
    method: str
    sure: bool  # framed rightly and complete: exactly one answer is due


@dataclass(frozen=True, slots=True)
class Script:
    """What one client does: it sends requests without waiting, in pieces, and stays, half closes or leaves."""

    requests: tuple[Request, ...]
    pieces: tuple[int, ...]  # lengths of the first writes
    end: str  # stay, half_close, leave

    @property
    def data(self) -> bytes:
        return b"".join(request.data for request in self.requests)

    @property
    def due(self) -> int:
        """How many answers are due for certain, before anything that is not sure."""
        return next((n for n, request in enumerate(self.requests) if not request.sure), len(self.requests))


Framed = tuple[bytes, bool]  # the framing headers, the empty line and the body; whether that is right and complete


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Hypothesis makes the values; what is chosen from lists comes from a generator that it seeds, which is faster."""
    random = draw(st.randoms(use_true_random=True))
    chain = [one_request(draw, random) for _ in range(random.randint(1, 3))]
    if one_in(random, 40):
        chain.append(Request(draw(st.binary(min_size=1, max_size=60)), "GET", False))
    pieces = [random.randint(1, 300) for _ in range(random.randint(0, 5))] if one_in(random, 4) else []
    end = random.choice(ENDS)
    return Script(tuple(chain), tuple(pieces), end)


def one_request(draw: st.DrawFn, random: Random) -> Request:
    wild = one_in(random, 20)
    if one_in(random, 6):
        method, target = random.choice(METHODS), random.choice(ANSWERED_BY_US + ROUTES)
    else:
        method, target = "POST", random.choice(ROUTES)
    if one_in(random, 20):
        target, wild = random.choice(ODD_TARGETS), True
    version = "HTTP/1.0" if one_in(random, 16) else "HTTP/1.1"
    if wild and one_in(random, 2):
        method = random.choice(ODD_METHODS)
    if wild and one_in(random, 2):
        version = random.choice(ODD_VERSIONS)
    lines = [f"{method} {target} {version}", "Host: x", random.choice(KEYS)]
    lines += random.sample(HEADERS, random.randint(0, 4))
    lines += [random.choice(REFUSED_HEADERS)] if one_in(random, 12) else []
    if wild:
        lines += random.sample(WILD_HEADERS, random.randint(0, 2)) + draw(_odd_headers)
    has_body = method == "POST" or one_in(random, 12)
    body = one_body(draw, random, target) if has_body else b""
    framed, sure = framing(random, body, version == "HTTP/1.1") if has_body else (b"\r\n", True)
    if has_body:
        lines.append(random.choice(TYPES))
    data = "".join(f"{line}\r\n" for line in lines if line).encode("latin-1") + framed
    if wild and one_in(random, 2):
        data = mangled(random, data)
    return Request(data, method, sure and not wild and method not in ("CONNECT", "TRACE"))


def framing(random: Random, body: bytes, is_new: bool) -> Framed:
    """`is_new`: HTTP/1.1, which knows chunks."""
    kind = random.randrange(60)
    length = b"Content-Length: %d\r\n"
    if kind < 30:
        return length % len(body) + b"\r\n" + body, True
    if kind < 45:
        return b"Transfer-Encoding: chunked\r\n\r\n" + chunks(random, body) + random.choice(CHUNK_ENDS), is_new
    if kind < 48:
        return length % len(body) + b"Expect: 100-continue\r\n\r\n" + body, is_new
    if kind < 51:
        return b"Transfer-Encoding: chunked\r\n\r\n" + chunks(random, body) + random.choice(WILD_CHUNKS), False
    if kind < 54:  # it promises more than it sends, or less
        return length % max(0, len(body) + random.randint(-30, 30)) + b"\r\n" + body, False
    if kind < 56:
        return length % len(body) + b"Transfer-Encoding: chunked\r\n\r\n" + body, False
    if kind < 58:
        return length % random.choice([11 << 20, 2**64, 10**30]) + b"\r\n" + body, False
    return b"\r\n" + body, not body


def chunks(random: Random, body: bytes) -> bytes:
    lengths = [random.randint(0, 40) for _ in range(random.randint(0, 6))]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in split(body, lengths))


def mangled(random: Random, data: bytes) -> bytes:
    """A few bytes inserted, replaced or removed; or it is cut off."""
    at = random.randrange(min(len(data), 400))
    kind = random.randrange(4)
    if kind == 0:
        return data[: at + 1]
    return data[:at] + random.choice(ODD_BYTES) + data[at + kind - 1 :]


def split(data: bytes, lengths: Iterable[int]) -> list[bytes]:
    """Pieces of these lengths, and the rest; no empty ones."""
    pieces, at = [], 0
    for length in lengths:
        pieces.append(data[at : at + length])
        at += length
    return [piece for piece in [*pieces, data[at:]] if piece]
