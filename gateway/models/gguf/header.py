"""What a model file says of itself: its shape, kind and size, as far as starting it and sizing it need that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gateway.models.gguf.container import Contents, GGUFError, read_file

__all__ = ["GGUFError", "GGUFHeader", "read_header", "shards"]

# llama_ftype, by number
_FILE_TYPES = (
    "F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS IQ2_XS "
    "Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0 MXFP4 NVFP4"
).split()
_WANTED = re.compile(
    r"general\.(architecture|name|type|file_type|alignment)|split\.(no|count)"
    r"|[^.]+\.(block_count|context_length|embedding_length|feed_forward_length|expert_feed_forward_length"
    r"|expert_used_count|pooling_type|vocab_size|full_attention_interval"
    r"|ssm\.(conv_kernel|inner_size|state_size|group_count)"
    r"|attention\.(head_count|head_count_kv|key_length|value_length|key_length_mla|kv_lora_rank|key_length_swa"
    r"|value_length_swa|shared_kv_layers|sliding_window|sliding_window_pattern))"
)
_NAMED = frozenset(("token_embd.weight", "output.weight"))
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
EMBEDDING_ARCHITECTURES = frozenset(
    "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding t5encoder "
    "llama-embed".split()
)
_POOLING_MEAN, _POOLING_LAST, _POOLING_RANK = 1, 3, 4  # enum llama_pooling_type: mean, cls, last, rank
_MAX_LAYERS, _MAX_COUNT = 2048, 1 << 31


@dataclass(frozen=True)
class GGUFHeader:
    """A model's header. Bytes are those of all parts; a count that the file does not give is 0."""

    architecture: str
    name: str
    kind: Literal["model", "mmproj", "adapter"]
    file_type: str  # "Q4_K_M"; empty if unknown
    n_layers: int
    n_ctx_train: int
    n_embd: int
    n_ff: int  # the widest layer's; of a mixture, all experts that one token uses
    n_head: int
    n_head_kv: tuple[int, ...]  # one a layer; 0 where a layer keeps no KV
    key_length: int  # of one head
    value_length: int  # 0: V is read out of K (MLA)
    key_length_swa: int
    value_length_swa: int
    sliding_window: int
    sliding_pattern: int | tuple[int, ...]  # a period, or a flag a layer; 0: the architecture's own
    shared_kv_layers: int  # so many last layers keep no KV of their own
    full_attention_interval: int  # each so-many-th layer attends, the others are recurrent
    ssm: tuple[int, int, int, int]  # conv_kernel, inner_size, state_size, group_count
    n_vocab: int
    pooling_type: int | None
    chat_template: bool
    tensor_bytes: int
    embedding_type: int  # ggml_type of token_embd, -1 without one
    embedding_bytes: int
    tied: bool  # the embedding is the output, too
    parts: int
    output_bytes: int = 0  # 0 where it is tied
    expert_bytes: int = 0  # of all mixtures' experts together

    @property
    def is_reranker(self) -> bool:
        return self.pooling_type == _POOLING_RANK

    @property
    def is_embedding(self) -> bool:
        """Whether the model embeds or ranks, and so has to be started with `--embedding` or `--reranking`."""
        pools = self.pooling_type is not None and _POOLING_MEAN <= self.pooling_type <= _POOLING_RANK
        return pools or self.architecture in EMBEDDING_ARCHITECTURES

    @property
    def embeds_at_once(self) -> bool:
        """Whether a text that it embeds must fit into one batch: llama-server splits it only for pooling `last`."""
        return self.is_embedding and self.pooling_type != _POOLING_LAST


def shards(path: Path) -> tuple[Path, ...]:
    """All parts of the model that `path` is a part of, first to last; a file for itself is its own only part.

    Raises GGUFError, which names the first part that is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if not match:
        return (path,)
    stem, number, count = match[1], int(match[2]), int(match[3])
    if not 1 <= number <= count:
        raise GGUFError(f"{path.name} is named as part {number} of {count}, which cannot be")
    parts = []
    for i in range(1, count + 1):  # checked one by one: a name can claim 99,999
        parts.append(path.with_name(f"{stem}-{i:05}-of-{count:05}.gguf"))
        if not parts[-1].is_file():
            raise GGUFError(f"{parts[-1].name} is missing in {path.parent}, fetch it: the model has {count} parts")
    return tuple(parts)


def read_header(path: Path) -> GGUFHeader:
    """The header of the model at `path`, which may be any of its parts. Raises GGUFError.

    Blocking: a millisecond, and 80 ns for each text of the vocabulary (30 ms for Llama 3's).
    """
    parts = shards(path)
    first, *others = (read_file(part, _WANTED, _NAMED) for part in parts)
    fields = _Fields(parts[0].name, first)
    said = fields.count("split.count")
    if said > 1 and said != len(parts):
        number = fields.count("split.no") + 1
        raise GGUFError(
            f"{path.name} is part {number} of {said}, but llama-server finds the others only if its name ends in "
            f"-{number:05}-of-{said:05}.gguf"
        )
    for other in others:
        first.tensor_bytes += other.tensor_bytes
        first.expert_bytes += other.expert_bytes
        first.named |= other.named
    return _header(fields, first, len(parts))


class _Fields:
    """Typed access to the keys; those of the architecture by their names behind its own."""

    def __init__(self, file: str, contents: Contents) -> None:
        self.file, self.values = file, contents.values
        self.architecture = self.text("general.architecture")
        if not re.fullmatch(r"[\w-]{1,64}", self.architecture, re.ASCII):
            raise GGUFError(f"{file} names no architecture, so it is no model")

    def fail(self, key: str) -> GGUFError:
        return GGUFError(f"{self.file} is damaged: {key} is {str(self.values.get(key))[:40]!r}")

    def text(self, key: str) -> str:
        value = self.values.get(key, "")
        if not isinstance(value, str):
            raise self.fail(key)
        return "".join(c for c in value if c.isprintable())

    def counts(self, key: str) -> tuple[int, ...]:
        """A count, or a list with one for each layer; empty if the key is absent. `.key` is the architecture's own."""
        key = self.architecture + key if key.startswith(".") else key
        value = self.values.get(key, ())
        values = value if isinstance(value, tuple) else (value,)
        counts = tuple(int(v) for v in values if isinstance(v, int) and 0 <= v < _MAX_COUNT)
        if len(counts) != len(values):
            raise self.fail(key)
        return counts

    def count(self, key: str, default: int = 0) -> int:
        """Of a list, the largest."""
        return max(self.counts(key), default=default)


def _header(fields: _Fields, contents: Contents, parts: int) -> GGUFHeader:
    count = fields.count
    architecture, kind = fields.architecture, _kind(fields)
    n_layers, n_embd, n_head = count(".block_count"), count(".embedding_length"), count(".attention.head_count")
    if kind == "model" and not (0 < n_layers <= _MAX_LAYERS and n_embd):
        raise GGUFError(f"{fields.file} is no model: {architecture} with {n_layers} layers of {n_embd}")
    head_size = n_embd // n_head if n_head else 0
    key_length, value_length = count(".attention.key_length", head_size), count(".attention.value_length", head_size)
    pattern = fields.counts(".attention.sliding_window_pattern")
    n_ff = max(count(".feed_forward_length"), count(".expert_feed_forward_length") * count(".expert_used_count"))
    pooling_type = fields.counts(".pooling_type")
    embedding = contents.named.get("token_embd.weight", (-1, 0))
    file_type = count("general.file_type", len(_FILE_TYPES))
    return GGUFHeader(
        architecture=architecture,
        name=fields.text("general.name"),
        kind=kind,
        file_type=_FILE_TYPES[file_type].strip("-") if file_type < len(_FILE_TYPES) else "",
        n_layers=n_layers,
        n_ctx_train=count(".context_length"),
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=_per_layer(fields.counts(".attention.head_count_kv") or (n_head,), n_layers),
        key_length=key_length,
        value_length=0 if count(".attention.key_length_mla") else value_length,
        key_length_swa=count(".attention.key_length_swa", key_length),
        value_length_swa=count(".attention.value_length_swa", value_length),
        sliding_window=count(".attention.sliding_window"),
        sliding_pattern=pattern[0] if len(pattern) == 1 else _per_layer(pattern, n_layers) if pattern else 0,
        shared_kv_layers=count(".attention.shared_kv_layers"),
        full_attention_interval=count(".full_attention_interval"),
        ssm=(
            count(".ssm.conv_kernel"),
            count(".ssm.inner_size"),
            count(".ssm.state_size"),
            count(".ssm.group_count"),
        ),
        n_vocab=count("tokenizer.ggml.tokens") or count(".vocab_size"),
        pooling_type=pooling_type[0] if pooling_type else None,
        chat_template="tokenizer.chat_template" in fields.values,
        tensor_bytes=contents.tensor_bytes,
        embedding_type=embedding[0],
        embedding_bytes=embedding[1],
        tied="output.weight" not in contents.named,
        parts=parts,
        output_bytes=contents.named.get("output.weight", (-1, 0))[1],
        expert_bytes=min(contents.expert_bytes, contents.tensor_bytes),
    )


def _kind(fields: _Fields) -> Literal["model", "mmproj", "adapter"]:
    said = fields.text("general.type")
    if said == "adapter":
        return "adapter"
    return "mmproj" if said == "mmproj" or fields.architecture == "clip" else "model"


def _per_layer(counts: tuple[int, ...], n_layers: int) -> tuple[int, ...]:
    """One for each layer: the last one stands for those that a shorter list leaves out."""
    return (counts + counts[-1:] * n_layers)[:n_layers]
