"""What one start of a llama-server will be: its arguments, and the memory that has to be booked for it. Blocking."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gateway.models.command import Launch, build_argv, build_environment, flag_value
from gateway.models.gguf.header import GGUFError, GGUFHeader, read_header, shards
from gateway.models.memory.arguments import facts_of
from gateway.models.memory.device import RAM, Device, anonymous_bytes, devices, visible
from gateway.models.memory.footprint import FootprintBook, footprint_key
from gateway.models.memory.ledger import cache_ram_mb, need, usable_budget
from gateway.models.policy import Budget, Need, threads_for
from gateway.models.registry import ModelSpec
from gateway.settings import Settings

log = logging.getLogger("corral.models")

MOST_SLOTS = 4  # unless PARALLEL says otherwise
MOST_BATCH = 8192  # tokens of a text to embed; the memory for it grows with it
_CTX_FLAGS = ("-c", "--ctx-size")
_SLOTS_FLAGS = ("-np", "--parallel")


@dataclass(frozen=True)
class Herd:
    """What one model's plan must know of the others."""

    models: int  # that may run at once
    booked: Mapping[str, Need]
    pids: tuple[int, ...]  # of the llama-servers that run
    vram_multiplier: float = 1.1
    max_models: int | None = None
    single: bool = False


@dataclass(frozen=True)
class Memory:
    """What there is, as it was found now, and how much of it models may have."""

    devices: tuple[Device, ...]
    budget: Budget


@dataclass(frozen=True)
class Sizes:
    """What a start needs: as it was measured another time, else as its header foretells it. Sizes are bytes."""

    key: str | None  # under which its footprint is remembered
    need: Need
    measured: bool  # not foretold by us, but told by llama-server itself, now or another time
    buffers: Need  # the part of it that are llama-server's buffers
    gpus: tuple[str, ...]  # that it sees, in its order
    file_bytes: int
    of: Callable[[Mapping[str, int]], Need]  # measured buffers → need


@dataclass(frozen=True)
class Planned:
    launch: Launch
    argv: list[str]
    environment: dict[str, str]
    sizes: Sizes
    ctx: int | None  # of one request, tokens; None: the model's own flags decide
    memory: Memory


@dataclass(frozen=True)
class Planner:
    """What all plans have in common."""

    settings: Settings
    binary: Path
    inherited: Mapping[str, str]  # the environment that a child may have
    book: FootprintBook

    def look(self, herd: Herd) -> Memory:
        """Blocking, as everything here."""
        found = devices(gpu=self.settings.ngl > 0)
        held: dict[str, int] = {}
        for one in herd.booked.values():
            for device, size in one.items():
                held[device] = held.get(device, 0) + size
        held[RAM] = anonymous_bytes(herd.pids)
        settings = self.settings
        budget = usable_budget(found, settings.vram_budget_mb, settings.vram_margin_mb, held, herd.max_models)
        return Memory(found, budget)

    def plan(self, spec: ModelSpec, path: Path, herd: Herd, port: int, without: frozenset[str]) -> Planned:
        """Reads the file's header and looks at the devices."""
        header = _header(spec, path)
        memory = self.look(herd)
        ctx = _ctx(self.settings, header)
        said_ctx, said_slots = (_number(flag_value(spec.flags, *names)) for names in (_CTX_FLAGS, _SLOTS_FLAGS))
        slots = said_slots or spec.slots or self.settings.parallel
        if slots is None and said_ctx is not None:
            log.warning("%s: its flags set the context and no slots: llama-server chooses, set slots", spec.id)
        launch = Launch(
            binary=self.binary,
            port=port,
            ctx_total=0 if said_ctx is not None else ctx * (slots or MOST_SLOTS),
            parallel=0 if said_slots is not None else slots or (0 if said_ctx is not None else MOST_SLOTS),
            ngl=self.settings.ngl,
            threads=self.settings.threads or threads_for(usable_cores(), herd.models),
            cache_ram_mb=cache_ram_mb(header, ctx, slots or MOST_SLOTS) if header is not None else 0,
            extra_args=self.settings.extra_args,
            api_key=secrets.token_urlsafe(32),
            embedding=spec.embedding if spec.embedding is not None else header is not None and header.is_embedding,
            reranking=header is not None and header.is_reranker,
            batch=min(ctx, MOST_BATCH) if header is not None and header.embeds_at_once else 0,
            without=without,
        )
        sized = _Sized(spec, path, header, herd, memory, self)
        if slots is None and said_ctx is None:
            launch = _with_slots_that_fit(launch, sized)
        return Planned(
            launch,
            build_argv(spec, path, launch),
            build_environment(spec, self.inherited, launch),
            sized.sizes(launch),
            ctx if said_ctx is None else None,
            memory,
        )


@dataclass(frozen=True)
class _Sized:
    """Of one model, how much it needs, depending on its launch."""

    spec: ModelSpec
    path: Path
    header: GGUFHeader | None
    herd: Herd
    memory: Memory
    planner: Planner

    def sizes(self, launch: Launch) -> Sizes:
        argv = build_argv(self.spec, self.path, launch)
        facts = facts_of(argv)
        environment = {**self.planner.inherited, **dict(self.spec.env)}
        seen = visible(self.memory.devices, environment.get("CUDA_VISIBLE_DEVICES"))
        gpus = tuple(device.name for device in seen if device.name != RAM)
        beside = sum(map(_size, facts.files))
        header = self.header
        if header is None:
            return Sizes(None, {}, False, {}, gpus, _size(self.path), lambda measured: dict(measured))
        try:
            key = footprint_key([*shards(self.path), *map(Path, facts.files)], argv, [one.name for one in seen])
        except (OSError, GGUFError):
            key = None
        known = self.planner.book.get(key) if key is not None else None
        foretold = need(header, facts, seen, beside, multiplier=self.herd.vram_multiplier)

        def of(measured: Mapping[str, int]) -> Need:
            return need(header, facts, seen, beside, measured=measured)

        measured = known.need if known is not None else {}
        found = of(measured) if measured else foretold
        besides = of({RAM: 0})
        buffers = measured or {device: size - besides.get(device, 0) for device, size in foretold.items()}
        return Sizes(key, found, bool(measured), buffers, gpus, header.tensor_bytes + beside, of)


def _with_slots_that_fit(launch: Launch, sized: _Sized) -> Launch:
    """As many slots as fit into all that models may have."""
    ctx = launch.ctx_total // launch.parallel
    fewer = launch
    for slots in range(launch.parallel, 0, -1):
        fewer = replace(launch, parallel=slots, ctx_total=ctx * slots)
        if sized.memory.budget.holds([sized.sizes(fewer).need]):
            break
    if fewer.parallel < launch.parallel:
        log.warning("%s: PARALLEL is %d, for more do not fit into memory", sized.spec.id, fewer.parallel)
    return fewer


def _header(spec: ModelSpec, path: Path) -> GGUFHeader | None:
    try:
        return read_header(path)
    except (GGUFError, OSError) as error:
        log.warning("%s: %s", spec.id, error)  # llama-server has the last word on its files
        return None


def _ctx(settings: Settings, header: GGUFHeader | None) -> int:
    """Tokens of one request: what is asked for, or as much of CTX as the model was trained for."""
    trained = header.n_ctx_train if header is not None else 0
    if trained and ("CTX" not in settings.explicit or not settings.ctx):
        return min(settings.ctx or trained, trained)
    return settings.ctx


def _number(text: str | None) -> int | None:
    with contextlib.suppress(ValueError):
        return int(text) if text is not None else None
    return None


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def usable_cores() -> int:
    """What the scheduler and a container's CPU quota (cgroup v2) let us have."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number
    return cores
