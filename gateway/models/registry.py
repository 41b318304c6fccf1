"""Which models there are: ids, names that clients may use, and the files or servers behind them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from gateway.environment import child_environment
from gateway.errors import ConfigError, ModelNotFound
from gateway.models.configured.scan import describe, find_models, locate, model_id, names, only_in, scan
from gateway.models.spec import ModelSpec
from gateway.settings import Settings

__all__ = ["Choices", "ModelSpec", "Registry", "build_registry"]

_GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is chosen for all models together."""

    preload: tuple[str, ...] = ()  # ids
    preload_all: bool = False  # cut to what fits
    max_models: int | None = None  # loaded at once
    vram_multiplier: float = 1.1
    warnings: tuple[str, ...] = ()


class Registry:
    """Resolves the names in requests. In single-model mode any name means the one model."""

    def __init__(
        self, specs: Iterable[ModelSpec], *, single: bool, default: str | None = None, choices: Choices | None = None
    ) -> None:
        self.specs = {spec.id: spec for spec in specs}
        self.single = single
        self._names = {alias: spec for spec in self.specs.values() for alias in spec.aliases} | self.specs
        self.default = default or (next(iter(self.specs)) if single else None)
        choices = choices or Choices()
        self.preload_all = choices.preload_all
        self.preload = tuple(self.specs) if single or choices.preload_all else choices.preload
        self.max_models = choices.max_models
        self.vram_multiplier = choices.vram_multiplier
        self.warnings = choices.warnings

    def resolve(self, name: str | None, visible: Callable[[str], bool] = lambda _: True) -> ModelSpec:
        """Raises ModelNotFound, naming what exists and is `visible` to the one who asks."""
        wanted = self.default if name is None or self.single else name
        spec = self._names.get(wanted) if wanted is not None else None
        if spec is None:
            known = ", ".join(sorted(filter(visible, self.specs))) or "none for this key"
            said = f"the model {name!r} does not exist" if name else "the request names no model"
            raise ModelNotFound(f"{said}; there are: {known}", param="model")
        return spec

    def named(self, name: str) -> ModelSpec:
        """The model with exactly this id or alias, also in single-model mode. Raises ModelNotFound."""
        if name not in self._names:
            raise ModelNotFound(f"the model {name!r} does not exist; there are: {', '.join(sorted(self.specs))}")
        return self._names[name]


def build_registry(settings: Settings) -> Registry:
    """The models that the environment, the models file (in `settings.file`) or the folder name.

    Raises ConfigError with all that is wrong. A model that alone cannot be loaded has a `problem` instead.
    """
    if settings.named_model:
        return _alone(_single(settings), settings)
    if "models" in settings.file:
        from gateway.models.configured.entries import read_entries  # only who has a models file pays for it

        file = settings.config_path or Path("the models file")
        specs, problems = read_entries(settings.file["models"], settings.models_dir, file)
        return _herd(specs, [f"{file}: {problem}" for problem in problems], settings)
    models = find_models(settings.models_dir)
    if not models:
        folder = settings.models_dir
        raise ConfigError([f"no model: set MODEL_NAME, MODEL_PATH, MODEL_URL or put a .gguf file into {folder}"])
    if len(models) == 1:
        return _alone(_of_file(models[0]), settings)
    problems = []
    try:
        specs = scan(settings.models_dir)
    except ConfigError as error:
        specs, problems = [], error.problems
    return _herd(specs, problems, settings)


# --- one model


def _alone(spec: ModelSpec, settings: Settings) -> Registry:
    return Registry([_with_common(spec, settings)], single=True)


def _single(settings: Settings) -> ModelSpec:
    if settings.llama_url:
        return ModelSpec(id=settings.model_name or "default", url=settings.llama_url)
    if settings.model_path:
        return _of_file(_existing(settings.model_path))
    if settings.model_url:
        name = settings.model_name or _file_of(settings.model_url)
        return ModelSpec(
            id=model_id(Path(name)) or "model", download_url=settings.model_url, sha256=settings.model_sha256
        )
    if settings.model_hf:
        return _on_hub(settings.model_hf, settings.model_name)
    assert settings.model_name
    return _of_file(_named(settings.models_dir, settings.model_name))


def _file_of(url: str) -> str:
    """What the file will be called."""
    from gateway.models.fetching.partial import safe_name  # only who fetches pays for it

    return safe_name(unquote(urlsplit(url).path.rstrip("/")))


def _on_hub(name: str, model_id: str | None) -> ModelSpec:
    """Raises ConfigError."""
    from gateway.models.fetching.hub import HubModel
    from gateway.models.fetching.partial import DownloadError

    try:
        model = HubModel.parse(name)
    except DownloadError:
        raise ConfigError([f"MODEL_HF={name!r}: must be user/repo or user/repo:quant"]) from None
    own = model.repo.rpartition("/")[2] + (f"-{model.quant}" if model.quant else "")
    return ModelSpec(id=model_id or own, hf=str(model))


def _of_file(path: Path) -> ModelSpec:
    """Raises ConfigError: where there is no other model, one that cannot be loaded is no reason to start."""
    spec = describe(path)
    if spec.problem:
        raise ConfigError([spec.problem])
    return spec


def _existing(path: Path) -> Path:
    place = f"MODEL_PATH={str(path)!r:.200}"
    try:
        if path.is_dir():
            return _one_in(path, place)
        if not path.is_file():
            raise ConfigError([f"{place}: no such file"])
    except OSError as error:
        raise ConfigError([f"{place}: {error.strerror}"]) from None
    return path


def _named(models_dir: Path, name: str) -> Path:
    try:
        for folder in (models_dir / name, models_dir / f"{name}.gguf"):
            if folder.is_dir():
                return _one_in(folder, f"MODEL_NAME={str(folder)!r}")
        found = locate(models_dir, name)
    except OSError as error:
        raise ConfigError([f"MODEL_NAME={name!r:.60}: {error.strerror}"]) from None
    if found is None:
        known = names(models_dir, find_models(models_dir)) or "no model"
        raise ConfigError([f"MODEL_NAME={name!r}: no such model in {models_dir}; there is: {known}"])
    return found


def _one_in(folder: Path, place: str) -> Path:
    try:
        return only_in(folder)
    except ConfigError as error:
        raise ConfigError([f"{place}: {problem}" for problem in error.problems]) from None


# --- several


def _herd(specs: list[ModelSpec], problems: list[str], settings: Settings) -> Registry:
    """Raises ConfigError with `problems` and all that is wrong with what is said of all models together."""
    system = _section(settings.file, "system")
    place = f"{settings.config_path}: " if settings.config_path else ""
    ids = {name: spec.id for spec in specs for name in (*spec.aliases, spec.id)}
    default = ids.get(settings.default_model or "")
    if settings.default_model and not default:
        in_file = system.get("default_model") is not None and str(system["default_model"]) == settings.default_model
        shown = f"{place}system.default_model: " if in_file else "DEFAULT_MODEL="
        problems.append(f"{shown}{_no_such(settings.default_model, ids)}")
    wanted = system.get("preload_models") or []
    wanted = [name for name in wanted if isinstance(name, str)] if isinstance(wanted, list) else []
    for name in wanted:
        if name != "*" and name not in ids:
            problems.append(f"{place}system.preload_models: {_no_such(name, ids)}")
    own = [
        f"{place}models.{spec.id}: {spec.problem}" if "models" in settings.file else spec.problem
        for spec in specs
        if spec.problem
    ]
    if problems:
        raise ConfigError(problems + own)  # these alone would be no reason, but who mends the rest may mend them too
    most, multiplier = system.get("max_concurrent_models"), system.get("vram_multiplier")
    choices = Choices(
        preload=tuple(dict.fromkeys(ids[name] for name in wanted if name != "*")),
        preload_all="*" in wanted,
        max_models=most if isinstance(most, int) else None,
        vram_multiplier=float(multiplier) if isinstance(multiplier, int | float) else Choices.vram_multiplier,
        warnings=tuple(own),
    )
    if default is None and len(specs) == 1:
        default = specs[0].id
    return Registry([_with_common(spec, settings) for spec in specs], single=False, default=default, choices=choices)


def _no_such(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"
    return f"{name!r} is no model; {hint}"


def _with_common(spec: ModelSpec, settings: Settings) -> ModelSpec:
    """With what a models file says of all models together, where the model itself and the environment are silent."""
    system = _section(settings.file, "system")
    if (again := spec.look_again) is not None:
        spec = dataclasses.replace(spec, look_again=lambda: _with_common(again(), settings))
    if spec.url is not None:
        return spec
    env, flags = spec.env, spec.flags
    devices = system.get("gpu_devices")
    if isinstance(devices, list) and _GPUS not in dict(env) and not child_environment((_GPUS,), ()):
        env = (*env, (_GPUS, ",".join(map(str, devices))))
    common: Sequence[str] = system.get("_flags", ())
    if "--no-mmap" in common and "--no-mmap" not in flags:
        flags = ("--no-mmap", *flags)
    if "-fa" in common and not {"-fa", "--flash-attn"} & {flag.partition("=")[0] for flag in flags}:
        flags = ("-fa", common[common.index("-fa") + 1], *flags)
    return spec if (env, flags) == (spec.env, spec.flags) else dataclasses.replace(spec, env=env, flags=flags)


def _section(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, Mapping) else {}
