"""What is to be run, checked before anything of it is started."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import msgspec

from gateway.errors import BadRequest, ConfigError
from gateway.models.command import check_extra_args
from gateway.models.registry import Registry, build_registry
from gateway.models.subjects import collisions
from gateway.pipeline.call import take_places
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.shield import asked_bound
from gateway.settings import Settings, variables

log = logging.getLogger("corral.runtime")

# Settings that say which models there are, and nothing else: a reload is enough for them.
_OF_MODELS = frozenset(
    "MODEL_NAME MODEL_PATH MODEL_URL MODEL_SHA256 MODEL_HF LLAMA_URL CONFIG_PATH DEFAULT_MODEL".split()
)


def check_configuration(settings: Settings) -> tuple[Registry, Path | None]:
    """The models and the llama-server to run them with. Raises ConfigError with all that is wrong."""
    problems = check_extra_args(settings.extra_args)
    registry: Registry | None = None
    binary = None
    try:
        registry = build_registry(settings)
        problems += _check_defaults(registry, settings)
        if any(spec.url is None for spec in registry.specs.values()):
            binary = find_llama_server(settings)
    except ConfigError as error:
        problems += error.problems
    if settings.nats_url is not None:
        problems += _check_nats(settings, registry)
    if settings.llama_url and settings.llama_api_key_file:
        try:
            foreign_key(settings.llama_api_key_file)
        except ConfigError as error:
            problems += error.problems
    if problems or registry is None:
        raise ConfigError(problems)
    return registry, binary


def _check_defaults(registry: Registry, settings: Settings) -> list[str]:
    """Of the fields that a model's requests get where they are silent, those that would be refused in every one."""
    problems = []
    for spec in registry.specs.values():
        fields = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in spec.defaults.items()}
        try:
            take_places(fields)
            asked_bound(fields, Dialect.RESPONSES)  # its names for that are everybody's and one more
        except BadRequest as error:
            problems.append(f"{settings.config_path}: models.{spec.id}.defaults: {error.message}")
    return problems


def _check_nats(settings: Settings, registry: Registry | None) -> list[str]:
    problems = collisions(registry.specs) if registry is not None else []
    if importlib.util.find_spec("nats") is None:
        problems.append("NATS_URL is set, and nats-py is not installed: pip install 'corral[nats]'")
    creds = settings.nats_creds_file
    if creds is not None and not os.access(creds, os.R_OK):
        problems.append(f"NATS_CREDS_FILE={str(creds)!r}: there is no such file, or it may not be read")
    elif creds is not None and importlib.util.find_spec("nkeys") is None:
        problems.append("NATS_CREDS_FILE is set, and nkeys is not installed: pip install 'nats-py[nkeys]'")
    return problems


def foreign_key(path: Path) -> str:
    """What LLAMA_API_KEY_FILE holds. Raises ConfigError."""
    place = f"LLAMA_API_KEY_FILE={str(path)!r}"
    try:
        key = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise ConfigError([f"{place}: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise ConfigError([f"{place}: must hold one key, in letters, digits and signs"]) from None
    if not key or not key.isprintable():
        raise ConfigError([f"{place}: must hold one key; it {'holds more' if key else 'is empty'}"])
    return key


def changed_settings(old: Settings, new: Settings) -> list[str]:
    """The names of those that a reload does not bring into force."""
    names = (var.name for var in variables() if var.name not in _OF_MODELS)
    return [name for name in names if getattr(old, name.lower()) != getattr(new, name.lower())]


def is_lenient(registry: Registry, settings: Settings) -> bool:
    """Whether a model is tried even if it seems too large: there is no other one, and nobody has set a bound."""
    return registry.single and "VRAM_BUDGET_MB" not in settings.explicit


def find_llama_server(settings: Settings) -> Path:
    """Raises ConfigError."""
    named = settings.llama_server_path
    if named is not None:
        found = shutil.which(named)
        if found is None:
            place = settings.told_as("LLAMA_SERVER_PATH")
            raise ConfigError([f"{place}={str(named)!r}: there is no such program"])
        return Path(found)
    found = shutil.which("/app/llama-server") or shutil.which("llama-server")
    if found is None:
        raise ConfigError(["no llama-server at /app/llama-server or on PATH: set LLAMA_SERVER_PATH"])
    return Path(found)
