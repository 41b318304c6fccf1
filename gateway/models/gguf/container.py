"""The GGUF container: keys and tensor sizes out of files that nobody vouches for; header.py knows what they mean.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Where llama.cpp's `gguf.cpp` is stricter (nested
lists, keys that come twice), it decides: a file that it refuses is of no use here.
"""

from __future__ import annotations

import re
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

MAX_HEADER = 256 << 20  # the largest real ones, 262,144 tokens with merges, stay under 20 MB
MAX_KEYS, MAX_TENSORS, MAX_STRINGS = 4096, 65536, 1 << 20
MAX_NAME = 512  # bytes of a key, of a tensor's name, and of a text value that is kept
MAX_LIST, MAX_KEPT = 4096, 65536  # elements of a list that is kept, and of all of them
CHUNK = 256 << 10
_SHOWN = 60  # characters of a name in a message

Value = int | float | str | tuple[int | float, ...]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SIZES = {kind: struct.calcsize(code) for kind, code in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
# ggml_type: (elements in a block, bytes of a block), from ggml.c's type_traits
_BLOCKS = {
    kind: (elements, size)
    for elements, sizes in {
        1: {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2},
        32: {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 9: 40, 20: 18, 39: 17},
        64: {40: 36},
        128: {41: 18},
        256: {10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 15: 292, 16: 66, 17: 74, 18: 98, 19: 50}
        | {21: 110, 22: 82, 23: 136, 29: 56, 34: 54, 35: 66},
    }.items()
    for kind, size in sizes.items()
}
_DAMAGED = "is cut short or damaged: its header runs past its end"


class GGUFError(ValueError):
    """The file cannot be used as a model; the message says in one sentence which and why."""


@dataclass
class Contents:
    """One file's wanted keys (of a vocabulary the length, of a template 1) and its tensors."""

    values: dict[str, Value] = field(default_factory=dict)
    tensor_bytes: int = 0
    expert_bytes: int = 0
    named: dict[str, tuple[int, int]] = field(default_factory=dict)  # ggml_type, bytes


def read_file(path: Path, wanted: re.Pattern[str], named: frozenset[str]) -> Contents:
    """Reads one file's header: the keys that match `wanted`, the sizes of the tensors `named`. Raises GGUFError.

    Holds less than 2 MB and reads less than MAX_HEADER, whatever the file claims.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise GGUFError(f"{path} is not a file")
        with path.open("rb", buffering=0) as file:
            reader = _Reader(file, path.name, status.st_size)
            n_keys, n_tensors = _read_counts(reader)
            contents = Contents()
            for _ in range(n_keys):
                _read_pair(reader, contents.values, wanted)
            _read_tensors(reader, n_tensors, contents, named)
            return contents
    except OSError as error:
        raise GGUFError(f"{path} cannot be read: {error.strerror}") from error


class _Reader:
    """Forward-only reading through one bounded buffer; mmap would let a file cut short meanwhile kill us by SIGBUS."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self.file, self.name, self.size = file, name, size
        self.limit = min(size, MAX_HEADER)
        self.buffer, self.position, self.end = b"", 0, 0  # end: the file offset at which the buffer ends
        self.kept = 0

    def fail(self, why: str) -> GGUFError:
        return GGUFError(f"{self.name} {why}")

    def tell(self) -> int:
        return self.end - len(self.buffer) + self.position

    def need(self, count: int) -> None:
        """Makes `count` bytes, at most CHUNK, stand in the buffer from `position` on."""
        if self.position + count <= len(self.buffer):
            return
        if self.tell() + count > self.limit:
            raise self.fail(_DAMAGED)
        self.buffer, self.position = self.buffer[self.position :], 0
        while len(self.buffer) < count:
            data = self.file.read(CHUNK)
            if not data:
                raise self.fail(_DAMAGED)
            self.buffer += data
            self.end += len(data)

    def take(self, count: int) -> bytes:
        self.need(count)
        self.position += count
        return self.buffer[self.position - count : self.position]

    def skip(self, count: int) -> None:
        target = self.tell() + count
        if target > self.limit:
            raise self.fail(_DAMAGED)
        if self.position + count <= len(self.buffer):
            self.position += count
        else:
            self.file.seek(target)
            self.buffer, self.position, self.end = b"", 0, target

    def number(self, kind: int) -> int:
        value: int = struct.unpack(_SCALARS[kind], self.take(_SIZES[kind]))[0]
        return value

    def u32(self) -> int:
        return self.number(4)

    def u64(self) -> int:
        return self.number(10)

    def text(self) -> str:
        length = self.u64()
        if length > MAX_NAME:
            raise self.fail(f"is damaged: it has a name of {length} bytes")
        return self.take(length).decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        """The one hot loop: a vocabulary and its merges are up to 600,000 texts (80 ns each)."""
        if count > MAX_STRINGS:
            raise self.fail(f"is damaged: it has a list of {count} texts")
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self.need(8)
            buffer, position, last = self.buffer, self.position, len(self.buffer) - 8
            while count and position <= last:
                position += 8 + unpack(buffer, position)[0]
                count -= 1
            self.skip(position - self.position)


def _read_counts(reader: _Reader) -> tuple[int, int]:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise reader.fail("is not a GGUF file")
    version = reader.u32()
    if version & 0xFFFF == 0:
        raise reader.fail("is a big-endian GGUF file, which llama-server cannot load on this machine")
    if version not in (2, 3):
        raise reader.fail(f"is GGUF version {version}, and only 2 and 3 can be read")
    n_tensors, n_keys = reader.u64(), reader.u64()
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise reader.fail(f"is damaged: it claims {n_keys} keys and {n_tensors} tensors")
    return n_keys, n_tensors


def _read_pair(reader: _Reader, values: dict[str, Value], wanted: re.Pattern[str]) -> None:
    key, kind = reader.text(), reader.u32()
    keep = wanted.fullmatch(key) is not None
    if key in values:
        raise reader.fail(f"has the key {key[:_SHOWN]!r} twice")
    if kind == _STRING:
        if key == "tokenizer.chat_template":
            values[key] = 1
        length = reader.u64()
        if keep and length <= MAX_NAME:
            values[key] = reader.take(length).decode("utf-8", "replace")
        else:
            reader.skip(length)
    elif kind == _ARRAY:
        _read_list(reader, key, values, keep)
    elif kind in _SCALARS:
        value = reader.number(kind)
        if keep:
            values[key] = value
    else:
        raise reader.fail(f"is damaged: {key[:_SHOWN]!r} is of type {kind}")


def _read_list(reader: _Reader, key: str, values: dict[str, Value], keep: bool) -> None:
    kind, count = reader.u32(), reader.u64()
    if key == "tokenizer.ggml.tokens":
        values[key] = count
    if kind == _STRING:
        reader.skip_texts(count)
    elif kind not in _SCALARS:
        raise reader.fail(f"is damaged: {key[:_SHOWN]!r} is a list of type {kind}")
    elif keep and count <= MAX_LIST and reader.kept + count <= MAX_KEPT:
        reader.kept += count
        values[key] = struct.unpack(f"<{count}{_SCALARS[kind][1]}", reader.take(_SIZES[kind] * count))
    else:
        reader.skip(_SIZES[kind] * count)


def _read_tensors(reader: _Reader, count: int, contents: Contents, named: frozenset[str]) -> None:
    """Sizes by ggml type; where one is newer than this table, the whole data section counts."""
    alignment = contents.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise reader.fail(f"is damaged: its alignment is {alignment}")
    used, unknown = 0, False
    for _ in range(count):
        name, n_dims = reader.text(), reader.u32()
        if n_dims > 4:
            raise reader.fail(f"is damaged: its tensor {name[:_SHOWN]!r} has {n_dims} dimensions")
        elements = 1
        for _ in range(n_dims):
            elements *= reader.u64()
        kind, offset = reader.u32(), reader.u64()
        per_block, block = _BLOCKS.get(kind, (0, 0))
        unknown |= not per_block
        size = -(-elements // per_block) * block if per_block else 0
        contents.tensor_bytes += size
        if name.endswith("_exps.weight"):
            contents.expert_bytes += size
        if name in named:
            contents.named[name] = kind, size
        used = max(used, offset + size)
    start = -(-reader.tell() // alignment) * alignment
    if count and start + used > reader.size:
        raise reader.fail(f"is cut short: it has {reader.size} of {start + used} bytes, fetch it again")
    data = max(0, reader.size - start)
    contents.tensor_bytes = data if unknown else min(data, contents.tensor_bytes)  # hostile tensors overlap
