"""The sizes of images, read from their first bytes, in each format that llama-server decodes."""

from __future__ import annotations

import base64
import struct

import msgspec
import pytest

from gateway.errors import BadRequest
from gateway.pipeline.call import Fields
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.media.find import find_media
from gateway.pipeline.media.images import MAX_PIXELS, pixels, pixels_of_base64

PNG = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR"
EXIF = b"\xff\xe1" + struct.pack(">H", 60_000) + b"\xff\xc0" * 29_999


def sof(marker: int, width: int, height: int) -> bytes:
    return struct.pack(">BBHBHHB", 0xFF, marker, 17, 8, height, width, 3) + b"\1\x11\0" * 3


def png(width: int, height: int) -> bytes:
    return PNG + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


IMAGES: dict[str, bytes] = {
    "PNG": png(300, 200),
    "GIF": b"GIF89a" + struct.pack("<HHBBB", 300, 200, 0, 0, 0),
    "BMP": b"BM" + b"\0" * 12 + struct.pack("<Iii", 40, 300, 200),
    "BMP from top to bottom": b"BM" + b"\0" * 12 + struct.pack("<Iii", 40, 300, -200),
    "BMP of OS/2": b"BM" + b"\0" * 12 + struct.pack("<IHHHH", 12, 300, 200, 1, 24),
    "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 200, 300, 8, 3),
    "PIC": b"\x53\x80\xf6\x34" + b"\0" * 84 + b"PICT" + struct.pack(">HH", 300, 200),
    "PNM": b"P6 # made by hand\n300\n# and\n200 255\n",
    "PNM with a long comment": b"P5\n#" + b"x" * 5000 + b"\n300 200 255\n",
    "HDR": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 200 +X 300\n",
    "HDR with a long comment": b"#?RGBE\n" + b"#x\n" * 2000 + b"\n-Y 200 +X 300\n",
    "Targa": struct.pack("<BBB9xHHBB", 0, 0, 10, 300, 200, 24, 0) + b"\0",
    "WebP": b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 300, 200),
    "WebP, lossless": b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + struct.pack("<I", 299 | 199 << 14),
    "WebP, extended": b"RIFF\0\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + struct.pack("<HBHB", 299, 0, 199, 0),
    "JPEG": b"\xff\xd8\xff\xe0\0\x04ab" + sof(0xC0, 300, 200),
    "JPEG, progressive": b"\xff\xd8\xff\xdb\0\x04ab" + sof(0xC2, 300, 200),
    "JPEG of a camera": b"\xff\xd8" + EXIF * 3 + sof(0xC0, 300, 200),
    "JPEG with nonsense between segments": b"\xff\xd8\xff\xe0\0\x04abxx\0x\xff\xff\xff" + sof(0xC0, 300, 200)[1:],
}


@pytest.mark.parametrize("name", IMAGES)
def test_known_formats(name: str) -> None:
    data = IMAGES[name]
    assert pixels(data) == 60_000
    text = base64.b64encode(data + b"\0" * 20).decode()
    assert pixels_of_base64(text) == pixels_of_base64(text.rstrip("=")) == 60_000


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"RIFF$\0\0\0WAVEfmt ", b"ID3\3\0\0\0\0\0\0" + b"\0" * 20, b'fLaC\0\0\0"' * 4]
)
def test_what_is_no_image(data: bytes) -> None:
    assert pixels(data) == pixels_of_base64(base64.b64encode(data).decode()) == 0


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_break_off(name: str) -> None:
    for end in range(min(len(IMAGES[name]), 200)):
        assert pixels(IMAGES[name][:end]) >= 0


def said(*images: bytes) -> Fields:
    url = "data:image/png;base64,"
    parts = [{"type": "image_url", "image_url": {"url": url + base64.b64encode(image).decode()}} for image in images]
    messages = [{"role": "user", "content": parts}]
    return {"messages": msgspec.Raw(msgspec.json.encode(messages))}


def test_the_images_of_one_request_are_bounded_together() -> None:
    find_media(said(png(8000, 8000)), Dialect.CHAT, allow_remote=False)
    with pytest.raises(BadRequest, match="64 megapixels") as raised:
        find_media(said(png(8000, 8001)), Dialect.CHAT, allow_remote=False)
    assert raised.value.param == "messages[0].content[0].image_url"
    half = png(MAX_PIXELS // 2000, 1000)
    find_media(said(half, half), Dialect.CHAT, allow_remote=False)
    with pytest.raises(BadRequest) as raised:
        find_media(said(half, half, png(1, 1)), Dialect.CHAT, allow_remote=False)
    assert raised.value.param == "messages[0].content[2].image_url"


def test_bare_base64_is_bounded_too() -> None:
    prompt = {"prompt_string": "<__media__>?", "multimodal_data": [base64.b64encode(png(12_000, 12_000)).decode()]}
    with pytest.raises(BadRequest, match="megapixels"):
        find_media({"prompt": msgspec.Raw(msgspec.json.encode(prompt))}, Dialect.NATIVE, allow_remote=False)
