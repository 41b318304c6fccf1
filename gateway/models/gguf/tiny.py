"""A GGUF model of 50 KB without any knowledge: it serves to start a llama-server that only has to parse grammars.

Written here, because neither llama.cpp's images nor its packages hold a model. All weights are zero, so every token is
as likely as every other one: sampled freely, its answers go through a grammar by chance.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from math import prod

CONTEXT = 1024
_EMBD = 32
_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9  # types of values
_F32 = 0  # a type of tensors
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of tokens
_UNK, _BOS, _EOS = range(3)

Value = int | float | str | Sequence[int] | Sequence[float] | Sequence[str]


def tiny_model() -> bytes:
    """The file: one layer of the architecture llama, and a token for each byte."""
    tensors = _tensors(vocabulary := _vocabulary())
    metadata = {**_hyperparameters(), **vocabulary}
    head = _MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    head += b"".join(_text(name) + _typed(value) for name, value in metadata.items())
    sizes = [_aligned(4 * prod(shape)) for shape in tensors.values()]
    offsets = itertools.accumulate(sizes, initial=0)
    for (name, shape), offset in zip(tensors.items(), offsets, strict=False):
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _F32, offset)
    return head.ljust(_aligned(len(head)), b"\0") + bytes(sum(sizes))


def token_of(byte: int) -> int:
    return _EOS + 1 + byte


def _hyperparameters() -> dict[str, Value]:
    return {
        "general.architecture": "llama",
        "general.name": "Corral grammar test",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": _EMBD,
        "llama.block_count": 1,
        "llama.feed_forward_length": _EMBD,
        "llama.attention.head_count": 1,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": _EMBD,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }


def _vocabulary() -> dict[str, Value]:
    """llama.cpp wants a line feed and a space among the tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, _NORMAL],
        "tokenizer.ggml.unknown_token_id": _UNK,
        "tokenizer.ggml.bos_token_id": _BOS,
        "tokenizer.ggml.eos_token_id": _EOS,
    }


def _tensors(vocabulary: Mapping[str, Value]) -> dict[str, tuple[int, ...]]:
    tokens = vocabulary["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    square, row = (_EMBD, _EMBD), (_EMBD,)
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return {
        "token_embd.weight": (_EMBD, len(tokens)),
        **{f"blk.0.{name}.weight": row for name in ("attn_norm", "ffn_norm")},
        **{f"blk.0.{name}.weight": square for name in matrices},
        "output_norm.weight": row,
    }


def _typed(value: Value) -> bytes:
    kind, data = _plain(value) if isinstance(value, int | float | str) else (_ARRAY, _list(value))
    return struct.pack("<I", kind) + data


def _plain(value: int | float | str) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _text(value)
    return (_FLOAT32, struct.pack("<f", value)) if isinstance(value, float) else (_UINT32, struct.pack("<I", value))


def _list(values: Sequence[int] | Sequence[float] | Sequence[str]) -> bytes:
    items = [_plain(value) for value in values]
    kind = _INT32 if items[0][0] == _UINT32 else items[0][0]  # llama.cpp reads kinds of tokens as signed
    return struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
