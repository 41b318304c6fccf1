"""Models files of the router seed, both versions, in today's words.

What has a meaning here is put where it belongs; what has none is named in a warning. Wrong values are left as they
are, for the checks that follow.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

from gateway.crosscheck import without_v1
from gateway.environment import place_in

Section = dict[str, Any]

SEED_IDLE_SECONDS = 300  # the seed's own default, where only `enable_idle_timeout` is said
# What no longer exists, and what to use instead.
_GONE = {
    "api.rate_limit_set_into_turn_off": "leave rate_limit out instead",
    "system.keep_warm_models": "say pinned: true for each model that must stay",
    "system.preload_delay_sec": "models are loaded as memory allows",
    "system.wait_ready_sec": "a load is waited for as long as it goes on",
    "system.timeout_warmup_sec": "a load is waited for as long as it goes on",
    "system.min_vram_required": "use system.vram_margin_mb",
    "system.queue_processor_idle_sec": "queues cost nothing while they are empty",
    "system.model_load_max_retries": "a model that crashes is started again with growing pauses",
    "redis.enable_queue": "for a queue that several gateways share, use NATS_URL",
    "redis.enable_redis_queue": "for a queue that several gateways share, use NATS_URL",
    "redis.queue_ttl_sec": "use system.queue_timeout_sec",
    "redis.queue_prefix": "for a queue that several gateways share, use NATS_URL",
    "redis.cache_prefix": "keys are named by the gateway",
}
_GONE_PREFIXES = {"system.http_max_": "connections to llama-server are bounded by its slots"}
_PLACEHOLDER = re.compile(r"<[A-Z][A-Z0-9_ ]*>")
# Version 1 of the seed: what a model's `params` say → llama-server's flag.
_FLAGS = {
    "n_gpu_layers": "-ngl",
    "n_ctx": "-c",
    "n_batch": "-b",
    "batch_override": "-b",
    "rope_freq_base": "--rope-freq-base",
    "chat_template": "--chat-template",
    "type_k": "-ctk",
    "type_v": "-ctv",
}
PARAMS = (*_FLAGS, "embedding", "parallel_override", "additional_parameter")


def translate(tree: Section) -> list[str]:
    """Changes `tree` in place; returns the warnings, each with its path.

    `_moved` (in a file it would be a comment) says of what was put elsewhere where it stood.
    """
    warnings = [*_placeholders(tree), *_gone(tree), *_bases(tree)]
    _move(tree, "api.rate_limit", "rate_limit")
    _move(tree, "rate_limit.redis_url", "redis.url")
    _move(tree, "system.parallel_requests", "system.default_parallel")
    system = _section(tree, "system")
    _idle(system)
    common = _common_flags(system)
    models = tree.get("models")
    for model in models.values() if isinstance(models, dict) else ():
        if isinstance(model, dict):
            _params(model)
    if common:
        system["_flags"] = common  # as above: no key that a file could have
    return warnings


def are_slots(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 4096


def _placeholders(tree: Section) -> Iterator[str]:
    """The published examples say "<PORT>" where the reader is to put his own."""
    for path, section in _sections(tree):
        for key, value in list(section.items()):
            if isinstance(value, str) and _PLACEHOLDER.fullmatch(value) and key != "model_path":
                del section[key]
                yield f"{path}.{key}: {value} was never filled in, so the default counts"


def _sections(tree: Section) -> Iterator[tuple[str, Section]]:
    for name in ("api", "system", "redis", "rate_limit"):
        yield name, _section(tree, name)
    yield "api.rate_limit", _section(_section(tree, "api"), "rate_limit")
    for name, model in _section(tree, "models").items():
        if isinstance(model, dict):
            yield f"models.{name}", model
            yield f"models.{name}.params", _section(model, "params")


def _gone(tree: Section) -> Iterator[str]:
    for name in ("api", "system", "redis"):
        section = _section(tree, name)
        for key in list(section):
            path = f"{name}.{key}"
            hint = _GONE.get(path) or next((why for start, why in _GONE_PREFIXES.items() if path.startswith(start)), "")
            if hint:
                del section[key]
                yield f"{path}: has no meaning here; {hint}"


def _bases(tree: Section) -> Iterator[str]:
    for name, model in _section(tree, "models").items():
        url = model.get("url") if isinstance(model, dict) else None
        if isinstance(url, str) and (bare := without_v1(url)) != url:
            model["url"] = bare
            yield f"models.{name}.url: ends in /v1, which was left out: a llama-server is named by its address alone"


def _idle(system: Section) -> None:
    enabled = system.get("enable_idle_timeout")
    if isinstance(enabled, bool):
        del system["enable_idle_timeout"]
        if not enabled:
            system["idle_timeout_sec"] = 0
        elif system.get("idle_timeout_sec") is None:
            system["idle_timeout_sec"] = SEED_IDLE_SECONDS


def _common_flags(system: Section) -> list[str]:
    """Version 1 said them for all models together."""
    flags = []
    if isinstance(system.get("use_mmap"), bool):
        flags += [] if system.pop("use_mmap") else ["--no-mmap"]
    attention = system.get("flash_attention")
    attention = {True: "on", False: "off"}.get(attention) if isinstance(attention, bool) else attention  # YAML's own
    if attention in ("on", "off", "auto"):
        del system["flash_attention"]
        flags += ["-fa", attention]
    return flags


def _params(model: Section) -> None:
    params = model.get("params")
    if not isinstance(params, dict):
        if params is None:
            model.pop("params", None)
        return
    flags: list[str] = []
    if params.get("batch_override") is not None:
        params.pop("n_batch", None)
    for key, flag in _FLAGS.items():
        value = params.get(key)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            del params[key]
            flags += _flag(key, flag, value)
    if isinstance(params.get("embedding"), bool):
        flags += ["--embedding"] if params.pop("embedding") else []
    if isinstance(extra := params.get("additional_parameter"), str):
        with contextlib.suppress(ValueError):  # else it stays, and is told
            flags += shlex.split(extra)
            del params["additional_parameter"]
    if are_slots(params.get("parallel_override")):
        slots = params.pop("parallel_override")
        model["slots"] = slots if model.get("slots") is None else model["slots"]
    own = model.get("flags")
    if flags and (own is None or isinstance(own, list)):
        model["flags"] = [*flags, *(own or ())]
    for key in [key for key in PARAMS if params.get(key, False) is None]:
        del params[key]
    if not params:
        del model["params"]


def _flag(key: str, flag: str, value: str | float) -> list[str]:
    if str(value).lower() in ("", "none") or (key == "rope_freq_base" and not value):
        return []
    return [flag, "999" if key == "n_gpu_layers" and str(value) == "-1" else str(value)]


def _move(tree: Section, path: str, to: str) -> None:
    """What stands at `to` already wins."""
    source, _, key = path.rpartition(".")
    section, _, name = to.rpartition(".")
    if key not in (origin := _section(tree, source)):
        return
    value = origin.pop(key)
    if section and tree.get(section) is None:
        tree[section] = {}
    target = tree[section] if section else tree
    if value is not None and isinstance(target, dict) and target.get(name) is None:
        target[name] = value
        tree.setdefault("_moved", {})[to] = place_in(tree, path)


def _section(tree: Section, name: str) -> Section:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}
