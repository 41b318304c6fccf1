"""Every variable, declared once with its default, bounds and help; the only place that reads the environment.

Order of precedence: real variables, then `.env` in the working directory, then the models file, then defaults.
"""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import os
import re
import shlex
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.errors import ConfigError

_UNIT = 1024 * 1024


@dataclass(frozen=True)
class Variable:
    """What is known of one setting: `name` is the environment's, `file` its place in the models file."""

    name: str
    kind: type
    default: Any
    help: str
    optional: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # names of earlier systems that keep working
    deprecated: tuple[str, ...] = ()  # likewise, with a warning
    file: str | None = None
    secret: bool = False
    shown: str | None = None  # how help and README show the default where the value itself says little

    @property
    def shown_default(self) -> str:
        if self.shown is not None:
            return self.shown
        if self.default is None or self.default in ("", ()):
            return "–"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def _var(default: Any, help: str, **about: Any) -> Any:
    return field(default=default, repr=not about.get("secret"), metadata={"help": help, **about})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values in force. Sizes are bytes and times seconds unless a name says otherwise."""

    # the model
    model_name: str | None = _var(None, "file in MODELS_DIR, or a folder in it with one model")
    model_path: Path | None = _var(None, "full path of the model, wins over MODEL_NAME")
    model_url: str | None = _var(None, "fetched on first use into MODELS_DIR", secret=True)
    model_sha256: str | None = _var(None, "checksum that the file of MODEL_URL must have")
    model_hf: str | None = _var(None, "user/repo[:quant] on Hugging Face, fetched on first use (extra `hf`)")
    llama_url: str | None = _var(None, "a llama-server that someone else runs; nothing is spawned")
    llama_api_key_file: Path | None = _var(None, "file with the key for LLAMA_URL")
    data_dir: Path = _var(
        Path("/data"),
        "everything that is kept; detected: /runpod-volume, /workspace, else /data",
        shown="detected",
    )
    models_dir: Path = _var(
        Path("models"),
        "folder of models",
        aliases=("BASE_MODELS_PATH",),
        file="system.base_models_path",
        shown="$DATA_DIR/models",
    )
    config_path: Path | None = _var(
        None, "the models file", shown="$DATA_DIR/config.{yaml,yml,json} if it has a models key"
    )
    default_model: str | None = _var(None, "for requests that name none", file="system.default_model")

    # llama-server
    llama_server_path: Path | None = _var(
        None, "the binary", file="system.llama_server_path", shown="/app/llama-server, else on PATH"
    )
    ctx: int = _var(16384, "context of one request, tokens", low=0, high=16_777_216)
    parallel: int | None = _var(
        None, "requests at once", low=1, high=256, file="system.default_parallel", shown="up to 4, as many as fit"
    )
    ngl: int = _var(99, "layers on the GPU", low=0, high=9999)
    threads: int = _var(0, "CPU threads, 0 = auto", low=0, high=1024)
    extra_args: str = _var("", "further llama-server arguments, shell-quoted")

    # listeners
    port: int = _var(8000, "the gateway", low=1, high=65535, file="api.port", deprecated=("GATEWAY_PORT",))
    port_health: int = _var(8001, "the health server; on RunPod PORT", low=1, high=65535)
    port_backend: int = _var(8080, "the first llama-server", low=1, high=65535, deprecated=("BACKEND_PORT",))
    host: str = _var("0.0.0.0", "address to listen on", file="api.host")

    # keys and limits
    auth_enabled: bool = _var(True, "false: no keys, key id `anonymous`, limits per address")
    auth_keys_file: Path = _var(Path("api_keys.txt"), "the keys", shown="$DATA_DIR/api_keys.txt")
    api_key: str | None = _var(None, "keys by environment, comma separated; key id `env`", secret=True)
    metrics_auth_enabled: bool = _var(False, "true: /metrics needs scope metrics and carries key ids")
    max_requests_per_minute: int = _var(
        100, "per key; 0 = off; model-using routes only", low=0, high=10_000_000, file="rate_limit.requests_per_minute"
    )
    max_tokens_per_minute: int = _var(0, "per key; 0 = off", low=0, high=10_000_000_000)
    trusted_proxies: tuple[str, ...] = _var((), "networks whose X-Forwarded-For is believed")
    cors_origins: tuple[str, ...] = _var((), "comma separated; * allowed", file="api.cors_origins", shown="empty = off")

    # queue
    max_concurrent_requests: int | None = _var(None, "in flight per model", low=1, high=4096, shown="the model's slots")
    max_queue_size: int = _var(
        128, "waiting per model, 0 = unlimited", low=0, high=1_000_000, file="system.max_queue_size_per_model"
    )
    queue_timeout_seconds: float = _var(
        300, "longest wait in the queue", low=0.001, high=86_400, file="system.queue_timeout_sec"
    )
    max_queued_bytes: int = _var(256 * _UNIT, "bodies held by all waiting requests", low=1024)

    # sizes and times of a request
    max_request_body_size: int = _var(10 * _UNIT, "larger bodies: 413", low=1, high=2**40)
    max_headers: int = _var(64, "more header fields: 431", low=1, high=10_000)
    max_header_line_size: int = _var(8192, "longer header lines: 431", low=64, high=_UNIT)
    max_request_line_size: int = _var(8192, "longer request lines: 414", low=64, high=_UNIT)
    request_timeout: float = _var(
        600, "the backend's longest silence", low=0.001, high=86_400, file="system.request_timeout_sec"
    )
    backend_connect_timeout: float = _var(10, "to connect to the backend", low=0.001, high=3600)
    client_header_timeout: float = _var(30, "total, for a request's headers", low=0.001, high=3600)
    client_body_timeout: float = _var(60, "total, for a request's body", low=0.001, high=86_400)
    max_tokens_default: int | None = _var(None, "for requests that name no bound", low=1, high=16_777_216)
    max_tokens_limit: int | None = _var(
        None, "bound of every request's answer, tokens", low=1, high=16_777_216, shown="the context"
    )
    sse_ping_seconds: float = _var(10, "comment pings on a silent stream; 0 = none", low=0, high=3600)
    allow_remote_media: bool = _var(False, "false: media only as data: URLs")

    # memory and idleness
    vram_budget_mb: int = _var(
        0, "MiB for models, 0 = what the device has", low=0, high=2**31, file="system.vram_budget_mb"
    )
    vram_margin_mb: int = _var(512, "MiB kept free", low=0, high=2**31, file="system.vram_margin_mb")
    idle_timeout_seconds: float = _var(
        0, "unload what nobody used, 0 = never", low=0, high=31_536_000, file="system.idle_timeout_sec"
    )

    # records, cache, other machines
    audit_db: Path = _var(Path("corral.sqlite"), "the records", shown="$DATA_DIR/corral.sqlite")
    audit_content: str = _var("off", "what is kept of prompts and answers", choices=("off", "hash", "full"))
    audit_retention_days: int = _var(30, "0 = for ever", low=0, high=36_500)
    cache_enabled: bool = _var(False, "response cache", file="redis.enable_cache")
    cache_ttl_seconds: int = _var(3600, "life of a cached answer", low=1, high=31_536_000, file="redis.cache_ttl_sec")
    cache_embedding_model: str | None = _var(None, "switches the semantic cache on")
    cache_similarity: float | None = _var(None, "least similarity of a semantic hit", low=0, high=1)
    redis_url: str | None = _var(
        None, "limits, exact cache and usage shared by several gateways", file="redis.url", secret=True
    )
    nats_url: str | None = _var(None, "JetStream worker inside serve", secret=True)
    nats_creds_file: Path | None = _var(None, "credentials for NATS_URL")
    nats_key_id: str | None = _var(None, "whose limits its jobs count on")
    worker_mode: str = _var("http", "what entrypoint.sh runs", choices=("http", "nats", "runpod"))

    # logs and state
    log_format: str = _var("text", "of the gateway's log lines", choices=("text", "json"))
    log_level: str = _var("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    log_name: str = _var("llama", "name of the log folder")
    worker_type: str | None = _var(None, "appended to the log folder's name")
    debug_shell: bool = _var(False, "print the environment (secrets masked) and hold the container")
    state_file: Path | None = _var(None, "where the state is published; entrypoint.sh makes a private one")
    health_mode: str = _var("readiness", "liveness: /ping is always 200", choices=("readiness", "liveness"))
    health_stale_seconds: float = _var(10, "an older heartbeat is a dead gateway", low=0.1, high=3600)
    shutdown_grace_seconds: float = _var(30, "for running requests after SIGTERM", low=0, high=3600)

    # not variables: what loading found out
    warnings: tuple[str, ...] = field(default=(), compare=False)
    explicit: frozenset[str] = field(default=frozenset(), compare=False)  # names set by environment, .env or file

    @property
    def named_model(self) -> bool:
        """Single-model mode: one model is named, whatever a models file says."""
        return bool(self.model_name or self.model_path or self.model_url or self.model_hf or self.llama_url)


def variables() -> list[Variable]:
    """All declared variables in the order of the README's table."""
    hints = typing.get_type_hints(Settings)
    found = []
    for item in dataclasses.fields(Settings):
        if "help" not in item.metadata:
            continue
        hint, optional = hints[item.name], False
        if isinstance(hint, types.UnionType):
            hint, optional = next(kind for kind in typing.get_args(hint) if kind is not type(None)), True
        kind = typing.get_origin(hint) or hint
        found.append(
            Variable(name=item.name.upper(), kind=kind, default=item.default, optional=optional, **item.metadata)
        )
    return found


def load_settings(
    environ: Mapping[str, str] | None = None,
    dotenv: Path | None = Path(".env"),
    file: Mapping[str, Any] | None = None,
) -> Settings:
    """Read the environment, `.env` and the settings of a models file.

    Raises ConfigError with one line for each wrong value.
    """
    real = os.environ if environ is None else environ
    layers = (real, _read_dotenv(dotenv))
    problems: list[str] = []
    warnings: list[str] = []
    values: dict[str, Any] = {}
    for var in variables():
        text = _lookup(var, layers, warnings)
        try:
            if text is not None:
                values[var.name] = _parse(var, text)
            elif file is not None and var.file and (value := _dig(file, var.file)) is not None:
                if text := _as_text(value).strip():
                    values[var.name] = _parse(var, text, shown=var.file)
        except ValueError as error:
            problems.append(str(error))
    explicit = frozenset(values)
    _resolve_paths(values)
    if "PORT_HEALTH" not in values and any(map(on_runpod, layers)):
        values["PORT_HEALTH"] = values.get("PORT", 8000)
    if "PORT_BACKEND" not in values and values.get("PORT") == 8080:
        values["PORT_BACKEND"] = 8081  # Cloud Run and others say PORT=8080; only who names both can be wrong
    settings = Settings(
        **{name.lower(): value for name, value in values.items()}, warnings=tuple(warnings), explicit=explicit
    )
    problems += _cross_check(settings)
    if problems:
        raise ConfigError(problems)
    return settings


def child_environment(names: tuple[str, ...], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The part of the process's environment that a child may inherit: exact `names`, and any with one of `prefixes`."""
    return {key: value for key, value in os.environ.items() if key in names or key.startswith(prefixes)}


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


def _read_dotenv(path: Path | None) -> dict[str, str]:
    if path is None or not path.is_file():
        return {}
    from dotenv import dotenv_values  # imported only where a file is there: 10 ms of the start

    return {key: value for key, value in dotenv_values(path, interpolate=False).items() if value is not None}


def _lookup(var: Variable, layers: Sequence[Mapping[str, str]], warnings: list[str]) -> str | None:
    """The text in the first layer that has it, under its name or an older one. An empty value counts as unset."""
    for given in layers:
        for name in (var.name, *var.aliases, *var.deprecated):
            if text := given.get(name, "").strip():
                if name in var.deprecated:
                    warnings.append(f"{name} is deprecated: use {var.name}")
                return text
    return None


_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def _parse(var: Variable, text: str, shown: str | None = None) -> Any:
    """Raises ValueError with name, value and what is allowed."""
    name = shown or var.name
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
        return Path(text).expanduser()
    if var.choices:
        if text.lower() not in var.choices:
            near = difflib.get_close_matches(text.lower(), var.choices, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(var.choices)}{hint}")
        return text.lower()
    return text


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


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _resolve_paths(values: dict[str, Any]) -> None:
    """Fill in the paths whose defaults depend on DATA_DIR."""
    data = values.setdefault("DATA_DIR", detect_data_dir())
    values.setdefault("MODELS_DIR", data / "models")
    values.setdefault("AUTH_KEYS_FILE", data / "api_keys.txt")
    values.setdefault("AUDIT_DB", data / "corral.sqlite")
    if "CONFIG_PATH" not in values:
        found = next(
            (data / f"config.{end}" for end in ("yaml", "yml", "json") if (data / f"config.{end}").is_file()), None
        )
        values["CONFIG_PATH"] = found


def detect_data_dir() -> Path:
    """The platform's volume. An image may hold an empty /data, so that one comes last."""
    for path in (Path("/runpod-volume"), Path("/workspace")):
        if path.is_dir():
            return path
    return Path("/data")


def _cross_check(settings: Settings) -> list[str]:
    problems = [
        f"{name}={shown}: {allowed}"
        for name, shown, wrong, allowed in (
            (
                "PORT_BACKEND",
                settings.port_backend,
                settings.port_backend == settings.port,
                "must differ from PORT",
            ),
            (
                "LLAMA_URL",
                repr(settings.llama_url),
                not re.match(r"https?://[^/\s]+", settings.llama_url or "http://x"),
                "must begin with http:// or https://",
            ),
            (
                "MODEL_URL",
                "…",
                not re.match(r"https?://[^/\s]+", settings.model_url or "http://x"),
                "must begin with http:// or https://",
            ),
            (
                "MODEL_SHA256",
                repr(settings.model_sha256),
                not re.fullmatch(r"[0-9a-fA-F]{64}", settings.model_sha256 or "0" * 64),
                "must be 64 hexadecimal digits",
            ),
            (
                "LOG_NAME",
                repr(settings.log_name),
                not re.fullmatch(r"[A-Za-z0-9._-]+", settings.log_name),
                "must be letters, digits, '.', '-' or '_'",
            ),
            (
                "WORKER_TYPE",
                repr(settings.worker_type),
                not re.fullmatch(r"[A-Za-z0-9._-]+", settings.worker_type or "x"),
                "must be letters, digits, '.', '-' or '_'",
            ),
        )
        if wrong
    ]
    return problems + _check_networks(settings) + _check_origins(settings) + _check_extra_args(settings)


def _check_networks(settings: Settings) -> list[str]:
    problems = []
    for network in settings.trusted_proxies:
        try:
            ipaddress.ip_network(network, strict=False)
        except ValueError:
            problems.append(f"TRUSTED_PROXIES={network!r}: must be addresses or networks such as 10.0.0.0/8")
    return problems


def _check_origins(settings: Settings) -> list[str]:
    return [
        f"CORS_ORIGINS={origin!r}: must be * or scheme://host[:port] without a path"
        for origin in settings.cors_origins
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin, re.IGNORECASE)
    ]


def _check_extra_args(settings: Settings) -> list[str]:
    try:
        shlex.split(settings.extra_args)
    except ValueError as error:
        return [f"EXTRA_ARGS={settings.extra_args!r}: {error}"]
    return []
