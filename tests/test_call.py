"""What is read of a request: its body, its numbers, its names."""

from __future__ import annotations

import codecs

import msgspec
import pytest

from gateway.errors import BadRequest, InvalidJSON
from gateway.pipeline.call import parse_json_object, take_model, take_places, typed_field
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.identity import identity
from gateway.pipeline.routes import MOST_WAIT, max_wait
from gateway.pipeline.shield import asked_bound


def test_a_byte_order_mark_is_skipped() -> None:
    assert parse_json_object(codecs.BOM_UTF8 + b'{"a":1}') == parse_json_object(b'{"a":1}')
    for body in (codecs.BOM_UTF8, codecs.BOM_UTF8 * 2 + b"{}", codecs.BOM_UTF16 + b"{}"):
        with pytest.raises(InvalidJSON):
            parse_json_object(body)


@pytest.mark.parametrize(("written", "number"), [(b"4", 4), (b"4.0", 4), (b"1e2", 100), (b"-0.0", 0), (b"null", None)])
def test_a_whole_number_however_it_is_written(written: bytes, number: int | None) -> None:
    fields = parse_json_object(b'{"x":%b}' % written)
    assert typed_field(fields, "x", int, "a whole number") == number
    assert msgspec.json.decode(fields["x"], type=int | None) == number, "so it is forwarded"


@pytest.mark.parametrize("written", [b"4.5", b"1e400", b"1e-3", b"true", b'"4"', b'"4.0"', b"[4]"])
def test_what_is_no_whole_number(written: bytes) -> None:
    fields = parse_json_object(b'{"x":%b}' % written)
    with pytest.raises(BadRequest, match="must be a whole number"):
        typed_field(fields, "x", int, "a whole number")


def test_bounds_hold_for_numbers_with_a_point() -> None:
    assert take_places(parse_json_object(b'{"n":3.0}')) == 3
    assert asked_bound(parse_json_object(b'{"max_tokens":4.0}'), Dialect.CHAT) == 4
    for body in (b'{"n":129.0}', b'{"n":1e300}', b'{"n":0.0}'):
        with pytest.raises(BadRequest, match="must be from 1 to 128"):
            take_places(parse_json_object(body))
    with pytest.raises(BadRequest, match="at least 0"):
        asked_bound(parse_json_object(b'{"max_tokens":-4.0}'), Dialect.CHAT)


@pytest.mark.parametrize("body", [b"{}", b'{"model":null}', b'{"model":""}'])
def test_no_model_is_named(body: bytes) -> None:
    assert take_model(parse_json_object(body)) is None


TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", "01"),
        (f"00-{TRACE}-{SPAN}-00", "00"),
        (f"01-{TRACE}-{SPAN}-01", "01"),
        (f"01-{TRACE}-{SPAN}-00-extra-more", "00"),
        (f"fe-{TRACE}-{SPAN}-01-", "01"),
    ],
)
def test_a_trace_is_continued(given: str, flags: str) -> None:
    version, trace, span, told = identity(None, given)[1].split("-")
    assert (version, trace, told) == ("00", TRACE, flags)
    assert span not in (SPAN, "0" * 16)


@pytest.mark.parametrize(
    "given",
    [
        f"00-{TRACE}-{SPAN}-01-extra",
        f"ff-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01extra",
        f"01-{'0' * 32}-{SPAN}-01",
        f"01-{TRACE}-{'0' * 16}-01",
        f"1-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}",
    ],
)
def test_what_is_no_trace(given: str) -> None:
    assert TRACE not in identity(None, given)[1]


@pytest.mark.parametrize("text", ["99999999999", str(MOST_WAIT), "inf", "0", "soon"])
def test_a_wait_is_bounded(text: str) -> None:
    with pytest.raises(BadRequest, match=f"more than 0 and below {MOST_WAIT}"):
        max_wait(text)
