"""A fuzzer for the header reader: `python -m tests.gguf_fuzz 100000 [SEED]`; a short run of it is in the suite.

A case is one file or a set of parts, grown out of sound ones. A finding is an exception other than GGUFError, a header
that contradicts itself or its file, more than MOST_BYTES of memory, or more than MOST_SECONDS of CPU.
"""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from gateway.models.gguf.header import GGUFError, read_header
from gateway.models.memory.arguments import Facts
from gateway.models.memory.device import RAM, Device
from gateway.models.memory.ledger import cache_ram_mb, need
from tests.gguf_bytes import ARRAY, F32, LLAMA, STRING, U64, Typed, gguf, tensor

MOST_BYTES = 64 << 20
MOST_SECONDS = 3.0
MACHINE = (Device("GPU0", 24 << 30, 20 << 30), Device("GPU1", 12 << 30, 12 << 30), Device(RAM, 64 << 30, 60 << 30))
FACTS = (Facts(), Facts(ngl=0, ctx_total=4096, kv_unified=False), Facts(ngl=3, split_mode="row", flash=False))

_TENSORS = [tensor("token_embd.weight", [64, 3], 0, 0), tensor("output.weight", [64, 3], 8, 768)]
_MIXTURE = {
    "general.architecture": "qwen3moe",
    "general.alignment": 64,
    "qwen3moe.block_count": 3,
    "qwen3moe.embedding_length": 64,
    "qwen3moe.expert_count": 4,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.expert_feed_forward_length": 32,
    "qwen3moe.attention.head_count": [4, 4, 2],
    "qwen3moe.attention.head_count_kv": [2, 0, 2],
    "qwen3moe.attention.sliding_window": Typed(U64, 512),
    "qwen3moe.rope.freq_base": Typed(F32, 1e6),
    "qwen3moe.ssm.conv_kernel": 4,
}
SEEDS = (
    gguf(
        {
            **LLAMA,
            "llama.attention.sliding_window_pattern": [True, False, True, False],
            "tokenizer.ggml.tokens": ["a", "bb", "ccc"],
            "tokenizer.chat_template": "{{x}}",
        },
        _TENSORS,
        data=1024,
    ),
    gguf(_MIXTURE, [*_TENSORS, tensor("blk.0.ffn_up_exps.weight", [64, 32, 4], 2, 1024)], data=8192),
    gguf({**LLAMA, "split.no": 0, "split.count": 3}, _TENSORS, data=1024),
    gguf({"split.no": 1, "split.count": 3}, [tensor("blk.1.w", [64, 4], 0, 0)], data=1024, version=2),
)
_EDGES = (0, 1, 7, 255, 256, 511, 513, 4096, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 48, 1 << 62)
NUMBERS = (*_EDGES, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_RECORDS = (
    struct.pack("<IIQIQ", ARRAY, ARRAY, 1, ARRAY, 1) * 40,  # lists in lists
    struct.pack("<IIQ", ARRAY, STRING, 1 << 20),
    struct.pack("<IQ", STRING, 1 << 63),
    struct.pack("<IIQ", ARRAY, U64, 1 << 61),
    struct.pack("<Q", 1 << 63) + b"x",
)


def mutated(chance: random.Random) -> bytes:
    data = bytearray(chance.choice(SEEDS))
    for _ in range(chance.choice((1, 1, 1, 2, 4, 12))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if at < len(data):
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 1:
                data[at : at + 8] = struct.pack("<Q", chance.choice(NUMBERS))
            case 2:
                data[at : at + 4] = struct.pack("<I", chance.choice(NUMBERS) & 0xFFFFFFFF)
            case 3:
                del data[at : at + chance.choice((1, 4, 8, 40, 1 << 20))]
            case 4:
                data[at:at] = chance.choice(_RECORDS)
            case 5:
                other = chance.choice(SEEDS)
                start = chance.randrange(len(other))
                data[at:at] = other[start : start + chance.randrange(200)]
            case 6:
                data[at:at] = chance.randbytes(chance.randrange(40))
    return bytes(data)


def write_case(folder: Path, chance: random.Random) -> Path:
    """One file, or parts of which some are another, lead to each other, or are missing."""
    if chance.random() < 0.8:
        path = folder / "model.gguf"
        path.write_bytes(mutated(chance))
        if chance.random() < 0.05:
            os.truncate(path, 1 << 40)  # sparse: what it claims may be there
        return path
    count = chance.choice((1, 2, 3, 3, 9))
    paths = [folder / f"model-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    for path in paths:
        match chance.randrange(6):
            case 0:
                path.symlink_to(chance.choice(paths).name)
            case 1 if path != paths[0]:
                pass
            case _:
                path.write_bytes(mutated(chance))
    return chance.choice(paths)


def survives(path: Path) -> str:
    """What became of it, in a word. Raises AssertionError, or whatever the reader should not have raised."""
    try:
        header = read_header(path)
    except GGUFError as error:
        assert 0 < len(str(error)) < 600 and str(error).isprintable()
        return "refused"
    assert header.parts >= 1
    assert 0 <= header.tensor_bytes
    assert header.expert_bytes <= header.tensor_bytes
    assert len(header.n_head_kv) == header.n_layers
    if header.kind != "model":
        return header.kind
    assert 0 <= cache_ram_mb(header, 4096, 4) <= 1024
    for facts in FACTS:
        found = need(header, facts, MACHINE)
        assert all(size >= 0 for size in found.values()) and set(found) <= {one.name for one in MACHINE}
        assert sum(found.values()) >= header.tensor_bytes * 0.99
    return "read"


def campaign(cases: int, seed: int = 0, folder: Path | None = None) -> Counter[str]:
    """Runs so many cases; raises at the first finding, which says how to see it again."""
    ends: Counter[str] = Counter()
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for number in range(cases):
                chance = random.Random(f"{seed}/{number}")
                path = write_case(Path(place), chance)
                tracemalloc.reset_peak()
                held, begun = tracemalloc.get_traced_memory()[0], time.process_time()
                try:
                    ends[survives(path)] += 1
                    assert (peak := tracemalloc.get_traced_memory()[1] - held) < MOST_BYTES, f"{peak} bytes"
                    assert (seconds := time.process_time() - begun) < MOST_SECONDS, f"{seconds} s"
                except Exception as error:
                    error.add_note(f"case {number} of seed {seed}")
                    raise
                for entry in Path(place).iterdir():
                    entry.unlink()
    finally:
        tracemalloc.stop()
    return ends


if __name__ == "__main__":
    begin = time.monotonic()
    found = campaign(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    sys.stdout.write(f"{dict(found)} in {time.monotonic() - begin:.0f} s\n")
