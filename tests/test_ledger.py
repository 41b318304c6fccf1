"""What models will need, against what llama-server said it took."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.models.gguf.header import GGUFHeader, read_header
from gateway.models.memory.arguments import Facts, facts_of
from gateway.models.memory.device import RAM, Device
from gateway.models.memory.ledger import Footprint, cache_ram_mb, need, predict, usable_budget
from gateway.models.policy import Budget
from tests.shapes import BIG_VOCABULARY, EMBEDDING, GEMMA, LLAMA, MANY_HEADS, MIXTURE, Q8_0, QWEN

MIB = 1 << 20
GIB = 1 << 30
MACHINE_RAM = Device(RAM, 64 * GIB, 60 * GIB)

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


def foretold(header: GGUFHeader, ctx: int, k: str = "f16", v: str = "f16", slots: int = 1) -> Footprint:
    facts = Facts(ctx_total=ctx, cache_type_k=k, cache_type_v=v, parallel=slots, kv_unified=False)
    return predict(header, facts)


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, GGUFHeader]:
    folder = tmp_path_factory.mktemp("models")
    shapes = (LLAMA, BIG_VOCABULARY, GEMMA, QWEN, MANY_HEADS, MIXTURE, EMBEDDING)
    return {id(shape): read_header(shape.build(folder / f"{i}.gguf")) for i, shape in enumerate(shapes)}


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row[0].architecture}-{row[1]}-{row[2]}-{row[3]}")
def test_predictions_are_what_llama_server_took(headers: dict[int, GGUFHeader], row: Any) -> None:
    shape, ctx, slots, cache, weights, kv, compute = row
    found = foretold(headers[id(shape)], ctx, cache, cache, slots)
    assert found.weights_bytes / MIB == pytest.approx(weights, rel=0.01)
    assert found.kv_bytes / MIB == pytest.approx(kv, rel=0.01)
    assert found.compute_bytes / MIB == pytest.approx(compute, rel=0.02)
    assert found.total == found.weights_bytes + found.kv_bytes + found.compute_bytes


# The same with a model's own arguments; all buffers together in MiB.
MEASURED_WITH = [
    (LLAMA, "-c 16384 -np 4 --kv-unified", 715.6),
    (LLAMA, "-c 16384", 715.6),  # four slots that share
    (LLAMA, "-c 8192 -np 2 -ctk q8_0 -ctv q5_1 -fa on", 554.9),
    (LLAMA, "-c 8192 -np 1 -fa off", 854.2),
    (LLAMA, "-c 8192 -np 2 -b 2048 -ub 2048", 721.4),
    (LLAMA, "-c 0 -np 1", 2171.2),
    (GEMMA, "-c 16384 -np 4 --kv-unified", 955.6),
    (GEMMA, "-c 8192 -np 2 --swa-full", 1001.6),
    (GEMMA, "-c 8192 -np 2 -b 2048 -ub 2048", 1129.9),
    (GEMMA, "-c 16384 -np 4 --no-kv-unified -fa off", 971.6),
    (MIXTURE, "-c 16384 -np 4 --no-kv-unified", 1010.5),
    (MIXTURE, "-c 8192 -np 1 -fa off", 1142.1),
    (QWEN, "-c 8192 -np 2 --no-repack", 1172.4),
    (EMBEDDING, "-c 8192 -np 2 --embedding -b 4096 -ub 4096", 651.8),
    (EMBEDDING, "-c 8192 -np 1 --embedding -b 8192 -ub 8192", 1019.9),
]


@pytest.mark.parametrize("row", MEASURED_WITH, ids=lambda row: f"{row[0].architecture} {row[1]}")
def test_needs_follow_a_models_own_arguments(headers: dict[int, GGUFHeader], row: Any) -> None:
    shape, arguments, mebibytes = row
    header = headers[id(shape)]
    found = need(header, facts_of(["-c", "999", "--cache-ram", "0", *arguments.split()]), (MACHINE_RAM,))
    itself = 24 * MIB + 160 * header.n_vocab
    assert set(found) == {RAM}
    assert (found[RAM] - itself) / MIB == pytest.approx(mebibytes, rel=0.01)


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
    assert foretold(replace(HEADER, **change), 4096).kv_bytes == cells * ROW


def test_recurrent_layers_keep_a_state_for_each_slot() -> None:
    hybrid = replace(HEADER, full_attention_interval=4, ssm=(4, 1024, 16, 1))
    state = 4 * (3 * (1024 + 2 * 16) + 16 * 1024)
    assert foretold(hybrid, 8192, slots=2).kv_bytes == 2 * (3 * state + 4096 * ROW)
    mamba = replace(HEADER, n_head_kv=(0, 0, 0, 0), ssm=(4, 2048, 16, 0))
    assert foretold(mamba, 8192).kv_bytes == 4 * 4 * (3 * 2048 + 16 * 2048)


def test_contexts_are_rounded_as_llama_server_rounds_them() -> None:
    assert foretold(HEADER, 0).kv_bytes == 4 * 4096 * ROW  # 0: as trained
    assert foretold(HEADER, 1).kv_bytes == 4 * 256 * ROW
    assert foretold(HEADER, 1000, slots=3).kv_bytes == 4 * 3 * 512 * ROW


def test_cache_types() -> None:
    whole = foretold(HEADER, 4096).kv_bytes
    assert foretold(HEADER, 4096, "q8_0", "q8_0").kv_bytes == whole * 34 // 64
    assert foretold(HEADER, 4096, "f32", "q4_0").kv_bytes == whole // 2 * 2 + whole // 2 * 18 // 64
    assert foretold(HEADER, 4096, "q3_new", "bf16").kv_bytes == whole


def test_a_cache_of_prompts_is_as_large_as_the_slots_at_most() -> None:
    assert cache_ram_mb(HEADER, 4096, 1) == 4 * 4096 * ROW // MIB == 32
    assert cache_ram_mb(HEADER, 4096, 4) == 128
    assert cache_ram_mb(HEADER, 1 << 20, 4) == 1024
    assert cache_ram_mb(replace(HEADER, architecture="bert"), 4096, 4) == 0  # nothing to keep
    assert cache_ram_mb(replace(HEADER, n_head_kv=(1, 0, 0, 0), key_length=1, value_length=1), 256, 1) == 1


def test_what_is_booked_besides_the_buffers() -> None:
    plain = need(HEADER, facts_of("-c 4096 -np 1 --cache-ram 0".split()), (MACHINE_RAM,))[RAM]
    assert plain - foretold(HEADER, 4096).total == 24 * MIB + 160 * HEADER.n_vocab

    def more(arguments: str, **others: Any) -> int:
        argv = f"-c 4096 -np 1 --cache-ram 0 {arguments}".split()
        return need(HEADER, facts_of(argv), (MACHINE_RAM,), **others)[RAM] - plain

    assert more("--cache-ram 100") == 100 * MIB
    assert more("--mmproj x", file_bytes=50) == 50
    assert more("", multiplier=1.5) == round(foretold(HEADER, 4096).total * 0.5)
    assert more("--cache-ram 100", multiplier=1.5) == 100 * MIB + more("", multiplier=1.5)  # that is known


def test_what_was_measured_counts_without_a_multiplier() -> None:
    facts = facts_of("-c 4096 -np 1 --cache-ram 10".split())
    itself = 24 * MIB + 160 * HEADER.n_vocab
    found = need(HEADER, facts, (MACHINE_RAM,), 50, {RAM: 1000}, 1.5)
    assert found == {RAM: 1000 + 10 * MIB + itself}  # a draft model told its buffers, too
    projector = facts_of("-c 4096 -np 1 --cache-ram 10 --mmproj x".split())
    assert need(HEADER, projector, (MACHINE_RAM,), 50, {RAM: 1000})[RAM] == found[RAM] + 50  # a projector does not
    assert need(HEADER, facts, (MACHINE_RAM,), 50, {}, 1.5) == need(HEADER, facts, (MACHINE_RAM,), 50, None, 1.5)


GPU0, GPU1 = Device("GPU0", 24 * GIB, 20 * GIB, "GPU-a"), Device("GPU1", 16 * GIB, 4 * GIB, "GPU-b")


@pytest.mark.parametrize(
    ("devices", "budget_mb", "held", "expected"),
    [
        # without a GPU: RAM; what others hold is gone, what we hold is ours to give
        ((Device(RAM, 8 * GIB, 5 * GIB),), 0, {}, Budget({RAM: 4 * GIB}, 4 * GIB, frozenset({RAM}))),
        ((Device(RAM, 8 * GIB, 5 * GIB),), 0, {RAM: 2 * GIB}, Budget({RAM: 6 * GIB}, 6 * GIB, frozenset({RAM}))),
        ((Device(RAM, 8 * GIB, 5 * GIB),), 0, {RAM: 9 * GIB}, Budget({RAM: 7 * GIB}, 7 * GIB, frozenset({RAM}))),
        ((Device(RAM, 8 * GIB, 5 * GIB),), 2048, {}, Budget({RAM: 4 * GIB}, 2 * GIB, frozenset({RAM}))),
        ((Device(RAM, 8 * GIB, 0),), 2048, {}, Budget({RAM: 0}, 0, frozenset({RAM}))),
        # with GPUs the budget is theirs, and RAM has a limit of its own
        (
            (GPU0, GPU1, Device(RAM, 8 * GIB, 5 * GIB)),
            0,
            {"GPU1": 10 * GIB},
            Budget({"GPU0": 19 * GIB, "GPU1": 13 * GIB, RAM: 4 * GIB}, 32 * GIB, frozenset({"GPU0", "GPU1"})),
        ),
        (
            (GPU0, Device(RAM, 8 * GIB, 5 * GIB)),
            10240,
            {},
            Budget({"GPU0": 19 * GIB, RAM: 4 * GIB}, 10 * GIB, frozenset({"GPU0"})),
        ),
    ],
)
def test_what_models_may_have(devices: Any, budget_mb: int, held: dict[str, int], expected: Budget) -> None:
    assert usable_budget(devices, budget_mb, 1024, held) == expected
    assert usable_budget(devices, budget_mb, 1024, held, 3) == replace(expected, max_models=3)
