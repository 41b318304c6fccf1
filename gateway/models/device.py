"""How much memory there is for models: the GPUs' where NVML tells it, else RAM as far as the cgroup lets us have it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Memory:
    """Bytes; `free` is what a new process could get."""

    total: int
    free: int
    kind: Literal["gpu", "ram"]


def available_memory(gpu: bool = True, devices: Sequence[int] = (), root: Path = Path("/")) -> Memory:
    """The memory that models compete for; `devices` are the GPUs that count, none named: all.

    Blocking: call it in a thread. Without a GPU it takes some milliseconds; NVML can take seconds to wake a sleeping
    driver. An absent, broken or forbidden NVML is as good as no GPU.
    """
    return (gpu and _gpu_memory(devices)) or _ram(root)


def _gpu_memory(devices: Sequence[int]) -> Memory | None:
    """Asks the driver's own library: it comes with the driver, so that no package has to be installed."""
    import ctypes

    class MemoryInfo(ctypes.Structure):  # nvmlMemory_t
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    total = free = 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            count = ctypes.c_uint()
            if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
                return None
            for index in devices or range(count.value):
                handle, info = ctypes.c_void_p(), MemoryInfo()
                if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0:
                    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)) == 0:
                        total, free = total + info.total, free + info.free
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no library, or one that lacks a function
        return None
    return Memory(total, free, "gpu") if total else None


def _ram(root: Path) -> Memory:
    lines = _fields(root / "proc/meminfo")
    total = lines.get("MemTotal:", 0) << 10 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = lines.get("MemAvailable:", total >> 10) << 10
    for limit, used in _cgroup_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Memory(total, free, "ram")


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of our cgroup and all above it, v2 and v1; file pages that can be dropped do not count as used."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            base, limit_file, used_file, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        here = Path(path.strip("/"))
        for group in (here, *here.parents) if here.parts else (here,):  # without a namespace the path may not be there
            folder = root / base / group
            limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
            if limit.isdigit() and used.isdigit():  # not "max"
                limits.append((int(limit), int(used) - _fields(folder / "memory.stat").get(cache, 0)))
    return limits


def _fields(path: Path) -> dict[str, int]:
    """First words of lines, and the numbers behind them."""
    rows = (line.split() for line in _read(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
