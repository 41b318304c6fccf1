"""A folder of models: what counts as one, what it is called, and what is taken for its own."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.environment import load_settings
from gateway.errors import ConfigError
from gateway.models.configured.scan import find_models, scan
from gateway.models.configured.template import PromptTemplate
from gateway.models.gguf.glimpse import FIRST_BYTES, Glimpse, glimpse, look_at
from gateway.models.registry import Registry, build_registry
from tests.gguf_bytes import LLAMA, gguf
from tests.test_registry import files

ADAPTER = gguf({"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"})
PROJECTOR = gguf({"general.architecture": "clip", "general.type": "mmproj"})
BERT = gguf({"general.architecture": "bert", "bert.block_count": 2, "bert.embedding_length": 8})
POOLED = gguf({**LLAMA, "llama.pooling_type": 1, "tokenizer.ggml.tokens": ["a"] * 50_000})


def herd(folder: Path, **variables: str) -> Registry:
    return build_registry(load_settings({"MODELS_DIR": str(folder), "DATA_DIR": str(folder), **variables}, None))


@pytest.mark.parametrize(
    ("there", "found"),
    [
        ([], {}),
        (["a.gguf", "b.gguf"], {"a": "a.gguf", "b": "b.gguf"}),
        (["x/y/z/a.gguf", "b/model.gguf"], {"a": "x/y/z/a.gguf", "b": "b/model.gguf"}),
        (["a/model-00001-of-00002.gguf", "a/model-00002-of-00002.gguf"], {"a": "a/model-00001-of-00002.gguf"}),
        (["q/b-00001-of-00003.gguf", "q/b-00002-of-00003.gguf"], {"b": "q/b-00001-of-00003.gguf"}),
        ([".hub/a.gguf", ".a.gguf", "x/.y/a.gguf", "a.gguf.partial", "b.txt"], {}),
        (["a.gguf", "mmproj-a.gguf", "A-mmproj-F16.gguf", "MMPROJ.gguf"], {"a": "a.gguf"}),
        (["A b.Q4_K_M.gguf"], {"A b.Q4_K_M": "A b.Q4_K_M.gguf"}),
    ],
)
def test_what_is_a_model_and_what_it_is_called(tmp_path: Path, there: list[str], found: dict[str, str]) -> None:
    assert {spec.id: spec.path for spec in scan(files(tmp_path, *there))} == {
        name: tmp_path / path for name, path in found.items()
    }


def test_an_adapter_and_a_projector_are_known_by_their_headers(tmp_path: Path) -> None:
    for name, data in {"lora": ADAPTER, "vision": PROJECTOR, "m": gguf(LLAMA), "broken": b"GGUF", "no": b""}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
    assert [path.stem for path in find_models(tmp_path)] == ["broken", "m", "no"]


def test_a_damaged_file_is_listed_and_hinders_no_other(tmp_path: Path) -> None:
    (tmp_path / "good.gguf").write_bytes(gguf(LLAMA))
    (tmp_path / "cut.gguf").write_bytes(gguf(LLAMA)[:40])
    registry = herd(tmp_path)
    assert {spec.id: spec.problem for spec in registry.specs.values()} == {"cut": None, "good": None}


@pytest.mark.parametrize(("data", "marked"), [(BERT, True), (POOLED, True), (gguf(LLAMA), None), (b"junk", None)])
def test_models_that_embed_are_marked(tmp_path: Path, data: bytes, marked: bool | None) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    assert [spec.embedding for spec in scan(tmp_path)] == [marked]


def test_a_projector_and_a_template_belong_to_the_folder_they_lie_in(tmp_path: Path) -> None:
    files(tmp_path, "v/v.gguf", "v/mmproj-v.gguf", "t/t.gguf", "a.gguf")
    (tmp_path / "v" / "lora.gguf").write_bytes(ADAPTER)
    (tmp_path / "t" / "prompt_template.json").write_text('{"user_prefix": "U", "model_prefix": "M"}')
    specs = herd(tmp_path).specs
    assert {name: spec.mmproj for name, spec in specs.items()} == {
        "v": tmp_path / "v" / "mmproj-v.gguf",
        "t": None,
        "a": None,
    }
    assert specs["t"].prompt_template == PromptTemplate(user_prefix="U", model_prefix="M")
    assert specs["a"].prompt_template is None


def test_a_template_that_cannot_be_used_is_that_models_problem(tmp_path: Path) -> None:
    template = files(tmp_path, "t/t.gguf", "a.gguf") / "t" / "prompt_template.json"
    template.write_text('{"user_prefx": "U"}')
    registry = herd(tmp_path)
    said = f"{template}.user_prefx: is not known; did you mean {template}.user_prefix?"
    assert {name: spec.problem for name, spec in registry.specs.items()} == {"a": None, "t": said}
    assert registry.warnings == (said,)


def test_two_files_with_one_id_are_refused_by_both_paths(tmp_path: Path) -> None:
    files(tmp_path, "a/q.gguf", "b/q.gguf", "c/m/model.gguf", "m.gguf", "fine.gguf")
    with pytest.raises(ConfigError) as raised:
        herd(tmp_path)
    assert raised.value.problems == [
        f"{tmp_path}: two models would be 'q': {tmp_path}/a/q.gguf and {tmp_path}/b/q.gguf; rename one",
        f"{tmp_path}: two models would be 'm': {tmp_path}/c/m/model.gguf and {tmp_path}/m.gguf; rename one",
    ]


def test_links_may_lead_in_circles(tmp_path: Path) -> None:
    elsewhere = files(tmp_path / "elsewhere", "b.gguf")
    models = files(tmp_path / "models", "a.gguf", "in/c.gguf")
    (models / "in" / "back").symlink_to(models)
    (models / "far").symlink_to(elsewhere)
    (models / "nowhere.gguf").symlink_to(tmp_path / "nowhere")
    assert [path.relative_to(models).as_posix() for path in find_models(models)] == [
        "a.gguf",
        "far/b.gguf",
        "in/c.gguf",
    ]
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert find_models(tmp_path / "itself") == []


# --- the first keys


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (ADAPTER, Glimpse("llama", "adapter")),
        (PROJECTOR, Glimpse("clip", "mmproj")),
        (gguf({**LLAMA, "llama.pooling_type": 3}), Glimpse("llama", "", 3)),
        (gguf({"general.tags": ["x", "y"], "general.ints": [1, 2], **LLAMA}), Glimpse("llama")),
        (gguf({**LLAMA, "tokenizer.ggml.tokens": ["a"], "llama.pooling_type": 3}), Glimpse("llama")),  # comes too late
        (gguf(LLAMA)[:70], Glimpse("llama")),
        (gguf({"general.architecture": "llama"})[:66], Glimpse()),  # in the midst of the word
        (b"GGUF", Glimpse()),
        (b"GGML" + gguf(LLAMA)[4:], Glimpse()),
        (b"", Glimpse()),
    ],
)
def test_a_glimpse(data: bytes, seen: Glimpse) -> None:
    assert look_at(data) == seen


def test_a_glimpse_reads_no_more_than_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf({"general.description": "d" * FIRST_BYTES, "general.architecture": "bert"}))
    assert glimpse(path) == Glimpse()
    assert glimpse(tmp_path) == glimpse(tmp_path / "none") == Glimpse()


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_a_glimpse_survives_whatever_a_file_holds(junk: bytes, at: int, count: int) -> None:
    whole = bytearray(gguf({**LLAMA, "general.tags": ["x", "y"]}))
    whole[at : at + len(junk)] = junk
    look_at(bytes(whole))
    look_at(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + junk)


def test_a_real_embedding_model_is_seen_as_one(embedding_model: Path, chat_model: Path) -> None:
    """As llama.cpp's own writer lays it out."""
    seen: dict[str, Any] = {path.stem: glimpse(path) for path in (embedding_model, chat_model)}
    assert seen == {"embed": Glimpse("llama", "", 1), "tiny": Glimpse("llama")}
