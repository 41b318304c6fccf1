"""GGUF headers: what real files say, and that no file can hurt the reader."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as writer
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.models.gguf.container import _BLOCKS, CHUNK, MAX_HEADER
from gateway.models.gguf.header import GGUFError, GGUFHeader, read_header, shards
from gateway.models.memory.arguments import Facts
from gateway.models.memory.ledger import predict
from tests.gguf_bytes import ARRAY, F32, LLAMA, STRING, U8, U32, U64, Typed, gguf, pair, tensor, text

MIB = 1 << 20


def header_of(tmp_path: Path, values: dict[str, Any] | None = None, *, without: str = "", **more: Any) -> GGUFHeader:
    path = tmp_path / "model.gguf"
    keys = {**LLAMA, **(values or {})}
    keys.pop(without, None)
    path.write_bytes(gguf(keys, **more))
    return read_header(path)


def refusal(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith("model.gguf ") and "\n" not in message and len(message) < 300
    return message


def test_a_file_of_the_real_writer(tmp_path: Path) -> None:
    path = tmp_path / "real.gguf"
    out = writer.GGUFWriter(path, "qwen3")
    out.add_name("Real")
    out.add_block_count(2)
    out.add_context_length(4096)
    out.add_embedding_length(64)
    out.add_feed_forward_length([96, 128])
    out.add_head_count(4)
    out.add_head_count_kv([2, 1])
    out.add_key_length(32)
    out.add_value_length(24)
    out.add_sliding_window(512)
    out.add_file_type(7)
    out.add_token_list([f"t{i}" for i in range(300)])
    out.add_token_scores([0.0] * 300)
    out.add_chat_template("{{ messages }}")
    weights = np.zeros((300, 64), dtype=np.float32)
    out.add_tensor("token_embd.weight", weights.astype(np.float16))
    q8 = writer.quantize(weights, writer.GGMLQuantizationType.Q8_0)
    out.add_tensor("blk.0.attn_q.weight", q8, raw_dtype=writer.GGMLQuantizationType.Q8_0)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()

    header = read_header(path)

    assert (header.architecture, header.name, header.kind, header.file_type) == ("qwen3", "Real", "model", "Q8_0")
    assert (header.n_layers, header.n_ctx_train, header.n_embd, header.n_ff) == (2, 4096, 64, 128)
    assert (header.n_head, header.n_head_kv, header.key_length, header.value_length) == (4, (2, 1), 32, 24)
    assert (header.sliding_window, header.n_vocab, header.chat_template, header.parts) == (512, 300, True, 1)
    assert header.tensor_bytes == 300 * 64 * 2 + 300 * 2 * 34
    assert (header.embedding_bytes, header.embedding_type, header.tied) == (300 * 64 * 2, 1, True)


def test_the_table_of_types_is_the_real_ones() -> None:
    real = {kind.value: sizes for kind, sizes in writer.GGML_QUANT_SIZES.items()}
    assert {kind: sizes for kind, sizes in _BLOCKS.items() if kind in real} == real


def test_defaults_follow_llama_cpp(tmp_path: Path) -> None:
    header = header_of(tmp_path, without="llama.attention.head_count_kv")
    assert header.n_head_kv == (4, 4, 4, 4)  # as many as heads
    assert (header.key_length, header.value_length, header.key_length_swa) == (16, 16, 16)
    assert (header.sliding_window, header.sliding_pattern, header.pooling_type) == (0, 0, None)
    assert not header.chat_template and header.file_type == "Q4_K_M"


def test_keys_in_any_order_and_version_2(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(dict(reversed(list(LLAMA.items()))), version=2))
    assert read_header(path).n_layers == 4


def test_windows_experts_and_latent_attention(tmp_path: Path) -> None:
    values = {
        "llama.attention.sliding_window": 1024,
        "llama.attention.sliding_window_pattern": [True, False, True, False],
        "llama.expert_feed_forward_length": 96,
        "llama.expert_used_count": 4,
        "llama.attention.key_length": 576,
        "llama.attention.key_length_mla": 192,
        "llama.attention.value_length": 512,
    }
    header = header_of(tmp_path, values)
    assert header.sliding_pattern == (1, 0, 1, 0)
    assert header.n_ff == 384
    assert (header.key_length, header.value_length) == (576, 0)
    assert header_of(tmp_path, {"llama.attention.sliding_window_pattern": 6}).sliding_pattern == 6


@pytest.mark.parametrize(
    ("values", "kind", "embedding", "reranker"),
    [
        ({}, "model", False, False),
        ({"llama.pooling_type": 0}, "model", False, False),
        ({"llama.pooling_type": 3}, "model", True, False),
        ({"llama.pooling_type": 4}, "model", True, True),
        ({"general.type": "adapter"}, "adapter", False, False),
        ({"general.type": "mmproj"}, "mmproj", False, False),
        ({"general.architecture": "clip"}, "mmproj", False, False),
        ({"general.architecture": "bert", "bert.block_count": 2, "bert.embedding_length": 8}, "model", True, False),
    ],
)
def test_kinds(tmp_path: Path, values: dict[str, Any], kind: str, embedding: bool, reranker: bool) -> None:
    header = header_of(tmp_path, values)
    assert (header.kind, header.is_embedding, header.is_reranker) == (kind, embedding, reranker)


def test_a_name_is_shown_safely_and_a_long_one_left_out(tmp_path: Path) -> None:
    assert header_of(tmp_path, {"general.name": "a\x1b[31m\nb\u202e"}).name == "a[31mb"
    assert header_of(tmp_path, {"general.name": "x" * 5000}).name == ""


def test_a_type_newer_than_the_table_counts_the_data_section(tmp_path: Path) -> None:
    records = [tensor("token_embd.weight", [64, 8], 0, 0), tensor("new", [64], 999, 2048)]
    header = header_of(tmp_path, tensors=records, data=4096)
    assert header.tensor_bytes == 4096 and header.embedding_bytes == 2048


# Parts


def write_parts(folder: Path, count: int, said: int | None = None) -> list[Path]:
    paths = []
    for number in range(count):
        split = {"split.no": number, "split.count": said or count}
        record = tensor("token_embd.weight" if number == 0 else f"blk.{number}.w", [64, 4], 0, 0)
        path = folder / f"big-{number + 1:05}-of-{count:05}.gguf"
        path.write_bytes(gguf({**LLAMA, **split} if number == 0 else split, [record], data=1024))
        paths.append(path)
    return paths


def test_parts_are_one_model(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    assert shards(paths[1]) == tuple(paths)
    header = read_header(paths[2])  # any of them
    assert (header.parts, header.tensor_bytes, header.embedding_bytes) == (3, 3 * 1024, 1024)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(GGUFError, match=r"big-00002-of-00003\.gguf is missing"):
        read_header(paths[0])


def test_a_renamed_part_says_which_name_it_needs(tmp_path: Path) -> None:
    moved = write_parts(tmp_path, 3)[0].rename(tmp_path / "nice.gguf")
    with pytest.raises(GGUFError, match=r"ends in -00001-of-00003\.gguf"):
        read_header(moved)


@pytest.mark.parametrize("name", ["x-00004-of-00003.gguf", "x-00000-of-00003.gguf", "x-00001-of-99999.gguf"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gguf(LLAMA))
    with pytest.raises(GGUFError):
        read_header(tmp_path / name)


# Files that are wrong


def test_no_file_no_permission_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for a writer
    for path in (tmp_path / "none.gguf", tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(GGUFError, match=path.name):
            read_header(path)


BIG_ENDIAN = b"GGUF" + struct.pack(">IQQ", 3, 0, 0)
DIMS = 1 << 62
WRONG = {
    "empty": (b"", "not a GGUF"),
    "a zip": (b"PK\3\4" + bytes(100), "not a GGUF"),
    "magic alone": (b"GGUF", "not a GGUF"),
    "big endian": (BIG_ENDIAN, "big-endian"),
    "version 1": (gguf(LLAMA, version=1), "version 1"),
    "version 9": (gguf(LLAMA, version=9), "version 9"),
    "key count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(64), "damaged"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(64), "damaged"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 63) + bytes(64), "damaged"),
    "text length": (gguf({"a": struct.pack("<IQ", STRING, 1 << 50)}), "cut short"),
    "type": (gguf({"a": struct.pack("<I", 77)}), "type 77"),
    "list type": (gguf({"a": struct.pack("<IIQ", ARRAY, 55, 1)}), "type 55"),
    "nested list": (gguf({"a": struct.pack("<IIQIQ", ARRAY, ARRAY, 1, ARRAY, 1)}), "type 9"),
    "list length": (gguf({"a": struct.pack("<IIQ", ARRAY, U64, 1 << 61)}), "cut short"),
    "texts": (gguf({"a": struct.pack("<IIQ", ARRAY, STRING, 1 << 40)}), "list of"),
    "texts run out": (gguf({"a": struct.pack("<IIQ", ARRAY, STRING, 1000)}), "cut short"),
    "one text too long": (gguf({"a": struct.pack("<IIQQ", ARRAY, STRING, 2, 1 << 62)}), "cut short"),
    "wanted list cut": (gguf({"llama.block_count": struct.pack("<IIQ", ARRAY, U32, 4096)}), "cut short"),
    "no keys": (gguf({}), "architecture"),
    "odd architecture": (gguf({**LLAMA, "general.architecture": "../../x"}), "architecture"),
    "number for a name": (gguf({**LLAMA, "general.name": 3}), "general.name"),
    "no layers": (gguf({**LLAMA, "llama.block_count": 0}), "no model"),
    "many layers": (gguf({**LLAMA, "llama.block_count": 4000000}), "no model"),
    "text for a count": (gguf({**LLAMA, "llama.block_count": "many"}), "llama.block_count"),
    "fraction for a count": (gguf({**LLAMA, "llama.block_count": Typed(F32, 2.5)}), "llama.block_count"),
    "huge count": (gguf({**LLAMA, "llama.embedding_length": Typed(U64, 1 << 63)}), "llama.embedding_length"),
    "alignment": (gguf({**LLAMA, "general.alignment": 24}), "alignment"),
    "alignment 0": (gguf({**LLAMA, "general.alignment": 0}), "alignment"),
    "dimensions": (gguf(LLAMA, [text("t") + struct.pack("<I", 100)]), "100 dimensions"),
    "tensor name": (gguf(LLAMA, [text("t" * 600)]), "name of 600"),
    "huge tensor": (gguf(LLAMA, [tensor("t", [DIMS] * 4, 0, 0)]), "cut short"),
    "offset": (gguf(LLAMA, [tensor("t", [1], 0, 1 << 63)]), "cut short"),
    "data cut": (gguf(LLAMA, [tensor("t", [64, 64], 0, 0)], data=1000), "cut short"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path, case: str) -> None:
    data, why = WRONG[case]
    assert why in refusal(tmp_path, data)


def test_a_key_that_comes_twice_is_refused_like_llama_cpp_does(tmp_path: Path) -> None:
    twice = pair("llama.block_count", 4)
    head = gguf(LLAMA)[24:]
    assert "twice" in refusal(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, 0, len(LLAMA) + 1) + twice + head)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = gguf({**LLAMA, "tokenizer.ggml.tokens": ["a", "bc"]}, [tensor("t", [8], 0, 0)], data=32)
    for length in range(len(whole)):
        refusal(tmp_path, whole[:length])


def test_overlapping_tensors_cannot_inflate_the_size(tmp_path: Path) -> None:
    header = header_of(tmp_path, tensors=[tensor(f"t{i}", [256], 0, 0) for i in range(1000)], data=1024)
    assert header.tensor_bytes == 1024


# Bounds


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """Lets the process have `more` bytes beyond what it has; what needs more gets a MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_large_vocabulary_is_skipped_fast_and_small(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tokens = [f"token{i}" for i in range(150_000)]
    records = [tensor("token_embd.weight", [64, 150_000], 1, 0)]
    path.write_bytes(gguf({**LLAMA, "tokenizer.ggml.tokens": tokens, "x.merges": tokens}, records))
    os.truncate(path, path.stat().st_size + 64 * 150_000 * 2)  # the tensor, sparse
    begin = time.process_time()
    with little_memory(4 * MIB):
        header = read_header(path)
    assert time.process_time() - begin < 0.5  # 30 ms here
    assert header.n_vocab == 150_000


def hostile_files() -> dict[str, tuple[bytes, int]]:
    """Beginnings of files that claim much, and the sparse size that makes the claims plausible."""
    one = struct.pack("<IIQ", ARRAY, U8, MAX_HEADER - 4096)
    lists = {f"a{i}.block_count": struct.pack("<IIQ", ARRAY, U64, 4096) + bytes(4096 * 8) for i in range(200)}
    far = struct.pack("<IIQ", ARRAY, STRING, 1 << 20) + struct.pack("<Q", CHUNK) + bytes(100)
    return {
        "a list of 256 MB": (gguf({"llama.block_count": one}), 1 << 40),
        "texts of nothing": (gguf({"t": struct.pack("<IIQ", ARRAY, STRING, 1 << 20)}), 1 << 40),
        "texts that are far apart": (gguf({"t": far}), 1 << 40),
        "many kept lists": (gguf({**LLAMA, **lists}), 0),
        "tensors of nothing": (b"GGUF" + struct.pack("<IQQ", 3, 65536, 0), 1 << 40),
    }


@pytest.mark.parametrize("case", hostile_files())
def test_hostile_files_cost_little(tmp_path: Path, case: str) -> None:
    data, size = hostile_files()[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    if size:
        os.truncate(path, size)
    begin = time.process_time()
    with little_memory(8 * MIB), contextlib.suppress(GGUFError):
        read_header(path)
    assert time.process_time() - begin < 3


# Fuzz


SOUND = gguf(
    {
        **LLAMA,
        "llama.attention.sliding_window_pattern": [True, False, True, False],
        "tokenizer.ggml.tokens": ["a", "bb", "ccc"],
        "tokenizer.chat_template": "{{x}}",
    },
    [tensor("token_embd.weight", [64, 3], 0, 0), tensor("output.weight", [64, 3], 8, 768)],
    data=1024,
)


def survives(path: Path, data: bytes) -> None:
    """A header or a GGUFError, nothing else."""
    path.write_bytes(data)
    try:
        header = read_header(path)
    except GGUFError as error:
        assert len(str(error)) < 1000
    else:
        assert 0 <= header.tensor_bytes <= len(data)
        assert len(header.n_head_kv) == header.n_layers
        assert predict(header, Facts(ctx_total=4096, parallel=2)).total >= header.tensor_bytes


def test_mutations_of_a_sound_file(tmp_path: Path) -> None:
    chance = random.Random(7)
    for _ in range(3000):
        data = bytearray(SOUND)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.randrange(len(data))
            data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        survives(tmp_path / "model.gguf", bytes(data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SOUND)),
            st.integers(0, 40),
            st.one_of(st.binary(max_size=40), st.integers(0, 2**64 - 1).map(lambda n: struct.pack("<Q", n))),
        ),
        max_size=4,
    )
)
def test_splices_of_a_sound_file(tmp_path: Path, edits: list[tuple[int, int, bytes]]) -> None:
    data = SOUND
    for at, length, put in edits:
        data = data[:at] + put + data[at + length :]
    survives(tmp_path / "model.gguf", data)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400))
def test_noise_behind_the_magic(tmp_path: Path, noise: bytes) -> None:
    survives(tmp_path / "model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + noise)
