"""What models will need, against what llama-server said it took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.models.gguf import GGUFHeader, read_header
from gateway.models.ledger import Footprint, fit_parallel, predict
from tests.shapes import BIG_VOCABULARY, GEMMA, LLAMA, MANY_HEADS, Q8_0, QWEN

MIB = 1 << 20

# (shape, -c, -np, cache type, weights, KV, compute with output) in MiB, as build 11669 logged them at -lv 4.
MEASURED = [
    (LLAMA, 4096, 1, "f16", 473.1, 48.0, 38.1),
    (LLAMA, 16384, 4, "f16", 473.1, 192.0, 38.5),
    (LLAMA, 32768, 2, "f16", 473.1, 384.0, 50.3),
    (LLAMA, 1000, 3, "f16", 473.1, 18.0, 35.0),
    (LLAMA, 8192, 2, "q8_0", 473.1, 51.0, 38.3),
    (BIG_VOCABULARY, 16384, 4, "f16", 810.6, 192.0, 57.0),
    (GEMMA, 4096, 1, "f16", 795.8, 27.0, 57.8),
    (GEMMA, 16384, 4, "f16", 795.8, 108.0, 60.8),
    (GEMMA, 32768, 2, "f16", 795.8, 126.0, 70.8),
    (QWEN, 16384, 4, "f16", 766.2, 1024.0, 62.3),  # the tied Q4_0 embedding is there twice
    (MANY_HEADS, 32768, 2, "f16", 517.1, 2048.0, 42.8),
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, GGUFHeader]:
    folder = tmp_path_factory.mktemp("models")
    shapes = (LLAMA, BIG_VOCABULARY, GEMMA, QWEN, MANY_HEADS)
    return {id(shape): read_header(shape.build(folder / f"{i}.gguf")) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0].architecture}-{row[1]}-{row[2]}-{row[3]}")
def test_predictions_are_what_llama_server_took(headers: dict[int, GGUFHeader], row: Any) -> None:
    shape, ctx, slots, cache, weights, kv, compute = row
    found = predict(headers[id(shape)], ctx, cache, cache, slots)
    assert found.weights_bytes / MIB == pytest.approx(weights, rel=0.01)
    assert found.kv_bytes / MIB == pytest.approx(kv, rel=0.01)
    assert found.compute_bytes / MIB == pytest.approx(compute, rel=0.02)
    assert found.total == found.weights_bytes + found.kv_bytes + found.compute_bytes


HEADER = GGUFHeader(
    architecture="llama",
    name="",
    kind="model",
    file_type="Q8_0",
    n_layers=4,
    n_ctx_train=4096,
    n_embd=512,
    n_ff=1024,
    n_head=8,
    n_head_kv=(8, 8, 8, 8),
    key_length=64,
    value_length=64,
    key_length_swa=64,
    value_length_swa=64,
    sliding_window=0,
    sliding_pattern=0,
    shared_kv_layers=0,
    full_attention_interval=0,
    ssm=(0, 0, 0, 0),
    n_vocab=1000,
    pooling_type=None,
    chat_template=True,
    tensor_bytes=500_000_000,
    embedding_type=Q8_0,
    embedding_bytes=100_000_000,
    tied=False,
    parts=1,
)
ROW = 8 * (64 + 64) * 2  # bytes of one layer's K and V of one token


@pytest.mark.parametrize(
    ("change", "cells"),
    [
        ({}, 4 * 4096),
        ({"n_head_kv": (8, 0, 8, 0)}, 2 * 4096),
        ({"value_length": 0}, 2 * 4096),  # MLA: V is part of K
        ({"shared_kv_layers": 1}, 3 * 4096),
        ({"architecture": "bert"}, 0),
        ({"sliding_window": 100}, 4 * 4096),  # a window that llama.cpp does not use for this architecture
        ({"sliding_window": 100, "sliding_pattern": 2}, 2 * 4096 + 2 * 768),
        ({"sliding_window": 100, "sliding_pattern": (1, 1, 1, 0)}, 4096 + 3 * 768),
        ({"sliding_window": 100, "architecture": "gpt-oss"}, 2 * 4096 + 2 * 768),
        ({"sliding_window": 9000, "architecture": "gpt-oss"}, 4 * 4096),
        ({"sliding_window": 100, "sliding_pattern": 4, "key_length_swa": 32, "value_length_swa": 32}, 4096 + 3 * 384),
    ],
)
def test_which_layers_keep_how_much(change: dict[str, Any], cells: int) -> None:
    assert predict(replace(HEADER, **change), 4096).kv_bytes == cells * ROW


def test_recurrent_layers_keep_a_state_for_each_slot() -> None:
    hybrid = replace(HEADER, full_attention_interval=4, ssm=(4, 1024, 16, 1))
    state = 4 * (3 * (1024 + 2 * 16) + 16 * 1024)
    assert predict(hybrid, 8192, n_parallel=2).kv_bytes == 2 * (3 * state + 4096 * ROW)
    mamba = replace(HEADER, n_head_kv=(0, 0, 0, 0), ssm=(4, 2048, 16, 0))
    assert predict(mamba, 8192).kv_bytes == 4 * 4 * (3 * 2048 + 16 * 2048)


def test_contexts_are_rounded_as_llama_server_rounds_them() -> None:
    assert predict(HEADER, 0).kv_bytes == 4 * 4096 * ROW  # 0: as trained
    assert predict(HEADER, 1).kv_bytes == 4 * 256 * ROW
    assert predict(HEADER, 1000, n_parallel=3).kv_bytes == 4 * 3 * 512 * ROW


def test_cache_types() -> None:
    whole = predict(HEADER, 4096).kv_bytes
    assert predict(HEADER, 4096, "q8_0", "q8_0").kv_bytes == whole * 34 // 64
    assert predict(HEADER, 4096, "f32", "q4_0").kv_bytes == whole // 2 * 2 + whole // 2 * 18 // 64
    assert predict(HEADER, 4096, "q3_new", "bf16").kv_bytes == whole


def test_layers_on_a_gpu() -> None:
    ram, gpu = predict(HEADER, 4096), predict(HEADER, 4096, ngl=99)
    assert gpu.weights_bytes == 400_000_000 and gpu.kv_bytes == ram.kv_bytes  # the embedding stays in RAM
    assert predict(replace(HEADER, tied=True), 4096, ngl=99).weights_bytes == 500_000_000  # or is copied
    half = predict(replace(HEADER, n_layers=9, n_head_kv=(8,) * 9), 4096, ngl=5)
    assert half.weights_bytes == 200_000_000
    assert predict(HEADER, 4096, ngl=0) == Footprint(0, 0, 0)


def test_as_many_slots_as_fit() -> None:
    need = {slots: predict(HEADER, 4096 * slots, n_parallel=slots).total for slots in range(1, 9)}
    assert sorted(need.values()) == list(need.values())
    for slots in (1, 2, 3, 4):
        assert fit_parallel(HEADER, 4096, need[slots] + 512 * MIB, 512 * MIB) == slots
        assert fit_parallel(HEADER, 4096, need[slots] + 512 * MIB - 1, 512 * MIB) == max(1, slots - 1)
    assert fit_parallel(HEADER, 4096, 1 << 50, 0) == 4
    assert fit_parallel(HEADER, 4096, 1 << 50, 0, wanted=8) == 8
    assert fit_parallel(HEADER, 4096, 0, 0) == 1
