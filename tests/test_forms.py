"""Which model a multipart form names, whatever else is in it."""

from __future__ import annotations

import pytest

from gateway.errors import BadRequest
from gateway.pipeline.forms import MOST_VALUE_BYTES, form_field

TYPE = "multipart/form-data; boundary=edge"
FILE = b'content-disposition: form-data; name="file"; filename="a; name=model.wav"\r\nContent-Type: audio/wav'


def form(*parts: tuple[bytes, bytes], before: bytes = b"", end: bytes = b"--edge--\r\n") -> bytes:
    return before + b"".join(b"--edge\r\n%b\r\n\r\n%b\r\n" % part for part in parts) + end


def field(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    return b'Content-Disposition: form-data; name="%b"' % name, value


MODEL = field(b"model", b"tiny")
SOUND = (FILE, b'RIFF\r\n\r\n--edg\r\n--e; name="model"\x00\xff')
FORMS: dict[str, tuple[bytes, str | None]] = {
    "before the file": (form(MODEL, SOUND), "tiny"),
    "behind the file": (form(SOUND, field(b"language", b"en"), MODEL), "tiny"),
    "a preamble": (form(MODEL, before=b"hello\r\n"), "tiny"),
    "the first of two": (form(MODEL, field(b"model", b"other")), "tiny"),
    "a bare name": (form((b"Content-Disposition: form-data; name=model", b"tiny")), "tiny"),
    "headers in another order": (
        form((b"Content-Type: text/plain\r\nCONTENT-DISPOSITION: form-data;NAME=model", b"tiny")),
        "tiny",
    ),
    "spaces around it": (form(field(b"model", b" tiny\n")), "tiny"),
    "no ASCII": (form(field(b"model", "größe".encode())), "größe"),
    "empty": (form(field(b"model", b"")), None),
    "no model": (form(SOUND), None),
    "a file's name only": (form((FILE, b"x")), None),
    "no parts": (form(), None),
    "nothing": (b"", None),
    "no form": (b"model=tiny", None),
    "cut before the value's end": (form(MODEL, end=b"")[:-2], None),
    "no disposition": (form((b"Content-Type: text/plain", b"tiny")), None),
    "a head without an end": (b"--edge\r\nContent-Disposition: form-data; name=model\r\n--edge--\r\n", None),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(case: str) -> None:
    body, model = FORMS[case]
    assert form_field(body, TYPE, "model") == model


@pytest.mark.parametrize(
    "kind", ['multipart/form-data; boundary="edge"', "Multipart/Form-Data; charset=x; BOUNDARY=edge"]
)
def test_boundaries(kind: str) -> None:
    assert form_field(form(MODEL), kind, "model") == "tiny"


@pytest.mark.parametrize("value", [b"\xff", b"x" * (MOST_VALUE_BYTES + 1)])
def test_what_cannot_be_a_name(value: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        form_field(form(field(b"model", value)), TYPE, "model")
    assert refused.value.param == "model"


def test_a_form_without_a_boundary() -> None:
    with pytest.raises(BadRequest):
        form_field(form(MODEL), "multipart/form-data", "model")
