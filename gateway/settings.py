"""Every variable, declared once with its default, bounds and help."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    threads: int = _var(0, "CPU threads, 0 = auto", low=0, high=1024, file="system.cpu_threads")
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
    cache_embedding_model: str | None = _var(None, "model or URL; also caches prompts that mean the same")
    cache_similarity: float | None = _var(
        None, "least similarity of prompts that mean the same", low=0, high=1, shown="0.8"
    )
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
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)  # see `told_as`
    # the models file, for what is no variable; it may hold secrets
    file: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def told_as(self, name: str) -> str:
        """How the user knows a variable's value: by the name that was set, or by its place in the models file."""
        return self.origins.get(name, name)

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
