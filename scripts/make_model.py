#!/usr/bin/env python3
"""Writes a GGUF model for demonstrations and tests: llama architecture, random weights, random words for answers.

A few weights are set by hand, so that it is pleasant to work with; see `output`.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]

WORDS = """
about after air all and are as at away be bell bird blue boat book bread bright brook by calm came can carry clay cloud
coal cold copper corn could creek dance dark dawn day deep door down dream dust each early earth east echo ember even
every far fern field find fire fish flow fog forest found from garden gate gather glass gold grain grass gray green had
hand harbor has have hay hear here high hill his home horse hour house ice in into iron is island keep kind lake lamp
land leaf light lily little long look made map maple meadow milk mill mist moon moss most mountain near night no north
not now oak of off old on one open or orchard other our over owl path pine plain pond quiet rain red reed ridge river
road rock room root rose salt sand sea see seed shade shore silver sky sleep slow small smoke snow so soft some song
south spring star still stone storm story summer sun swan tall than that the then there they thread through tide time to
town tree two under up valley very wait walk wall warm was water wave way we well west wheat wheel when white wide wild
willow wind winter with wood wool world year yellow you young
""".split()
PRINTABLE = [chr(code) for code in range(0x21, 0x7F)]
TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNK, BOS, EOS, IM_START, IM_END = range(5)

# What the first four places of the residual stream mean; the others are random.
ALWAYS, IS_BRACE, IN_JSON, RESERVED = range(4)


@dataclass(frozen=True)
class Shape:
    """The size of a model. `embd` divides by `heads`, `heads` by `kv_heads`, and for quantised types `embd` by 32."""

    layers: int = 2
    embd: int = 64
    heads: int = 4
    kv_heads: int = 4
    context: int = 32768
    type: str = "f32"

    @property
    def head_size(self) -> int:
        return self.embd // self.heads

    @property
    def feed_forward(self) -> int:
        return 2 * self.embd

    @property
    def weights(self) -> int:
        """Parameters in the matrices, vocabulary aside."""
        kv = self.kv_heads * self.head_size
        return self.layers * self.embd * (2 * self.embd + 2 * kv + 3 * self.feed_forward)

    def grown_to(self, megabytes: int) -> "Shape":
        """A wider, deeper shape whose file has at least `megabytes`: for tests that need a slow or a large model."""
        block, size = gguf.GGML_QUANT_SIZES[TYPES[self.type]]
        wanted = megabytes * 2**20 * block // size
        shape = replace(self, layers=max(self.layers, 8)) if self.weights < wanted else self
        while shape.weights < wanted:
            embd = shape.embd + 64
            shape = replace(shape, embd=embd, heads=embd // 64, kv_heads=embd // 64)
        return shape


def make_model(
    path: Path, *, seed: int = 0, name: str = "Corral demo", embedding: bool = False, shape: Shape | None = None
) -> None:
    """Writes the model to `path`, all at once. The same arguments give the same weights.

    With `embedding` the file asks for mean pooling, and its vectors tell texts apart by the characters they use.
    """
    shape = shape or Shape()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    try:
        add_metadata(writer, shape, name=name, embedding=embedding)
        add_vocabulary(writer)
        for tensor, weights in tensors(shape, np.random.default_rng(seed), embedding=embedding):
            kind = TYPES[shape.type] if weights.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor, gguf.quantize(weights, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    unfinished.replace(path)


def add_metadata(writer: gguf.GGUFWriter, shape: Shape, *, name: str, embedding: bool) -> None:
    writer.add_name(name)
    writer.add_description("Random weights, for demonstration and tests: its answers mean nothing.")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if shape.type == "f32" else gguf.LlamaFileType.GUESSED)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.embd)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(1e8)
    writer.add_layer_norm_rms_eps(1e-5)
    if embedding:
        writer.add_pooling_type(gguf.PoolingType.MEAN)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """One token a printable character or, elsewhere, a byte: so a text's count of tokens is easily told."""
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    spoken = ["▁", *PRINTABLE, *(f"▁{word}" for word in WORDS)]
    kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 4
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(spoken)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*control, *(f"<0x{byte:02X}>" for byte in range(256)), *spoken])
    writer.add_token_scores([0.0] * len(kinds))
    writer.add_token_types(kinds)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(IM_END)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHATML)


SPACE = IM_END + 1 + 256
FIRST_WORD = SPACE + 1 + len(PRINTABLE)
VOCABULARY = FIRST_WORD + len(WORDS)


def token(character: str) -> int:
    return SPACE + 1 + PRINTABLE.index(character)


def tensors(shape: Shape, random: np.random.Generator, *, embedding: bool) -> Iterator[tuple[str, Matrix]]:
    """The weights in llama.cpp's names and layout, (out, in)."""

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Matrix:
        return random.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale / math.sqrt(columns))

    yield "token_embd.weight", embedded_tokens(shape, random, embedding=embedding)
    for layer in range(shape.layers):
        for part, weights in block(shape, matrix, first=layer == 0).items():
            yield f"blk.{layer}.{part}.weight", weights
    yield "output_norm.weight", np.ones(shape.embd, np.float32)
    yield "output.weight", output(matrix(VOCABULARY, shape.embd, scale=2.0))


def embedded_tokens(shape: Shape, random: np.random.Generator, *, embedding: bool) -> Matrix:
    tokens = random.standard_normal((VOCABULARY, shape.embd), dtype=np.float32)
    tokens[:, :RESERVED] = 0
    if not embedding:
        tokens[:, ALWAYS] = 4
        tokens[token("{"), IS_BRACE] = 4
    return tokens


def block(shape: Shape, matrix: Callable[..., Matrix], *, first: bool) -> dict[str, Matrix]:
    kv = shape.kv_heads * shape.head_size
    weights = {
        "attn_norm": np.ones(shape.embd, np.float32),
        "attn_q": matrix(shape.embd, shape.embd),
        "attn_k": matrix(kv, shape.embd),
        "attn_v": matrix(kv, shape.embd),
        "attn_output": matrix(shape.embd, shape.embd, scale=0.5),
        "ffn_norm": np.ones(shape.embd, np.float32),
        "ffn_gate": matrix(shape.feed_forward, shape.embd),
        "ffn_up": matrix(shape.feed_forward, shape.embd),
        "ffn_down": matrix(shape.embd, shape.feed_forward, scale=0.5),
    }
    weights["attn_output"][:RESERVED] = 0
    weights["ffn_down"][:RESERVED] = 0
    if first:
        look_for_braces(weights, shape.head_size)
    return weights


def look_for_braces(weights: dict[str, Matrix], head_size: int) -> None:
    """The first head attends to a `{` wherever there is one, and reports it in IN_JSON.

    It does so in the last pair of the head's places: RoPE turns that one so slowly that distance does not matter.
    """
    unturned = head_size - 2
    for name, source, scale in (("attn_q", ALWAYS, 4), ("attn_k", IS_BRACE, 4), ("attn_v", IS_BRACE, 1.5)):
        row = 0 if name == "attn_v" else unturned
        weights[name][row] = 0
        weights[name][row, source] = scale
    weights["attn_output"][IN_JSON, 0] = 1


def output(rows: Matrix) -> Matrix:
    """The signposts: words are likely, single characters rare, bytes and control tokens never come of themselves.

    So `max_tokens` decides about the length, unless a grammar does. Once a `{` was said, quotes and brackets get
    likely enough to close what is open, so that JSON ends soon.
    """
    rows[:, :RESERVED] = 0
    rows[:SPACE, ALWAYS] = -10
    rows[SPACE:FIRST_WORD, ALWAYS] = -3
    for character, lift in (('"', 3.8), ("}", 2.4), ("]", 2.4)):
        rows[token(character), IN_JSON] = lift
    rows[token('"'), IS_BRACE] = 4
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Shape()
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="Corral demo")
    parser.add_argument("--embedding", action="store_true", help="for llama-server --embedding, with mean pooling")
    parser.add_argument("--layers", type=int, default=default.layers)
    parser.add_argument("--embd", type=int, default=default.embd)
    parser.add_argument("--heads", type=int, default=default.heads)
    parser.add_argument("--kv-heads", type=int, default=default.kv_heads)
    parser.add_argument("--ctx", type=int, default=default.context, help="the context it claims to be trained on")
    parser.add_argument("--type", choices=sorted(TYPES), default=default.type)
    parser.add_argument("--size-mb", type=int, default=0, help="grow layers and width until the file has this size")
    chosen = parser.parse_args()
    shape = Shape(chosen.layers, chosen.embd, chosen.heads, chosen.kv_heads, chosen.ctx, chosen.type)
    make_model(
        chosen.out,
        seed=chosen.seed,
        name=chosen.name,
        embedding=chosen.embedding,
        shape=shape.grown_to(chosen.size_mb),
    )
    print(f"{chosen.out}: {chosen.out.stat().st_size / 2**20:.1f} MB, random weights", file=sys.stderr)


if __name__ == "__main__":
    main()
