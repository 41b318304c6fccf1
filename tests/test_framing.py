"""Chunked framing over every boundary, and what a response's head says of its body."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.framing import MAX_SIZE_LINE, MAX_WHOLE_CHUNK, ChunkReader, Framing, body_framing, frame, parse_head

SMALL = b'5\r\ndata:\r\n1;name="v"\r\n \r\n00A\r\n{"a":"\r\n"}\r\n0;last\r\nX-Trailer: yes\r\nY: 0\r\n\r\n'
SMALL_PAYLOAD = b'data: {"a":"\r\n"}'


def decode(raw: bytes) -> bytes:
    """A naive and strict decoder of whole chunks: nothing may stand before, between or behind them."""
    payload = b""
    while raw:
        line, _, rest = raw.partition(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        assert size > 0, "a terminator stands in the raw output"
        assert rest[size : size + 2] == b"\r\n", "the chunk is not whole"
        payload += rest[:size]
        raw = rest[size + 2 :]
    return payload


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in pairwise(edges)]


def follow(parts: list[bytes]) -> tuple[bytes, bytes, ChunkReader]:
    """All raw output and payload; what each single feed gives must be whole chunks of that feed's payload."""
    reader, whole_raw, whole_payload, ended = ChunkReader(), b"", b"", False
    for part in parts:
        assert not ended, "it ended before the last piece"
        raw, payload, ended = reader.feed(part)
        assert decode(raw) == payload
        whole_raw += raw
        whole_payload += payload
    assert ended
    return whole_raw, whole_payload, reader


sizes = st.one_of(
    st.integers(1, 40),
    st.integers(1000, 5000),
    st.integers(MAX_WHOLE_CHUNK - 2, MAX_WHOLE_CHUNK + 2),
    st.integers(MAX_WHOLE_CHUNK, 3 * MAX_WHOLE_CHUNK),
)
extensions = st.sampled_from([b"", b"", b";a", b' ; a="0\t"', b";" + b"x" * 200])
trailers = st.sampled_from([b"", b"", b"X-Trailer: yes\r\n", b"A: 1\r\nB: 0\r\n"])


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A chunked body and its payload, which is full of what looks like framing."""
    filling = draw(st.sampled_from([b"0\r\n\r\n", b"\r\n", b"5\r\nhello\r\n", b"data: x\n\n", b"\x00\xff"]))
    body = payload = b""
    for size in draw(st.lists(sizes, max_size=6)):
        chunk = (filling * (size // len(filling) + 1))[:size]
        digits = draw(st.sampled_from([b"%x", b"%X", b"000%x"])) % size
        body += digits + draw(extensions) + b"\r\n" + chunk + b"\r\n"
        payload += chunk
    return body + draw(st.sampled_from([b"0", b"000", b"0;x"])) + b"\r\n" + draw(trailers) + b"\r\n", payload


@given(bodies(), st.lists(st.integers(0, 10**6), max_size=12))
def test_the_payload_is_intact_wherever_the_bytes_are_cut(body: tuple[bytes, bytes], cuts: list[int]) -> None:
    data, payload = body
    last = data.rindex(b"\r\n\r\n") + 3  # a cut behind this one would feed a body that has ended
    raw, seen, reader = follow(pieces(data, [min(cut % len(data), last) for cut in cuts]))
    assert seen == payload
    assert decode(raw) == payload
    assert not reader.excess


@pytest.mark.parametrize("cut", range(len(SMALL)))
def test_one_cut_at_every_boundary(cut: int) -> None:
    _, payload, reader = follow([SMALL[:cut], SMALL[cut:]])
    assert payload == SMALL_PAYLOAD and not reader.excess


def test_byte_by_byte() -> None:
    raw, payload, _ = follow([bytes([byte]) for byte in SMALL])
    assert payload == SMALL_PAYLOAD
    assert raw == SMALL[: SMALL.index(b"0;last")]  # small chunks go on as they came, extensions included


@pytest.mark.parametrize("size", [MAX_WHOLE_CHUNK + 1, 200_000])
@pytest.mark.parametrize("ahead", [0, 1, 1000, MAX_WHOLE_CHUNK])
def test_a_large_chunk_is_passed_on_before_it_is_whole(size: int, ahead: int) -> None:
    reader = ChunkReader()
    head = b"%x\r\n" % size
    raw, payload, last = reader.feed(b"3\r\nabc\r\n" + head + b"x" * ahead)
    assert (decode(raw), payload, last) == (b"abc" + b"x" * ahead, b"abc" + b"x" * ahead, False)
    raw, payload, last = reader.feed(b"x" * (size - ahead) + b"\r")
    assert decode(raw) == payload == b"x" * (size - ahead)
    assert reader.feed(b"\n0\r\n\r\n") == (b"", b"", True)


def test_a_chunk_up_to_the_bound_waits_until_it_is_whole() -> None:
    reader = ChunkReader()
    assert reader.feed(b"%x\r\n" % MAX_WHOLE_CHUNK + b"x" * MAX_WHOLE_CHUNK) == (b"", b"", False)
    raw, payload, last = reader.feed(b"\r\n")
    assert len(payload) == MAX_WHOLE_CHUNK and decode(raw) == payload and not last


@given(st.integers(0, len(SMALL) - 1), st.binary(max_size=20))
@example(0, b"0\r\n\r\n")
@example(0, b"")
def test_what_follows_the_end_is_noticed_and_never_passed_on(cut: int, extra: bytes) -> None:
    _, payload, reader = follow([SMALL[:cut], SMALL[cut:] + extra])
    assert payload == SMALL_PAYLOAD
    assert reader.excess is bool(extra)


LARGE = MAX_WHOLE_CHUNK + 1
BAD = {
    "no digits": b"\r\nabc\r\n",
    "not a number": b"hello\r\n",
    "negative": b"-5\r\nhello\r\n",
    "signed": b"+5\r\nhello\r\n",
    "hex prefix": b"0x5\r\nhello\r\n",
    "underscore": b"1_0\r\n" + b"x" * 16 + b"\r\n",
    "space before": b" 5\r\nhello\r\n",
    "only an extension": b";x\r\nhello\r\n",
    "other digits": "٥\r\nhello\r\n".encode(),
    "enormous": b"F" * 16 + b"\r\n",
    "longer than it says": b"5\r\nhello!\r\n",
    "shorter than it says": b"6\r\nhello\r\n0\r\n\r\n",
    "half a line end": b"5\r\nhello\rX",
    "large and longer than it says": b"%x\r\n" % LARGE + b"x" * LARGE + b"xx",
    "large with half a line end": b"%x\r\n" % LARGE + b"x" * LARGE + b"\rx",
    "endless size line": b"1;" + b"x" * MAX_SIZE_LINE,
    "endless trailers": b"0\r\n" + b"X: y\r\n" * (64 * MAX_SIZE_LINE // 6 + 2),
}


@pytest.mark.parametrize("before", [b"", b"3\r\nabc\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("step", [1, 7, 10**9])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_not_chunked_framing_is_refused(bad: bytes, step: int, before: bytes) -> None:
    data = before + bad
    if len(data) > 10_000 and step == 1:
        step = 997
    reader = ChunkReader()
    with pytest.raises(ValueError):
        for begin in range(0, len(data), step):
            _, _, last = reader.feed(data[begin : begin + step])
            assert not last


def test_a_frame_is_one_chunk() -> None:
    assert frame(b"x" * 17) == b"11\r\n" + b"x" * 17 + b"\r\n"


@pytest.mark.parametrize(
    ("head", "status", "headers", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nA: b", 200, {"a": "b"}, True),
        (b"HTTP/1.1 200", 200, {}, True),
        (b"HTTP/1.1 404 \r\nX:", 404, {"x": ""}, True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close", 200, {"connection": "Close"}, False),
        (b"HTTP/1.0 200 OK", 200, {}, False),
        (b"HTTP/1.0 200 OK\r\nconnection:keep-alive", 200, {"connection": "keep-alive"}, True),
        (b"HTTP/1.1 200 OK\r\nA: 1\r\na: 2", 200, {"a": "2"}, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length: 5", 200, {"content-length": "5"}, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length : 5", 200, {"content-length": "5"}, True),
        (b"HTTP/1.1 200 OK\r\nURL: http://x:1/\xff", 200, {"url": "http://x:1/\xff"}, True),
    ],
)
def test_heads(head: bytes, status: int, headers: dict[str, str], keep_alive: bool) -> None:
    assert parse_head(head) == (status, headers, keep_alive)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 2OO banana",
        b"HTTP/1.1  200",
        b"HTTP/1.1 20",
        b"HTTP/1.1 2000 OK",
        "HTTP/1.1 ²00 OK".encode("latin-1"),
        b"HTTP/1.1 200 OK\r\nno colon",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6",
        b'{"error": "not HTTP"}',
    ],
)
def test_what_is_not_a_head_is_refused(head: bytes) -> None:
    with pytest.raises(ValueError):
        parse_head(head)


CHUNKED = {"transfer-encoding": "Chunked"}


@pytest.mark.parametrize(
    ("method", "status", "headers", "framing", "length"),
    [
        ("POST", 200, {"content-length": "5"}, Framing.LENGTH, 5),
        ("POST", 200, {"content-length": "0"}, Framing.LENGTH, 0),
        ("POST", 200, CHUNKED, Framing.CHUNKED, 0),
        ("POST", 200, CHUNKED | {"content-length": "5"}, Framing.CHUNKED, 0),
        ("POST", 200, {}, Framing.UNTIL_CLOSE, 0),
        ("HEAD", 200, {"content-length": "5"}, Framing.NONE, 0),
        ("HEAD", 200, CHUNKED, Framing.NONE, 0),
        ("POST", 204, {"content-length": "5"}, Framing.NONE, 0),
        ("POST", 304, CHUNKED, Framing.NONE, 0),
        ("POST", 103, {}, Framing.NONE, 0),
        ("POST", 500, {"content-length": "7"}, Framing.LENGTH, 7),
    ],
)
def test_how_a_body_ends(method: str, status: int, headers: dict[str, str], framing: Framing, length: int) -> None:
    assert body_framing(method, status, headers) == (framing, length)


@pytest.mark.parametrize(
    "headers",
    [{"content-length": text} for text in ("", "-1", "+5", "5, 5", "0x5", "5.0", "٥", "9" * 5000)]
    + [{"transfer-encoding": text} for text in ("gzip", "gzip, chunked", "chunked, gzip")],
)
def test_a_length_that_is_none_is_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        body_framing("POST", 200, headers)
