"""How large an image becomes when it is decoded, told from its first bytes. Pure.

Why: a PNG of 420 KB with 12,000 x 12,000 pixels costs llama-server (build 11669) 880 MB and up to 6 s. The formats are
those of stb_image, which it decodes images with, and WebP.
"""

from __future__ import annotations

import binascii
import re
import struct

MAX_PIXELS = 64_000_000  # of all images of one request: 5 photographs of 12 megapixels
_HEAD_BASE64 = 1024

# How it begins, where its width and height stand, and how. Negative heights are those of bitmaps from top to bottom.
_FIXED = (
    (b"\x89PNG\r\n\x1a\n", 16, ">II"),
    (b"GIF8", 6, "<HH"),
    (b"8BPS", 14, ">II"),
    (b"\x53\x80\xf6\x34", 92, ">HH"),
)
_TEXTS = (
    ((b"P5", b"P6"), re.compile(rb"..(?:\s+|#[^\n]*\n)*+(\d+)(?:\s+|#[^\n]*\n)++(\d+)")),
    ((b"#?RADIANCE\n", b"#?RGBE\n"), re.compile(rb".*?\n\n-Y +(\d+) +\+X +(\d+)", re.DOTALL)),
)
_TARGA_TYPES = frozenset((1, 2, 3, 9, 10, 11))
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_ALONE = frozenset((0x01, *range(0xD0, 0xDA)))  # markers without a segment


def pixels_of_base64(text: str) -> int:
    """`text` is valid base64, padded or not. 0 where it is no image that is known."""
    size = _pixels(_decoded(text[:_HEAD_BASE64]))
    if size is None:  # the size stands behind whatever cameras and editors put before it
        size = _pixels(_decoded(text))
    return size or 0


def pixels(data: bytes | bytearray) -> int:
    """0 where it is no image that is known."""
    return _pixels(data) or 0


def _pixels(data: bytes | bytearray) -> int | None:
    """None where the size may come later than `data` goes."""
    try:
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        width, height = _size(data)
    except struct.error:
        return None
    return abs(width * height)


def _size(data: bytes | bytearray) -> tuple[int, int]:
    """Raises struct.error where the data is too short."""
    for magic, at, layout in _FIXED:
        if data.startswith(magic):
            return struct.unpack_from(layout, data, at)
    if data.startswith(b"BM"):
        return struct.unpack_from("<HH" if data[14:15] == b"\x0c" else "<ii", data, 18)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    for begins, pattern in _TEXTS:
        if data.startswith(begins):
            if not (found := pattern.match(data)):
                raise struct.error
            return int(found[1][:10]), int(found[2][:10])
    if len(data) > 18 and data[1] <= 1 and data[2] in _TARGA_TYPES:  # Targa has no magic
        return struct.unpack_from("<HH", data, 12)
    return 0, 0


def _webp(data: bytes | bytearray) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _jpeg(data: bytes | bytearray) -> int | None:
    """From marker to marker, as stb_image goes, which skips what stands between two segments."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0:
        while data[at : at + 1] == b"\xff":
            at += 1
        if at + 8 > len(data):
            return None
        marker = data[at]
        if marker in _JPEG_SIZES:
            height, width = struct.unpack_from(">HH", data, at + 4)
            return int(width * height)
        at += 1 if marker in _JPEG_ALONE or not marker else 1 + int(struct.unpack_from(">H", data, at + 1)[0])
    return None


def _decoded(text: str) -> bytes:
    digits = text.rstrip("=")
    return binascii.a2b_base64(digits + "=" * (-len(digits) % 4))
