"""A toy of a vision projector: random weights, 170 KB, for the tiny chat model; what it sees means nothing."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

EMBD = 64  # of the chat model, see scripts/make_model.py
WIDTH, LAYERS, SIZE, PATCH = 32, 2, 28, 14


def make_projector(path: Path) -> None:
    random = np.random.default_rng(0)

    def weights(*shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    writer.add_string("clip.projector_type", "mlp")
    sizes = {"image_size": SIZE, "patch_size": PATCH, "embedding_length": WIDTH, "feed_forward_length": 2 * WIDTH}
    sizes |= {"projection_dim": EMBD, "block_count": LAYERS, "attention.head_count": 2}
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def layer(name: str, rows: int, columns: int | None = None) -> None:
        writer.add_tensor(f"{name}.weight", weights(rows, columns) if columns else weights(rows))
        writer.add_tensor(f"{name}.bias", weights(rows))

    writer.add_tensor("v.class_embd", weights(WIDTH))
    writer.add_tensor("v.patch_embd.weight", weights(WIDTH, 3, PATCH, PATCH))
    writer.add_tensor("v.position_embd.weight", weights((SIZE // PATCH) ** 2 + 1, WIDTH))
    layer("v.pre_ln", WIDTH)
    for block in (f"v.blk.{index}" for index in range(LAYERS)):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            layer(f"{block}.{name}", WIDTH, WIDTH)
        layer(f"{block}.ln1", WIDTH)
        layer(f"{block}.ln2", WIDTH)
        layer(f"{block}.ffn_up", 2 * WIDTH, WIDTH)
        layer(f"{block}.ffn_down", WIDTH, 2 * WIDTH)
    layer("mm.0", EMBD, WIDTH)
    layer("mm.2", EMBD, EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
