"""What of a llama-server's arguments decides how much memory it takes. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ALL_LAYERS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Facts:
    """llama-server's own defaults, unless its arguments say otherwise."""

    ctx_total: int = 0  # tokens, of all slots; 0 = as trained
    parallel: int = 4  # slots
    kv_unified: bool = True  # one context for all slots together, as always where llama-server chooses their number
    batch: int = 2048
    ubatch: int = 512
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash: bool = True
    swa_full: bool = False
    repack: bool = True
    cache_ram_mb: int = 8192
    ngl: int = ALL_LAYERS  # layers on GPUs
    kv_offload: bool = True
    cpu_moe: int = 0  # so many first layers keep their experts in RAM
    split_mode: str = "layer"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    devices: tuple[str, ...] | None = None  # "CUDA0", …; None: all
    mmproj: bool = False  # there is a projector, for images or sound
    mmproj_offload: bool = True
    files: tuple[str, ...] = ()  # projectors, drafts, adapters: paths


def facts_of(argv: Sequence[str]) -> Facts:
    """Reads arguments as llama-server does: the last one of a kind wins. What it would refuse is passed over."""
    found: dict[str, Any] = {}
    files: list[str] = []
    words = list(argv)
    for index, word in enumerate(words):
        if not word.startswith("-"):
            continue
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = flag.replace("_", "-")
        if flag in _SWITCHES:
            name, setting = _SWITCHES[flag]
            found[name] = setting
        elif not equals and index + 1 < len(words):
            value = words[index + 1]
        if flag in _FILES and value:
            files += filter(None, value.split(","))
            found["mmproj"] = found.get("mmproj", False) or flag in _PROJECTOR
        elif flag in _VALUES:
            name, read = _VALUES[flag]
            try:
                found[name] = read(value)
            except (ValueError, OverflowError):
                continue
    slots = found.pop("parallel", 0)
    if slots:
        found = {"kv_unified": False, **found, "parallel": slots}
    else:
        found.pop("kv_unified", None)
    return Facts(**found, files=tuple(files))


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _slots(text: str) -> int:
    """0: llama-server chooses, which is 4."""
    return max(0, int(text))


def _layers(text: str) -> int:
    return ALL_LAYERS if text in ("auto", "all") or int(text) < 0 else int(text)


def _cache_ram(text: str) -> int:
    """-1: without bound, which nobody can book."""
    return int(text) if int(text) >= 0 else Facts.cache_ram_mb


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(share) for share in text.replace("/", ",").split(","))
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ValueError(text)
    return shares


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip() and name.strip() != "none")


def _flash(text: str) -> bool:
    return text not in ("off", "0", "false")


def _spread(*flags: str, to: Any) -> dict[str, Any]:
    return dict.fromkeys(flags, to)


_VALUES: dict[str, tuple[str, Callable[[str], Any]]] = {
    **_spread("-c", "--ctx-size", to=("ctx_total", _count)),
    **_spread("-np", "--parallel", to=("parallel", _slots)),
    **_spread("-b", "--batch-size", to=("batch", _count)),
    **_spread("-ub", "--ubatch-size", to=("ubatch", _count)),
    **_spread("-ctk", "--cache-type-k", to=("cache_type_k", str)),
    **_spread("-ctv", "--cache-type-v", to=("cache_type_v", str)),
    **_spread("-fa", "--flash-attn", to=("flash", _flash)),
    **_spread("-cram", "--cache-ram", to=("cache_ram_mb", _cache_ram)),
    **_spread("-ngl", "--gpu-layers", "--n-gpu-layers", to=("ngl", _layers)),
    **_spread("-ncmoe", "--n-cpu-moe", to=("cpu_moe", _count)),
    **_spread("-sm", "--split-mode", to=("split_mode", str)),
    **_spread("-ts", "--tensor-split", to=("tensor_split", _shares)),
    **_spread("-mg", "--main-gpu", to=("main_gpu", _count)),
    **_spread("-dev", "--device", to=("devices", _names)),
}
_SWITCHES: dict[str, tuple[str, Any]] = {
    **_spread("-kvu", "--kv-unified", to=("kv_unified", True)),
    **_spread("-no-kvu", "--no-kv-unified", to=("kv_unified", False)),
    **_spread("-nkvo", "--no-kv-offload", to=("kv_offload", False)),
    **_spread("-kvo", "--kv-offload", to=("kv_offload", True)),
    **_spread("-nr", "--no-repack", to=("repack", False)),
    **_spread("--repack", to=("repack", True)),
    **_spread("-cmoe", "--cpu-moe", to=("cpu_moe", ALL_LAYERS)),
    **_spread("--swa-full", to=("swa_full", True)),
    **_spread("--no-mmproj-offload", to=("mmproj_offload", False)),
    **_spread("--mmproj-offload", to=("mmproj_offload", True)),
}
_PROJECTOR = ("--mmproj", "-mm")
_FILES = frozenset((*_PROJECTOR, "-md", "--model-draft", "--spec-draft-model", "--lora", "--control-vector"))
