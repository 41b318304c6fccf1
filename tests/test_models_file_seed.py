"""Files that were written for the router seed, both versions: they load, and say the same as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.house import ROOT
from tests.models_file_kit import Place, place

__all__ = ["place"]

V1, V2 = (json.loads((ROOT / "tests" / "seed" / f"{version}.json").read_text()) for version in ("v1", "v2"))
DEVICE = ("CUDA_VISIBLE_DEVICES", "0")


def test_version_1_loads(place: Place) -> None:
    settings = place.settings(V1)
    assert (settings.port, settings.host, settings.llama_server_path) == (8000, "0.0.0.0", None)
    assert (settings.parallel, settings.threads, settings.idle_timeout_seconds) == (1, 8, 0)
    assert (settings.max_queue_size, settings.queue_timeout_seconds, settings.request_timeout) == (500, 180, 120)
    registry = place.registry(V1)
    assert (registry.single, registry.max_models, registry.preload_all, registry.vram_multiplier) == (
        False,
        10,
        True,
        1.1,
    )
    specs = registry.specs
    assert list(specs) == ["<ALIAS_OF_A_MODEL>", "embeds", "talks"]
    assert specs["<ALIAS_OF_A_MODEL>"].flags == ("-fa", "on")
    assert specs["<ALIAS_OF_A_MODEL>"].problem == f"model_path {place.folder}/models/<PATH_OF_A_MODEL>: no such file"
    embeds, talks = specs["embeds"], specs["talks"]
    assert embeds.flags == ("-fa", "on", "-ngl", "99", "-c", "4096", "--embedding")
    assert (embeds.embedding, embeds.slots, embeds.path) == (True, None, Path("/models/embeds.gguf"))
    assert talks.flags == tuple(
        "-fa on -ngl 999 -c 8192 -b 512 --rope-freq-base 10000 --chat-template chatml -ctk q8_0 --no-warmup "
        "--seed 1".split()
    )
    assert (talks.slots, talks.embedding, talks.env) == (4, None, (DEVICE,))


def test_version_2_loads(place: Place) -> None:
    settings = place.settings(V2)
    assert (settings.models_dir, settings.parallel, settings.redis_url) == (
        Path("/path/to/models"),
        1,
        "redis://localhost:6379/0",
    )
    assert (settings.cache_enabled, settings.cache_ttl_seconds, settings.max_requests_per_minute) == (True, 3600, 100)
    specs = place.registry(V2).specs
    assert specs["chats"].flags == ("-ngl", "99", "--ctx-size", "4096", "--jinja", "--flash-attn", "on")
    assert specs["embeds"].embedding
    assert {spec.problem for spec in specs.values()} == {
        f"model_path /path/to/models/{name}.gguf: no such file" for name in specs
    }


GONE = {
    "system": [
        "preload_delay_sec",
        "keep_warm_models",
        "min_vram_required",
        "timeout_warmup_sec",
        "wait_ready_sec",
        "http_max_keepalive",
        "http_max_connections",
        "queue_processor_idle_sec",
        "model_load_max_retries",
    ],
    "redis": ["cache_prefix", "enable_redis_queue", "queue_ttl_sec", "queue_prefix"],
    "api": ["rate_limit_set_into_turn_off"],
}


@pytest.mark.parametrize(
    ("content", "sections", "unfilled"),
    [
        (
            V1,
            ["system"],
            ["api.host", "api.port", "system.llama_server_path"]
            + [f"models.<ALIAS_OF_A_MODEL>.params.{key}" for key in ("n_gpu_layers", "n_ctx", "type_k", "type_v")],
        ),
        (V2, ["api", "system", "redis"], ["api.rate_limit.requests_per_minute", "api.rate_limit.redis_url"]),
    ],
)
def test_what_has_no_meaning_is_warned_about_by_name(
    place: Place, content: Any, sections: list[str], unfilled: list[str]
) -> None:
    start = f"{place.folder}/config.yaml: "
    warnings = [line.removeprefix(start) for line in place.settings(content).warnings]
    gone = [line.partition(": has no meaning here; ")[0] for line in warnings if "no meaning" in line]
    assert sorted(gone) == sorted(f"{section}.{key}" for section in sections for key in GONE[section])
    rest = [line.partition(":")[0] for line in warnings if "never filled in" in line]
    assert rest == unfilled
    assert len(warnings) == len(gone) + len(rest)


def test_a_shared_queue_is_pointed_to_NATS(place: Place) -> None:
    remote = {"models": {"m": {"url": "http://h"}}}
    (warning,) = place.settings(remote | {"redis": {"enable_queue": True}}).warnings
    assert warning.endswith(
        "redis.enable_queue: has no meaning here; for a queue that several gateways share, use NATS_URL"
    )


@pytest.mark.parametrize(
    ("content", "environ", "name", "becomes"),
    [
        ({"api": {"rate_limit": {"requests_per_minute": 7}}}, {}, "max_requests_per_minute", 7),
        ({"api": {"rate_limit": {"requests_per_minute": "7"}}}, {}, "max_requests_per_minute", 7),
        ({"api": {"rate_limit": None}}, {}, "max_requests_per_minute", 100),
        (
            {"api": {"rate_limit": {"requests_per_minute": 7}}, "rate_limit": {"requests_per_minute": 8}},
            {},
            "max_requests_per_minute",
            8,
        ),
        ({"api": {"rate_limit": {"redis_url": "redis://a"}}}, {}, "redis_url", "redis://a"),
        ({"rate_limit": {"redis_url": "redis://a"}}, {}, "redis_url", "redis://a"),
        ({"rate_limit": {"redis_url": "redis://a"}, "redis": {"url": "redis://b"}}, {}, "redis_url", "redis://b"),
        ({"system": {"parallel_requests": 3}}, {}, "parallel", 3),
        ({"system": {"parallel_requests": 3, "default_parallel": 5}}, {}, "parallel", 5),
        ({"system": {"parallel_requests": 3}}, {"PARALLEL": "2"}, "parallel", 2),
        ({"system": {"cpu_threads": 3}}, {}, "threads", 3),
        ({"system": {"cpu_threads": 3}}, {"THREADS": "2"}, "threads", 2),
    ],
)
def test_what_moved(place: Place, content: dict[str, Any], environ: dict[str, str], name: str, becomes: Any) -> None:
    settings = place.settings(content | {"models": {"m": {"url": "http://h"}}}, **environ)
    assert getattr(settings, name) == becomes


@pytest.mark.parametrize(
    ("system", "own", "flags"),
    [
        ({"use_mmap": False}, [], ["--no-mmap"]),
        ({"use_mmap": True}, [], []),
        ({"use_mmap": False}, ["--no-mmap"], ["--no-mmap"]),
        ({"flash_attention": "off"}, ["-c", "1"], ["-fa", "off", "-c", "1"]),
        ({"flash_attention": True}, [], ["-fa", "on"]),  # YAML's own reading of on
        ({"flash_attention": "on"}, ["-fa", "off"], ["-fa", "off"]),
        ({"flash_attention": "on"}, ["--flash-attn=off"], ["--flash-attn=off"]),
        ({"flash_attention": "auto", "use_mmap": False}, [], ["-fa", "auto", "--no-mmap"]),
    ],
)
def test_what_was_said_of_all_models_is_said_of_each(
    place: Place, system: dict[str, Any], own: list[str], flags: list[str]
) -> None:
    place.files("m.gguf")
    content = {"system": system, "models": {"m": {"model_path": "m", "flags": own}, "r": {"url": "http://h"}}}
    specs = place.registry(content).specs
    assert (specs["m"].flags, specs["r"].flags) == (tuple(flags), ())


@pytest.mark.parametrize(
    ("params", "flags", "slots"),
    [
        ({}, [], None),
        (None, [], None),
        ({"n_gpu_layers": 0, "n_ctx": "2048"}, ["-ngl", "0", "-c", "2048"], None),
        ({"n_batch": 256}, ["-b", "256"], None),
        ({"rope_freq_base": 0, "type_k": None, "type_v": "none", "chat_template": ""}, [], None),
        ({"embedding": False, "parallel_override": 2}, [], 2),
        ({"additional_parameter": "--seed '1 2'"}, ["--seed", "1 2"], None),
        ({"_comment": "x", "additional_parameter": ""}, [], None),
    ],
)
def test_params(place: Place, params: Any, flags: list[str], slots: int | None) -> None:
    place.files("m.gguf")
    spec = place.registry({"models": {"m": {"model_path": "m", "params": params}}}).specs["m"]
    assert (spec.flags, spec.slots) == (tuple(flags), slots)


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        ({"n_ctz": 1}, "models.m.params.n_ctz: is not known; did you mean models.m.params.n_ctx?"),
        ({"n_ctx": [1]}, "models.m.params.n_ctx: must be text or a number, not a list"),
        ({"embedding": 1}, "models.m.params.embedding: must be true or false, not 1"),
        ({"parallel_override": 0}, "models.m.params.parallel_override: must be a whole number from 1 to 4096, not 0"),
        (
            {"additional_parameter": "--host x"},
            "models.m.flags: --host: the gateway chooses where llama-server listens",
        ),
        ({"additional_parameter": "'"}, "models.m.params.additional_parameter: is no text that a shell could read"),
        (["-c"], "models.m.params: must be a section with keys, not a list"),
    ],
)
def test_wrong_params(place: Place, params: Any, problem: str) -> None:
    place.files("m.gguf")
    assert place.problems({"models": {"m": {"model_path": "m", "params": params}}}) == [problem]
