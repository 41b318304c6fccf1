"""GGUF files byte by byte, right ones and wrong ones; the real writer would refuse to make the wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10
_CODES = {U8: "<B", U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}

LLAMA: Mapping[str, Any] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 15,
    "llama.block_count": 4,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
}


class Typed:
    """A value with its GGUF type spelled out."""

    def __init__(self, kind: int, value: Any) -> None:
        self.kind, self.value = kind, value


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key: str, value: Any) -> bytes:
    return text(key) + _value(value)


def _value(value: Any) -> bytes:
    if isinstance(value, Typed):
        return struct.pack("<I", value.kind) + struct.pack(_CODES[value.kind], value.value)
    if isinstance(value, bytes):  # already encoded
        return value
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", U32, value)
    items = list(value)
    if items and isinstance(items[0], str):
        return struct.pack("<IIQ", ARRAY, STRING, len(items)) + b"".join(map(text, items))
    kind = BOOL if items and isinstance(items[0], bool) else U32
    return struct.pack("<IIQ", ARRAY, kind, len(items)) + b"".join(struct.pack(_CODES[kind], item) for item in items)


def tensor(name: str, shape: Iterable[int], kind: int, offset: int) -> bytes:
    dims = list(shape)
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(values: Mapping[str, Any], tensors: Iterable[bytes] = (), data: int = 0, version: int = 3) -> bytes:
    """A file of these keys and tensor records, with `data` zero bytes behind the padded header."""
    tensors = list(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(pair(key, value) for key, value in values.items()) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)
