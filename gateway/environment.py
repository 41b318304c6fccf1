"""Reads the settings; the only place that looks at the process's environment.

Order of precedence: real variables, then `.env` in the working directory, then the models file, then defaults.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gateway.crosscheck import cross_check, without_v1
from gateway.errors import ConfigError
from gateway.settings import Settings, Variable, variables

_OF_CLIENTS = ("CORRAL_URL", "CORRAL_API_KEY")


def load_settings(
    environ: Mapping[str, str] | None = None,
    dotenv: Path | None = Path(".env"),
    file: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the environment, `.env` and the settings of a models file.

    Raises ConfigError with one line for each wrong value.
    """
    settings, problems = read_settings(environ, dotenv, file)
    if problems:
        raise ConfigError(problems)
    return settings


def read_settings(
    environ: Mapping[str, str] | None = None,
    dotenv: Path | None = Path(".env"),
    file: Mapping[str, Any] | None = None,
    origin: str = "",
) -> tuple[Settings, list[str]]:
    """The settings, and one line for each wrong value, which counts as not given.

    `file` is a models file's content; lines about it begin with `origin`. Raises ConfigError for an unreadable `.env`.
    """
    real = os.environ if environ is None else environ
    problems: list[str] = []
    warnings: list[str] = []
    layers = (real, _read_dotenv(dotenv, warnings))
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for var in variables():
        try:
            if (given := _lookup(var, layers, warnings)) is not None:
                values[var.name] = _parse(var, *given)
                origins[var.name] = given[0]
            elif file is not None and var.file and (value := _dig(file, var.file)) is not None:
                place = origin + place_in(file, var.file)
                if text := _as_text(var, place, value).strip():
                    values[var.name] = _parse(var, place, text)
                    origins[var.name] = place
        except ValueError as error:
            problems.append(str(error))
    explicit = frozenset(values)
    problems += _resolve_paths(values)
    if "PORT_HEALTH" not in values and any(map(on_runpod, layers)):
        values["PORT_HEALTH"] = values.get("PORT", 8000)
    if "PORT_BACKEND" not in values and values.get("PORT") == 8080:
        values["PORT_BACKEND"] = 8081  # Cloud Run and others say PORT=8080; only who names both can be wrong
    if (url := values.get("LLAMA_URL")) is not None and (bare := without_v1(url)) != url:
        values["LLAMA_URL"] = bare
        warnings.append("LLAMA_URL ends in /v1, which was left out: a llama-server is named by its address alone")
    settings = Settings(
        **{name.lower(): value for name, value in values.items()},
        warnings=tuple(warnings),
        explicit=explicit,
        origins=origins,
        file=file or {},
    )
    return settings, problems + cross_check(settings)


def place_in(file: Mapping[str, Any], path: str) -> str:
    """Where the value at `path` stands in a models file that was put into today's words."""
    moved = file.get("_moved", {})
    section, _, key = path.rpartition(".")
    return str(moved.get(path) or f"{moved.get(section, section)}.{key}")


def child_environment(names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The part of the process's environment that a child may inherit: exact `names`, and any with one of `prefixes`."""
    return {key: value for key, value in os.environ.items() if key in names or key.startswith(prefixes)}


def secret_named(name: str, dotenv: Path | None = Path(".env")) -> str | None:
    """The key in a variable that a models file names, so that the file itself need not hold it."""
    return os.environ.get(name, "").strip() or _read_dotenv(dotenv).get(name, "").strip() or None


def client_variables(dotenv: Path | None = Path(".env")) -> dict[str, str]:
    """CORRAL_URL and CORRAL_API_KEY: of the commands that talk to a running gateway, not of the gateway itself."""
    layers = (os.environ, _read_dotenv(dotenv))
    found = {name: next(filter(None, (given.get(name, "").strip() for given in layers)), "") for name in _OF_CLIENTS}
    return {name: value for name, value in found.items() if value}


def terminal_variables() -> dict[str, str]:
    """What the user's terminal can, and may be shown."""
    return {name: os.environ.get(name, "") for name in ("TERM", "NO_COLOR")}


def on_runpod(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("RUNPOD_POD_ID") or environ.get("RUNPOD_ENDPOINT_ID"))


def hub_caches() -> tuple[Path, ...]:
    """Where Hugging Face models may lie already: RunPod's cache, then the user's own."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return (Path("/runpod-volume/huggingface-cache/hub"), Path(os.environ.get("HF_HUB_CACHE") or home / "hub"))


def instance_name() -> str:
    """Which machine this is, fit for a file name: RunPod's pod id, else the host's name."""
    name = os.environ.get("RUNPOD_POD_ID") or os.uname().nodename
    return re.sub(r"[^A-Za-z0-9_-]", "-", name)[:64] or "local"


def secrets_in_force(settings: Settings) -> list[str]:
    """Values that must never be written anywhere; logs mask them."""
    found = []
    for var in variables():
        value = getattr(settings, var.name.lower())
        if var.secret and isinstance(value, str):
            found += [value, *(part.strip() for part in value.split(","))] if var.name == "API_KEY" else [value]
    return sorted({value for value in found if len(value) >= 8}, key=len, reverse=True)


def _read_dotenv(path: Path | None, warnings: list[str] | None = None) -> dict[str, str]:
    """Raises ConfigError where the file cannot be read; lines that cannot be read are warned about."""
    try:
        if path is None or not path.is_file():
            return {}
        from dotenv.parser import parse_stream  # imported only where a file is there: 10 ms of the start

        with path.open(encoding="utf-8-sig") as file:
            lines = list(parse_stream(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError([f"{path}: cannot be read: {reason}"]) from None
    found = {}
    for line in lines:
        if line.key is not None and line.value is not None:
            found[line.key] = line.value
        elif warnings is not None and (line.error or line.key is not None):
            text = line.original.string
            blank = text[: len(text) - len(text.lstrip())].count("\n")
            warnings.append(f"{path} line {line.original.line + blank}: is no NAME=value, so it does not count")
    return found


def _lookup(var: Variable, layers: Sequence[Mapping[str, str]], warnings: list[str]) -> tuple[str, str] | None:
    """In the first layer that has it: the name that it has there, its own or an older one, and the text.

    An empty value counts as unset.
    """
    for given in layers:
        for name in (var.name, *var.aliases, *var.deprecated):
            if text := given.get(name, "").strip():
                if name in var.deprecated:
                    warnings.append(f"{name} is deprecated: use {var.name}")
                return name, text
    return None


_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def _parse(var: Variable, name: str, text: str) -> Any:
    """Raises ValueError with name, value and what is allowed."""
    value = "…" if var.secret else text
    if var.kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise ValueError(f"{name}={value!r}: must be true or false")
    if var.kind in (int, float):
        return _number(var, name, text)
    if var.kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if var.kind is Path:
        return _path(name, text)
    if var.choices:
        if text.lower() not in var.choices:
            near = difflib.get_close_matches(text.lower(), var.choices, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(var.choices)}{hint}")
        return text.lower()
    return text


def _path(name: str, text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ of somebody who is not there
        raise ValueError(f"{name}={text!r}: there is no such user's home") from None


def _number(var: Variable, name: str, text: str) -> int | float:
    kind = "a whole number" if var.kind is int else "a number"
    low, high = var.low, var.high
    bounds = f" from {low:g} to {high:.15g}" if low is not None and high is not None else f" of at least {low:g}"
    try:
        number: int | float = int(text) if var.kind is int else float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: must be {kind}{bounds}") from None
    if number != number or (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name}={text!r}: must be {kind}{bounds}")
    return number


def _dig(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _as_text(var: Variable, place: str, value: Any) -> str:
    """A value of the models file, as a variable would say it. Raises ValueError where its type is wrong."""
    if isinstance(value, list) and var.kind is tuple and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if isinstance(value, bool) and var.kind in (bool, int, float):
        return str(value).lower()
    if isinstance(value, str) or (type(value) in (int, float) and var.kind in (int, float)):
        return str(value)
    wanted = {bool: "true or false", int: "a number", float: "a number", tuple: "a list of texts"}.get(var.kind, "text")
    found = {list: "a list", dict: "a section", bool: "true or false", int: "a number", float: "a number"}
    raise ValueError(f"{place}: must be {wanted}, not {found.get(type(value), type(value).__name__)}")


def _resolve_paths(values: dict[str, Any]) -> list[str]:
    """Fill in the paths whose defaults depend on DATA_DIR; a line where nothing in it can be looked at.

    CONFIG_PATH becomes the first file that may be meant; whether one has models, its reader looks.
    """
    data = values.setdefault("DATA_DIR", detect_data_dir())
    values.setdefault("MODELS_DIR", data / "models")
    values.setdefault("AUTH_KEYS_FILE", data / "api_keys.txt")
    values.setdefault("AUDIT_DB", data / "corral.sqlite")
    if "CONFIG_PATH" not in values:
        try:
            values["CONFIG_PATH"] = next(iter(models_files_in(data)), None)
        except OSError as error:
            return [f"DATA_DIR={str(data)!r:.200}: must be a folder that may be looked into: {error.strerror}"]
    return []


def models_files_in(data_dir: Path) -> list[Path]:
    """The files that count where CONFIG_PATH names none, if they have models. Raises OSError."""
    return [path for end in ("yaml", "yml", "json") if (path := data_dir / f"config.{end}").is_file()]


def detect_data_dir() -> Path:
    """The platform's volume. An image may hold an empty /data, so that one comes last."""
    for path in (Path("/runpod-volume"), Path("/workspace")):
        if path.is_dir():
            return path
    return Path("/data")
