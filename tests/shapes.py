"""Models of real shapes, and with weights of zero that take no room on the disk."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gguf_bytes import ARRAY, F32, Typed, gguf, tensor

F16, Q8_0, Q4_0 = 1, 8, 2


@dataclass(frozen=True)
class Shape:
    """A model's measures; `build` writes it with weights of zero that take no room on the disk."""

    architecture: str = "llama"
    layers: int = 12
    embd: int = 1024
    heads: int = 16
    kv_heads: int = 4
    head: int = 64
    ff: int = 4096
    vocab: int = 32000
    tied: bool = False
    quant: int = F16
    experts: int = 0  # of `ff` each
    extra: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[tuple[str, list[int], int]]:
        q, kv = self.heads * self.head, self.kv_heads * self.head
        found = [("token_embd.weight", [self.embd, self.vocab], self.quant), ("output_norm.weight", [self.embd], 0)]
        if not self.tied:
            found.append(("output.weight", [self.embd, self.vocab], self.quant))
        for i in range(self.layers):
            norms = {"attn_norm": self.embd, "ffn_norm": self.embd}
            if self.architecture != "llama":
                norms |= {"attn_q_norm": self.head, "attn_k_norm": self.head}
            if self.architecture == "gemma3":
                norms |= {"post_attention_norm": self.embd, "post_ffw_norm": self.embd}
            matrices = {"attn_q": (self.embd, q), "attn_k": (self.embd, kv), "attn_v": (self.embd, kv)}
            matrices |= {"attn_output": (q, self.embd)}
            found += [(f"blk.{i}.{name}.weight", [size], 0) for name, size in norms.items()]
            found += [(f"blk.{i}.{name}.weight", list(sizes), self.quant) for name, sizes in matrices.items()]
            found += [(f"blk.{i}.{name}.weight", sizes, kind) for name, sizes, kind in self.feed_forward()]
        return found

    def feed_forward(self) -> list[tuple[str, list[int], int]]:
        rows = {"gate": [self.embd, self.ff], "up": [self.embd, self.ff], "down": [self.ff, self.embd]}
        if not self.experts:
            return [(f"ffn_{name}", sizes, self.quant) for name, sizes in rows.items()]
        router = ("ffn_gate_inp", [self.embd, self.experts], 0)
        return [router, *((f"ffn_{name}_exps", [*sizes, self.experts], self.quant) for name, sizes in rows.items())]

    def build(self, path: Path) -> Path:
        a = self.architecture
        values = {
            "general.architecture": a,
            f"{a}.block_count": self.layers,
            f"{a}.context_length": 131072,
            f"{a}.embedding_length": self.embd,
            f"{a}.feed_forward_length": self.ff,
            f"{a}.attention.head_count": self.heads,
            f"{a}.attention.head_count_kv": self.kv_heads,
            f"{a}.attention.key_length": self.head,
            f"{a}.attention.value_length": self.head,
            f"{a}.rope.dimension_count": self.head,
            f"{a}.attention.layer_norm_rms_epsilon": Typed(F32, 1e-5),
            **{f"{a}.{key}": value for key, value in self.extra.items()},
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]
            + [f"<0x{i:02X}>" for i in range(256)]
            + [f"t{i}" for i in range(self.vocab - 259)],
            "tokenizer.ggml.scores": struct.pack("<IIQ", ARRAY, F32, self.vocab) + bytes(4 * self.vocab),
            "tokenizer.ggml.token_type": struct.pack(f"<IIQ{self.vocab}i", ARRAY, 5, self.vocab, *[1] * self.vocab),
        }
        offset, records = 0, []
        for name, dims, kind in self.tensors():
            records.append(tensor(name, dims, kind, offset))
            elements = math.prod(dims)
            size = {0: elements * 4, F16: elements * 2, Q8_0: elements // 32 * 34, Q4_0: elements // 32 * 18}[kind]
            offset += -(-size // 32) * 32
        head = gguf(values, records)
        with path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + offset)
        return path


LLAMA = Shape()
BIG_VOCABULARY = Shape(embd=1536, heads=12, kv_heads=2, head=128, ff=6144, vocab=128256, quant=Q8_0)
GEMMA = Shape("gemma3", 18, 1152, 4, 1, 256, 6912, 262144, True, Q8_0, extra={"attention.sliding_window": 512})
QWEN = Shape("qwen3", 16, 2048, 16, 8, 128, 6144, 151936, True, Q4_0)
MANY_HEADS = Shape(layers=16, kv_heads=16, ff=2816)
MIXTURE = Shape(
    "qwen3moe",
    layers=8,
    heads=16,
    kv_heads=4,
    head=128,
    ff=768,
    quant=Q8_0,
    experts=32,
    extra={"expert_count": 32, "expert_used_count": 4, "expert_feed_forward_length": 768},
)
EMBEDDING = Shape(quant=Q8_0, extra={"pooling_type": 1})
