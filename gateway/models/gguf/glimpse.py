"""The first keys of a GGUF file: enough to tell a model from an adapter, and cheap enough for a folder of hundreds.

What a model needs is another question, and `header.read_header` answers it from the whole header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

FIRST_BYTES = 64 << 10  # the shape of every known model ends far before; its vocabulary begins

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_U32, _I32, _STRING, _ARRAY = 4, 5, 8, 9
_LAST = "tokenizer."  # what follows is long and of no interest


@dataclass(frozen=True)
class Glimpse:
    """Empty where the file does not say it, or is no GGUF file."""

    architecture: str = ""
    type: str = ""  # "model", "adapter", "mmproj"
    pooling_type: int | None = None

    @property
    def is_adapter(self) -> bool:
        return self.type == "adapter"

    @property
    def is_projector(self) -> bool:
        return self.type == "mmproj" or self.architecture == "clip"


def glimpse(path: Path) -> Glimpse:
    """Blocking; reads FIRST_BYTES at most. A file that cannot be read says nothing."""
    try:
        with path.open("rb", buffering=0) as file:
            return look_at(file.read(FIRST_BYTES) or b"")
    except OSError:
        return Glimpse()


def look_at(data: bytes) -> Glimpse:
    """What the beginning of a file tells; damage ends the look, and what was seen before it counts."""
    values: dict[str, str | int] = {}
    if data[:4] == b"GGUF":
        try:
            (n_keys,) = struct.unpack_from("<Q", data, 16)
            position = 24
            for _ in range(n_keys):
                position = _pair(data, position, values)
                if position < 0:
                    break
        except (struct.error, KeyError):
            pass  # cut off here, or of a type that no version has
    architecture, kind = values.get("general.architecture", ""), values.get("general.type", "")
    pooling = values.get(f"{architecture}.pooling_type")
    return Glimpse(str(architecture), str(kind), pooling if isinstance(pooling, int) else None)


def _pair(data: bytes, position: int, values: dict[str, str | int]) -> int:
    """The place of the next pair; -1 where nothing of interest follows. Raises struct.error, KeyError."""
    key, position = _text(data, position)
    if key.startswith(_LAST):
        return -1
    (kind,) = struct.unpack_from("<I", data, position)
    position += 4
    if kind == _STRING:
        values[key], position = _text(data, position)
        return position
    if kind == _ARRAY:
        kind, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if kind != _STRING:
            return _within(data, position + count * _SIZES[kind])
        for _ in range(count):
            _, position = _text(data, position)
        return position
    if kind in (_U32, _I32):
        (values[key],) = struct.unpack_from("<I" if kind == _U32 else "<i", data, position)
    return position + _SIZES[kind]


def _text(data: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = _within(data, position + 8 + length)
    return data[position + 8 : end].decode("utf-8", "replace"), end


def _within(data: bytes, position: int) -> int:
    if position > len(data):
        raise struct.error
    return position
