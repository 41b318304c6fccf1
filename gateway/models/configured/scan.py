"""Models on disk: which files under a folder are models, what they are called, and what lies beside them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gateway.errors import ConfigError
from gateway.models.configured.template import PromptTemplate, read_template
from gateway.models.gguf.glimpse import glimpse
from gateway.models.spec import ModelSpec

TEMPLATE_NAME = "prompt_template.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


def find_models(folder: Path) -> list[Path]:
    """The models under `folder`, sorted: the first shard stands for all.

    Projectors, LoRA adapters, and what is hidden (downloads that are not finished lie there) do not count. A damaged
    file does: it is its own problem, told when it is loaded.
    """
    found = []
    for path in _files(folder):
        shard = _SHARD.search(path.stem)
        if (shard and int(shard[1]) != 1) or _is_projector(path.name):
            continue
        seen = glimpse(path)
        if not seen.is_adapter and not seen.is_projector:
            found.append(path)
    return sorted(found)


def locate(folder: Path, name: str) -> Path | None:
    """The model that `name` means in `folder`: a path with or without its ending or its shard's number.

    A folder with one model in it stands for that. Raises ConfigError where a folder holds none or several.
    """
    for candidate in (folder / name, folder / f"{name}.gguf"):
        if candidate.is_dir():
            return only_in(candidate)
        if candidate.is_file():
            return candidate
    wanted = folder / name
    shards = sorted(wanted.parent.glob(f"{_escape(wanted.name)}-00001-of-?????.gguf"))
    return shards[0] if shards else None


def only_in(folder: Path) -> Path:
    """Raises ConfigError."""
    models = find_models(folder)
    if len(models) != 1:
        found = names(folder, models) or "none"
        raise ConfigError([f"the folder must hold exactly one model; it holds: {found}"])
    return models[0]


def names(folder: Path, models: Iterable[Path]) -> str:
    """What each of them may be called, so that `locate` finds it."""
    return ", ".join((path.relative_to(folder).parent / _stem(path.name)).as_posix() for path in models)


def model_id(path: Path) -> str:
    """The file's stem, or its folder's name for `<id>/model.gguf`."""
    stem = _stem(path.name)
    return path.parent.name if stem == "model" and path.parent.name else stem


def describe(path: Path) -> ModelSpec:
    """The model in this file, with what lies beside it: a projector, a prompt template."""
    return _described(path, _siblings(path.parent))


def scan(folder: Path) -> list[ModelSpec]:
    """Every model under `folder`. Raises ConfigError where two would have one id."""
    models = find_models(folder)
    siblings = {parent: _siblings(parent) for parent in {path.parent for path in models}}
    specs = [_scanned(path, siblings[path.parent]) for path in models]
    first: dict[str, ModelSpec] = {}
    problems = []
    for spec in specs:
        other = first.setdefault(spec.id, spec)
        if other is not spec:
            problems.append(f"{folder}: two models would be {spec.id!r}: {other.path} and {spec.path}; rename one")
    if problems:
        raise ConfigError(problems)
    return specs


def projector(path: Path, siblings: Sequence[str] | None = None) -> Path | None:
    """The projector of a model that has a folder of its own, or one in the same folder that bears the model's name.

    `siblings` are the GGUF files in its folder, where they are known already.
    """
    siblings = _siblings(path.parent) if siblings is None else siblings
    candidates = [name for name in siblings if _is_projector(name)]
    if not candidates:
        return None
    models = {
        _stem(name) for name in siblings if not _is_projector(name) and not glimpse(path.with_name(name)).is_adapter
    }
    if len(models) == 1 and len(candidates) == 1:
        return path.with_name(candidates[0])
    named = re.compile(rf"(?<![^\W_]){re.escape(_stem(path.name))}(?![^\W_])")  # `qwen` is not in `qwen2`
    return next((path.with_name(name) for name in candidates if named.search(name)), None)


def beside(path: Path) -> tuple[PromptTemplate | None, str | None]:
    """The prompt template in the model's folder, or why it cannot be used."""
    file = path.parent / TEMPLATE_NAME
    if not file.is_file():
        return None, None
    try:
        return read_template(file), None
    except ConfigError as error:
        return None, "; ".join(error.problems)


def _described(path: Path, siblings: Sequence[str]) -> ModelSpec:
    template, problem = beside(path)
    return ModelSpec(
        id=model_id(path),
        path=path,
        mmproj=projector(path, siblings),
        prompt_template=template,
        problem=problem,
    )


def _scanned(path: Path, siblings: Sequence[str] | None = None) -> ModelSpec:
    spec = _described(path, _siblings(path.parent) if siblings is None else siblings)
    again = functools.partial(_scanned, path) if spec.problem else None
    return dataclasses.replace(spec, embedding=_embeds(path), look_again=again)


def _siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.gguf"))


def _embeds(path: Path) -> bool | None:
    """True where the first keys say so; None: the whole header decides."""
    from gateway.models.gguf.header import EMBEDDING_ARCHITECTURES

    seen = glimpse(path)
    return True if seen.architecture in EMBEDDING_ARCHITECTURES or seen.pooling_type in (1, 2, 3, 4) else None


def _files(folder: Path) -> Iterator[Path]:
    try:
        waiting, seen = [folder], {folder.resolve()}  # a link may lead back
    except RuntimeError:  # to itself
        return
    while waiting:
        try:
            entries = list(waiting.pop().iterdir())
        except OSError:
            continue  # not there, or not for us
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                is_folder, is_model = entry.is_dir(), entry.suffix == ".gguf" and entry.is_file()
            except OSError:
                continue
            if is_folder and (real := entry.resolve()) not in seen:
                seen.add(real)
                waiting.append(entry)
            elif is_model:
                yield entry


def _is_projector(name: str) -> bool:
    return "mmproj" in name.lower()


def _stem(name: str) -> str:
    return _SHARD.sub("", name.removesuffix(".gguf"))


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
