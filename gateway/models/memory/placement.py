"""Which device holds which layer, as llama.cpp deals them out. Pure."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from gateway.models.memory.arguments import Facts
from gateway.models.memory.device import RAM, Device

Shares = Mapping[str, float]  # of one, by device


@dataclass(frozen=True)
class Placement:
    """Where the weights and the cache of each layer are, by device; `gpus` are all that the process opens."""

    gpus: tuple[str, ...]
    layers: tuple[Shares, ...]
    caches: tuple[Shares, ...]
    output: str
    computing: tuple[str, ...]


def place(n_layers: int, facts: Facts, devices: Sequence[Device]) -> Placement:
    """`devices` are those that the process sees, in its order. `n_layers` is at least 1."""
    gpus = _chosen(facts, [device for device in devices if device.name != RAM])
    names = tuple(gpu.name for gpu in gpus)
    in_ram: Shares = {RAM: 1.0}
    on_gpus = min(facts.ngl, n_layers + 1) if gpus else 0  # the output counts as one more layer
    first = n_layers + 1 - on_gpus
    shares = _shares(facts, gpus)
    spread = dict(zip(names, shares, strict=True))
    bounds = list(accumulate(shares))
    layers: list[Shares] = []
    caches: list[Shares] = []
    for layer in range(n_layers + 1):
        if layer < first:
            layers.append(in_ram)
            caches.append(in_ram)
            continue
        alone: Shares = {names[min(bisect_right(bounds, (layer - first) / on_gpus), len(names) - 1)]: 1.0}
        layers.append(spread if facts.split_mode in ("row", "tensor") else alone)
        caches.append(spread if facts.split_mode == "tensor" else alone)
    if not facts.kv_offload:
        caches = [in_ram] * (n_layers + 1)
    output = RAM if not on_gpus else next(iter(caches[-1] if facts.kv_offload else layers[-1]))
    used = [name for name in names if any(name in layer for layer in layers)]
    # Without a layer on it, a GPU still works through long prompts.
    return Placement(names, tuple(layers[:-1]), tuple(caches[:-1]), output, tuple(used or names[:1] or (RAM,)))


def _chosen(facts: Facts, gpus: Sequence[Device]) -> list[Device]:
    chosen = list(gpus)
    if facts.devices is not None:
        numbers = [int(match[1]) for name in facts.devices if (match := re.fullmatch(r"[A-Za-z]+(\d{1,4})", name))]
        chosen = [gpus[number] for number in numbers if number < len(gpus)]
    if facts.split_mode == "none":
        chosen = chosen[facts.main_gpu : facts.main_gpu + 1]
    return list(dict.fromkeys(chosen))


def _shares(facts: Facts, gpus: Sequence[Device]) -> list[float]:
    """By --tensor-split, else by free memory."""
    wanted = [*facts.tensor_split[: len(gpus)], *[0.0] * (len(gpus) - len(facts.tensor_split))]
    if not any(wanted):
        wanted = [float(gpu.free) for gpu in gpus]
    total = sum(wanted)
    return [share / total for share in wanted] if total else [1 / len(gpus) for _ in gpus]
