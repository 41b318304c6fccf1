"""What an answer depends on beside its request: whatever of it changes makes another fingerprint."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gateway.models.configured.template import PromptTemplate
from gateway.models.fingerprint import Contents, as_it_lies, fingerprint
from gateway.models.spec import ModelSpec
from gateway.settings import Settings
from tests.house import eventually


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("model.gguf", "binary", "adapter.gguf", "template.jinja", "part-00001-of-00002.gguf"):
        (tmp_path / name).write_text(name)
    (tmp_path / "part-00002-of-00002.gguf").write_text("the second part")
    return tmp_path


def told(folder: Path, settings: Settings | None = None, model: str = "model.gguf", **changes: Any) -> str | None:
    spec = dataclasses.replace(ModelSpec(id="m", path=folder / model), **changes)
    return fingerprint(spec, folder / model, folder / "binary", settings or Settings(), as_it_lies)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "other"},
        {"flags": ("--rope-freq-scale", "0.5")},
        {"flags": ("--chat-template", "{{ x }}" * 1000)},
        {"env": (("A", "b"),)},
        {"slots": 3},
        {"embedding": True},
        {"prompt_template": PromptTemplate(user_prefix="a")},
        {"settings": Settings(ctx=99)},
        {"settings": Settings(extra_args="--temp 1")},
        {"settings": Settings(ngl=7)},
        {"settings": Settings(parallel=7)},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_what_matters(files: Path, changes: dict[str, Any]) -> None:
    assert told(files, **changes) not in (None, told(files))


@pytest.mark.parametrize("changes", [{"aliases": ("a",)}, {"pinned": True}, {"idle_timeout": 5.0}], ids=str)
def test_what_does_not_matter(files: Path, changes: dict[str, Any]) -> None:
    assert told(files, **changes) == told(files) is not None


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.gguf", {}),
        ("binary", {}),
        ("part-00002-of-00002.gguf", {"model": "part-00001-of-00002.gguf"}),
        ("adapter.gguf", {"flags": ("--lora", "{}/adapter.gguf")}),
        ("adapter.gguf", {"flags": ("--lora-scaled={}/adapter.gguf:0.5",)}),
        ("template.jinja", {"chat_template_file": True}),
    ],
    ids=str,
)
def test_a_file_that_is_replaced(files: Path, name: str, how: dict[str, Any]) -> None:
    """By one of the same size and time."""
    if "flags" in how:
        how = {"flags": tuple(flag.format(files) for flag in how["flags"])}
    if "chat_template_file" in how:
        how = {"chat_template_file": files / name}
    before = told(files, **how)
    old, new = files / name, files / "new"
    new.write_text(old.read_text()[::-1])
    shutil.copystat(old, new)
    new.rename(old)
    assert told(files, **how) not in (None, before)


def test_a_file_that_is_gone(files: Path) -> None:
    (files / "binary").unlink()
    assert told(files) is None


def test_contents_are_the_same_anywhere(files: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in files.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
        os.utime(elsewhere / file.name, (1, 1))
    contents = Contents()

    def read(folder: Path) -> str:
        spec = ModelSpec(id="m", path=folder / "model.gguf")
        found = eventually(
            lambda: fingerprint(spec, folder / "model.gguf", folder / "binary", Settings(), contents) or False
        )
        return str(found)

    try:
        assert contents(files / "model.gguf") is None, "not read yet: nobody waits for it"
        one = read(files)
        assert read(elsewhere) == one
        (elsewhere / "model.gguf").write_text("other.gguf")
        assert read(elsewhere) != one
    finally:
        contents.close()
