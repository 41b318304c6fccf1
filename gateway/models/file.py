"""The models file (YAML or JSON): read, and checked for what it may hold; every problem with its path, all at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gateway.errors import ConfigError
from gateway.settings import variables

SECTIONS = ("api", "system", "models", "redis", "rate_limit")
# Keys of the sections that no variable stands for.
_OTHER_KEYS = (
    "system.max_concurrent_models",
    "system.preload_models",
    "system.enable_idle_timeout",
    "system.gpu_devices",
    "system.vram_multiplier",
)


def read_models_file(path: Path) -> dict[str, Any]:
    """The file's content. Raises ConfigError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None
    content = _parsed(path, text)
    if not isinstance(content, dict):
        raise ConfigError([f"{path}: must hold sections ({', '.join(SECTIONS)}), not {type(content).__name__}"])
    problems = list(_problems(content))
    if problems:
        raise ConfigError([f"{path}: {problem}" for problem in problems])
    return content


def _parsed(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError([f"{path}: is not JSON: {error}"]) from None
    import yaml  # only who has a models file pays for it

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from None


def _problems(content: Mapping[str, Any]) -> Iterable[str]:
    yield from _unknown(content, SECTIONS, "")
    known = [var.file for var in variables() if var.file] + list(_OTHER_KEYS)
    for section in SECTIONS:
        value = content.get(section)
        if value is not None and not isinstance(value, dict):
            yield f"{section}: must be a section with keys"
        elif value is not None and section != "models":
            inside = [key.partition(".")[2] for key in known if key.startswith(f"{section}.")]
            yield from _unknown(value, inside, f"{section}.")


def _unknown(section: Mapping[str, Any], known: Iterable[str], prefix: str) -> Iterable[str]:
    """Keys that begin with `_` are comments."""
    names = list(known)
    for key in section:
        if key not in names and not str(key).startswith("_"):
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(names)}"
            yield f"{prefix}{key}: is not known{hint}"
