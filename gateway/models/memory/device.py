"""How much memory there is for models: the GPUs' where NVML tells it, else RAM as far as the cgroup lets us have it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RAM = "RAM"
_MOST_GPUS = 64


@dataclass(frozen=True)
class Device:
    """Memory that models compete for: "RAM", or "GPU0", "GPU1" … in NVML's order, which is that of the PCI bus.

    Bytes; `free` is what a new process could get.
    """

    name: str
    total: int
    free: int
    uuid: str = ""


def devices(gpu: bool = True, root: Path = Path("/")) -> tuple[Device, ...]:
    """All GPUs that NVML tells of, and RAM as the last, as far as the cgroup lets us have it.

    Blocking: call it in a thread. Without a GPU it takes some milliseconds; NVML can take seconds to wake a sleeping
    driver. An absent, broken or forbidden NVML is as good as no GPU, and so is a GPU that uses the machine's memory.
    """
    return (*(_gpus() if gpu else ()), _ram(root))


def visible(found: Sequence[Device], setting: str | None) -> tuple[Device, ...]:
    """What a process with this CUDA_VISIBLE_DEVICES sees, its CUDA0 first, and RAM; None: the variable is not set.

    As CUDA reads it: indices or the beginnings of UUIDs, and nothing from the first wrong or repeated one on. The
    indices are NVML's only with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    gpus = [device for device in found if device.name != RAM]
    if setting is not None:
        chosen: list[Device] = []
        for word in setting.split(","):
            device = _meant(gpus, word.strip())
            if device is None or device in chosen:
                break
            chosen.append(device)
        gpus = chosen
    return (*gpus, *(device for device in found if device.name == RAM))


def _meant(gpus: Sequence[Device], word: str) -> Device | None:
    if word.isdecimal():
        return next((gpu for gpu in gpus if gpu.name == f"GPU{int(word)}"), None)
    meant = [gpu for gpu in gpus if word.startswith("GPU-") and gpu.uuid.startswith(word)]
    return meant[0] if len(meant) == 1 else None


def anonymous_bytes(pids: Iterable[int], root: Path = Path("/")) -> int:
    """What these processes hold in RAM that cannot be dropped, unlike pages of mapped files, which count as free."""
    return sum(
        lines.get(name, 0) << 10
        for pid in pids
        for lines in (_fields(root / f"proc/{pid}/status"),)
        for name in ("RssAnon:", "RssShmem:")
    )


def _gpus() -> list[Device]:
    """Asks the driver's own library: it comes with the driver, so that no package has to be installed."""
    import ctypes

    class MemoryInfo(ctypes.Structure):  # nvmlMemory_t
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    found: list[Device] = []
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return []
        try:
            count = ctypes.c_uint()
            if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
                return []
            for index in range(min(count.value, _MOST_GPUS)):
                handle, info = ctypes.c_void_p(), MemoryInfo()
                if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
                    continue
                if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)) != 0 or not info.total:
                    continue
                uuid = ctypes.create_string_buffer(96)
                if hasattr(nvml, "nvmlDeviceGetUUID"):  # without it, only indices can name the GPU
                    nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(len(uuid)))
                free = min(info.free, info.total)
                found.append(Device(f"GPU{index}", info.total, free, uuid.value.decode("ascii", "replace")))
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no library, or one that lacks a function
        return []
    return found


def _ram(root: Path) -> Device:
    lines = _fields(root / "proc/meminfo")
    total = lines.get("MemTotal:", 0) << 10 or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = lines.get("MemAvailable:", total >> 10) << 10
    for limit, used in _cgroup_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return Device(RAM, total, free)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) of our cgroup and all above it, v2 and v1.

    Pages of files can be dropped and count as free, as in MemAvailable: mapped models would else count twice.
    """
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            base, limit_file, used_file, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            base, limit_file, used_file = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        here = Path(path.strip("/"))
        for group in (here, *here.parents) if here.parts else (here,):  # without a namespace the path may not be there
            folder = root / base / group
            limit, used = _read(folder / limit_file).strip(), _read(folder / used_file).strip()
            if limit.isdigit() and used.isdigit():  # not "max"
                pages = _fields(folder / "memory.stat")
                files = pages.get(f"{prefix}active_file", 0) + pages.get(f"{prefix}inactive_file", 0)
                limits.append((int(limit), max(0, int(used) - files)))
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
