"""Which models there are: ids, names that clients may use, and the files or servers behind them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import ConfigError, ModelNotFound
from gateway.settings import Settings

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model as it is configured. It has a `path`, or a source to fetch it from, or a `url` of a foreign server."""

    id: str
    path: Path | None = None
    mmproj: Path | None = None
    download_url: str | None = None
    sha256: str | None = None
    hf: str | None = None
    url: str | None = None
    aliases: tuple[str, ...] = ()


class Registry:
    """Resolves the names in requests. In single-model mode any name means the one model."""

    def __init__(self, specs: Iterable[ModelSpec], *, single: bool, default: str | None = None) -> None:
        self.specs = {spec.id: spec for spec in specs}
        self.single = single
        self._names = {alias: spec for spec in self.specs.values() for alias in spec.aliases} | self.specs
        self._default = default or (next(iter(self.specs)) if single else None)

    def resolve(self, name: str | None) -> ModelSpec:
        """Raises ModelNotFound, naming what exists."""
        wanted = self._default if name is None or self.single else name
        spec = self._names.get(wanted) if wanted is not None else None
        if spec is None:
            known = ", ".join(sorted(self.specs))
            said = f"the model {name!r} does not exist" if name else "the request names no model"
            raise ModelNotFound(f"{said}; there are: {known}", param="model")
        return spec

    def named(self, name: str) -> ModelSpec:
        """The model with exactly this id or alias, also in single-model mode. Raises ModelNotFound."""
        if name not in self._names:
            raise ModelNotFound(f"the model {name!r} does not exist; there are: {', '.join(sorted(self.specs))}")
        return self._names[name]


def build_registry(settings: Settings) -> Registry:
    """Raises ConfigError where no model, or more than one, can be meant."""
    return Registry([_single(settings)], single=True)


def _single(settings: Settings) -> ModelSpec:
    if settings.llama_url:
        return ModelSpec(id=settings.model_name or "default", url=settings.llama_url)
    if settings.model_path:
        return _from_file(_existing(settings.model_path, "MODEL_PATH"))
    if settings.model_url:
        stem = settings.model_name or settings.model_url.partition("?")[0].rstrip("/").rpartition("/")[2]
        return ModelSpec(
            id=_model_id(Path(stem)) or "model", download_url=settings.model_url, sha256=settings.model_sha256
        )
    if settings.model_hf:
        repository, _, quant = settings.model_hf.partition(":")
        name = repository.rpartition("/")[2] + (f"-{quant}" if quant else "")
        return ModelSpec(id=settings.model_name or name, hf=settings.model_hf)
    if settings.model_name:
        return _from_file(_named(settings.models_dir, settings.model_name))
    return _from_file(_only(settings.models_dir))


def _from_file(path: Path) -> ModelSpec:
    model_id = path.parent.name if path.stem == "model" and path.parent.name else _model_id(path)
    return ModelSpec(id=model_id, path=path, mmproj=_projector(path))


def _existing(path: Path, name: str) -> Path:
    if path.is_dir():
        return _in_folder(path, name)
    if not path.is_file():
        raise ConfigError([f"{name}={str(path)!r}: no such file"])
    return path


def _named(models_dir: Path, name: str) -> Path:
    for candidate in (models_dir / name, models_dir / f"{name}.gguf"):
        if candidate.is_dir():
            return _in_folder(candidate, "MODEL_NAME")
        if candidate.is_file():
            return candidate
    shards = sorted(models_dir.glob(f"{_escape(name)}-00001-of-?????.gguf"))
    if shards:
        return shards[0]
    found = _names(models_dir, find_models(models_dir)) or "no model"
    raise ConfigError([f"MODEL_NAME={name!r}: no such model in {models_dir}; there is: {found}"])


def _in_folder(folder: Path, name: str) -> Path:
    models = find_models(folder)
    if len(models) != 1:
        found = _names(folder, models) or "none"
        raise ConfigError([f"{name}={str(folder)!r}: the folder must hold exactly one model; it holds: {found}"])
    return models[0]


def _only(models_dir: Path) -> Path:
    models = find_models(models_dir)
    if len(models) == 1:
        return models[0]
    if not models:
        raise ConfigError([f"no model: set MODEL_NAME, MODEL_PATH, MODEL_URL or put a .gguf file into {models_dir}"])
    raise ConfigError([f"{models_dir} holds several models: set MODEL_NAME to one of {_names(models_dir, models)}"])


def _names(models_dir: Path, models: Iterable[Path]) -> str:
    """What MODEL_NAME may be for each of them; `_named` finds it by that."""
    return ", ".join((path.relative_to(models_dir).parent / _model_id(path)).as_posix() for path in models)


def find_models(folder: Path) -> list[Path]:
    """The models right in `folder` and in its folders: the first shard stands for all, projectors do not count."""
    found = []
    for path in sorted([*folder.glob("*.gguf"), *folder.glob("*/*.gguf")]):
        shard = _SHARD.search(path.stem)
        if path.is_file() and not path.name.lower().startswith("mmproj") and (not shard or int(shard[1]) == 1):
            found.append(path)
    return found


def _projector(path: Path) -> Path | None:
    """An `mmproj*.gguf` beside a model that has a folder of its own, or one that bears the model's name."""
    candidates = sorted(path.parent.glob("mmproj*.gguf"))
    if len(find_models(path.parent)) == 1 and len(candidates) == 1:
        return candidates[0]
    named = re.compile(rf"(?<![^\W_]){re.escape(_model_id(path))}(?![^\W_])")  # `qwen` is not in `qwen2`
    return next((item for item in candidates if named.search(item.stem)), None)


def _model_id(path: Path) -> str:
    stem = path.name.removesuffix(".gguf")
    return _SHARD.sub("", stem)


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
