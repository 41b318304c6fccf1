"""The models file (YAML or JSON): read, put into today's words, and checked; every problem with its path, at once.

What a model's own entry may say is checked in entries.py, when it is known that the entries count.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import ConfigError
from gateway.models.configured.translate import translate
from gateway.settings import variables

SECTIONS = ("api", "system", "models", "redis", "rate_limit")
# Keys of the sections that no variable stands for.
_OTHER_KEYS = (
    "system.max_concurrent_models",
    "system.preload_models",
    "system.enable_idle_timeout",
    "system.use_mmap",
    "system.flash_attention",
    "system.gpu_devices",
    "system.vram_multiplier",
)
_MODELS = re.compile(r"""^["']?models["']?\s*:|^[{\s]*"models"\s*:""", re.MULTILINE)
_HALF = re.compile(r"[\ud800-\udfff]")
_MAX_BYTES, _MAX_VALUES, _MAX_DEPTH = 1 << 20, 50_000, 32


@dataclass(frozen=True)
class ModelsFile:
    """`content` is in today's words, without comments; problems and warnings begin with the file's name."""

    path: Path
    content: dict[str, Any]
    has_models: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


class _Pairs(dict[Any, Any]):
    """A mapping that remembers which keys stood there twice."""

    def __init__(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        self.twice: list[Any] = []
        for key, value in pairs:
            if key in self:
                self.twice.append(key)
            self[key] = value


def read_models_file(path: Path, *, with_models: bool = True) -> ModelsFile:
    """Raises ConfigError where the file cannot be read at all; what is wrong in it is in `problems`.

    Without `with_models` the `models` are left out unlooked at: one model is named elsewhere.
    """
    raw = _parsed(path, _text(path))
    problems: list[str] = []
    tree = _plain(path, {} if raw is None else raw, problems)
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: must hold sections ({', '.join(SECTIONS)}), not {shown(tree)}"])
    has_models = "models" in tree
    if not with_models:
        tree.pop("models", None)
    warnings = translate(tree)
    problems += _section_problems(tree)
    return ModelsFile(
        path,
        tree,
        has_models,
        tuple(f"{path}: {problem}" for problem in problems),
        tuple(f"{path}: {warning}" for warning in warnings),
    )


def find_models_file(candidates: Iterable[Path], *, with_models: bool = True) -> tuple[ModelsFile | None, list[str]]:
    """The first that has `models`, and a warning for each that was passed over because it cannot be read.

    That one belongs to some other program in a shared folder, unless it says `models` somehow: a slip in a file that is
    meant for us must not go unnoticed, least of all at a reload. Then ConfigError is raised.
    """
    warnings = []
    for path in candidates:
        try:
            found = read_models_file(path, with_models=with_models)
        except ConfigError as error:
            if _says_models(path):
                raise
            warnings += [f"{problem}; passed over, as it seems to be no models file" for problem in error.problems]
        else:
            if found.has_models:
                return found, warnings
    return None, warnings


def _says_models(path: Path) -> bool:
    """Of a file that cannot be parsed, by its look."""
    with contextlib.suppress(ConfigError):
        text = _text(path).lstrip()
        return not text.startswith("[") and _MODELS.search(text) is not None
    return False


def unknown_keys(section: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> Iterator[str]:
    """A line for each key that is not known, with the nearest that is."""
    names = list(known)
    for key in section:
        if key not in names and not key.startswith("_"):  # comments are gone; what is left was put there by translate
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; there are {', '.join(names)}"
            yield f"{prefix}{key}: is not known{hint}"


def shown(value: Any) -> str:
    """A value in a message: what is short as it is, anything else by its kind."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return f"{value!r:.60}"
    kinds = {type(None): "nothing", dict: "a section", list: "a list"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError([f"{path}: is larger than {_MAX_BYTES >> 20} MiB"])
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None


def _parsed(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        try:
            return json.loads(text, object_pairs_hook=_Pairs, parse_constant=_no_constant) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise ConfigError([f"{path}: is not JSON: {error}"]) from None
    import yaml  # only who has a YAML file pays for it

    class Loader(yaml.SafeLoader):
        """Keeps what SafeLoader loses: that a key stands there twice."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> _Pairs:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = _Pairs((loader.construct_object(key, deep=True), None) for key in own).twice
        loader.flatten_mapping(node)  # what `<<` merges in may be said again
        pairs = _Pairs(
            [(loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value]
        )
        pairs.twice = twice
        return pairs

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: is not YAML: {' '.join(str(error).split())}"]) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        # what the conversions of `!!int ""`, of the 31st of February and of their like end with
        raise ConfigError([f"{path}: is not YAML: a value cannot be read: {error}"]) from None


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _plain(path: Path, raw: Any, problems: list[str]) -> Any:
    """A copy with text for keys and without comments. Raises ConfigError for what grows without bound.

    YAML's anchors can make a small file a tree without end.
    """
    count = 0

    def copy(value: Any, place: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if depth > _MAX_DEPTH or count > _MAX_VALUES:
            raise ConfigError([f"{path}: {place[:100]}: is nested too deeply, or holds too much"])
        if isinstance(value, list):
            return [copy(item, f"{place}[{number}]", depth + 1) for number, item in enumerate(value)]
        if isinstance(value, int) and value.bit_length() > 64:
            problems.append(f"{place}: is too large a number")
            return 0
        if isinstance(value, str) and _HALF.search(value):
            problems.append(f"{place}: holds half a character")  # which JSON can spell, and nobody can print
            return ""
        if not isinstance(value, dict):
            return value
        plain: dict[str, Any] = {}
        dots = f"{place}." if place else ""
        twice = [*value.twice] if isinstance(value, _Pairs) else []
        for key, item in value.items():
            if isinstance(key, bool) or not isinstance(key, str | int | float):
                problems.append(f"{dots}{str(key).lower()!a:.60}: a key must be text; put it in quotes")
                continue
            if not str(key).isprintable():
                problems.append(f"{dots}{key!a:.60}: a key must be printable")
                continue
            if str(key).startswith("_"):  # a comment
                continue
            if str(key) in plain or key in twice:
                problems.append(f"{dots}{key}: stands there twice")
            plain[str(key)] = copy(item, f"{dots}{key}", depth + 1)
        return plain

    return copy(raw, "", 0)


def _section_problems(content: Mapping[str, Any]) -> Iterator[str]:
    yield from unknown_keys(content, SECTIONS)
    known = [var.file for var in variables() if var.file] + list(_OTHER_KEYS)
    for name in SECTIONS:
        section = content.get(name)
        if section is None or name == "models":
            continue
        if not isinstance(section, dict):
            yield f"{name}: must be a section with keys, not {shown(section)}"
        else:
            inside = [key.partition(".")[2] for key in known if key.startswith(f"{name}.")]
            yield from unknown_keys(section, inside, f"{name}.")
    system = content.get("system")
    if isinstance(system, dict):
        yield from _system_problems(system)


def _system_problems(system: Mapping[str, Any]) -> Iterator[str]:
    for key, value in system.items():
        if value is None:
            continue
        if key == "max_concurrent_models" and (type(value) is not int or value < 1):
            yield f"system.{key}: must be a whole number of at least 1, not {shown(value)}"
        elif key == "vram_multiplier" and not (type(value) in (int, float) and 1 <= value <= 10):
            yield f"system.{key}: must be a number from 1 to 10, not {shown(value)}"
        elif key in ("enable_idle_timeout", "use_mmap"):  # right ones were translated
            yield f"system.{key}: must be true or false, not {shown(value)}"
        elif key == "flash_attention":
            yield f"system.{key}: must be on, off or auto, not {shown(value)}"
        elif key == "preload_models" and not _all(value, lambda name: isinstance(name, str) and name):
            yield f'system.{key}: must be a list of ids or aliases, or ["*"], not {shown(value)}'
        elif key == "gpu_devices" and not _all(value, _is_device):
            yield f"system.{key}: must be a list of device numbers such as [0, 1], not {shown(value)}"


def _all(value: Any, right: Any) -> bool:
    return isinstance(value, list) and all(map(right, value))


def _is_device(value: Any) -> bool:
    """CUDA takes the beginning of a UUID too."""
    return (type(value) is int and value >= 0) or (isinstance(value, str) and value.isascii() and value.isprintable())
