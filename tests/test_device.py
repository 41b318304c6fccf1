"""What memory there is: as the cgroup leaves it, or as NVML tells."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateway.models.memory.device import RAM, Device, anonymous_bytes, devices, visible

MIB = 1 << 20


def machine(root: Path, cgroup: str = "0::/\n", **files: str) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\nHugePages_Total: 0\n"
ROOT2, ROOT1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def v2(path: str, limit: str, used: str, inactive: int = 0, active: int = 0) -> dict[str, str]:
    folder = f"{ROOT2}{path}"
    stat = f"anon 5\ninactive_file {inactive}\nactive_file {active}\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def v1(path: str, limit: str, used: str, inactive: int = 0) -> dict[str, str]:
    folder = f"{ROOT1}{path}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


@pytest.mark.parametrize(
    ("cgroup", "files", "total", "free"),
    [
        ("", {}, 16 * MIB, 8 * MIB),
        ("0::/\n", v2("", "max\n", "123\n"), 16 * MIB, 8 * MIB),
        ("0::/\n", v2("", f"{6 * MIB}\n", f"{4 * MIB}\n"), 6 * MIB, 2 * MIB),
        ("0::/\n", v2("", f"{6 * MIB}\n", f"{4 * MIB}\n", 3 * MIB), 6 * MIB, 5 * MIB),
        ("0::/\n", v2("", f"{6 * MIB}\n", f"{4 * MIB}\n", 1 * MIB, 2 * MIB), 6 * MIB, 5 * MIB),  # a mapped model
        ("0::/\n", v2("", f"{6 * MIB}\n", f"{4 * MIB}\n", 3 * MIB, 3 * MIB), 6 * MIB, 6 * MIB),  # read at two moments
        ("0::/a/b\n", v2("/a", f"{6 * MIB}", f"{7 * MIB}") | v2("/a/b", "max", "1"), 6 * MIB, 0),
        ("4:cpu,memory:/x\n0::/\n", v1("/x", f"{10 * MIB}\n", f"{9 * MIB}\n", 2 * MIB), 10 * MIB, 3 * MIB),
        ("4:memory:/not/here\n", v1("", f"{10 * MIB}\n", f"{9 * MIB}\n"), 10 * MIB, 1 * MIB),
        ("4:memory:/\n", v1("", "9223372036854771712\n", f"{9 * MIB}\n"), 16 * MIB, 8 * MIB),
        ("nonsense\n\x00", {}, 16 * MIB, 8 * MIB),
    ],
)
def test_ram_is_what_the_cgroup_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, str], total: int, free: int
) -> None:
    root = machine(tmp_path, cgroup, **files)
    assert devices(False, root) == (Device(RAM, total, free),)


def test_a_machine_without_proc(tmp_path: Path) -> None:
    (memory,) = devices(False, tmp_path)
    assert memory.name == RAM and memory.total == memory.free > 0


class FakeNVML:
    """libnvidia-ml.so.1 as far as it is called; GPU 1 forbids the question."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += self.code == 0
        return self.code

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 3
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0 if index.value < 3 else 2

    def nvmlDeviceGetMemoryInfo(self, handle: Any, info: Any) -> int:
        if handle.value == 2:
            return 4
        info._obj.total, info._obj.free, info._obj.used = handle.value * 1000, handle.value * 100, 7
        return 0


def test_a_broken_nvml_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machine(tmp_path)
    alone = (Device(RAM, 16 * MIB, 8 * MIB),)
    for nvml in (FakeNVML(code=999), object()):  # 999: the driver is not loaded; an object without functions
        monkeypatch.setattr("ctypes.CDLL", lambda name, nvml=nvml: nvml)
        assert devices(root=root) == alone
    monkeypatch.setattr("ctypes.CDLL", FakeNVML)  # a name is no code: nvmlInit fails
    assert devices(root=root) == alone


def test_each_gpu_is_a_device_and_ram_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvml = FakeNVML()
    monkeypatch.setattr("ctypes.CDLL", lambda name: nvml)
    found = devices(root=machine(tmp_path))
    assert nvml.open == 0
    # GPU1 forbids the question; this library cannot tell UUIDs
    assert found == (Device("GPU0", 1000, 100), Device("GPU2", 3000, 300), Device(RAM, 16 * MIB, 8 * MIB))


NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int gpus[2] = {0, 1};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return COUNT; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) { *handle = &gpus[index]; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *info) {
    int index = *(int *)handle;
    info->total = 48ULL << 30; info->free = (47ULL - index) << 30; info->used = (1ULL + index) << 30;
    return index == 1 ? SECOND : 0;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned int length) {
    if (length < 96) return 7;
    strcpy(uuid, *(int *)handle ? "GPU-bbbb-2" : "GPU-aaaa-1");
    return 0;
}
"""
GIB = 1 << 30
FIRST, SECOND = Device("GPU0", 48 * GIB, 47 * GIB, "GPU-aaaa-1"), Device("GPU1", 48 * GIB, 46 * GIB, "GPU-bbbb-2")


def built(folder: Path, **codes: int) -> Path:
    (folder / "nvml.c").write_text(NVML)
    library = folder / "libnvidia-ml.so.1"
    defines = [f"-D{name}={codes.get(name, 0)}" for name in ("INIT", "COUNT", "SECOND")]
    subprocess.run(["gcc", "-shared", "-fPIC", *defines, "-o", library, folder / "nvml.c"], check=True)
    return library


# NVML's own codes: 999 unknown error, 4 no permission, 3 not supported
LIBRARIES: list[tuple[dict[str, int], tuple[Device, ...]]] = [
    ({}, (FIRST, SECOND)),
    ({"INIT": 999}, ()),
    ({"COUNT": 4}, ()),
    ({"SECOND": 3}, (FIRST,)),
]


@pytest.mark.parametrize(("codes", "gpus"), LIBRARIES if shutil.which("gcc") else [])
def test_a_library_that_is_loaded_for_real(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codes: dict[str, int], gpus: tuple[Device, ...]
) -> None:
    library, load = built(tmp_path, **codes), ctypes.CDLL
    monkeypatch.setattr("ctypes.CDLL", lambda name: load(str(library)))
    assert devices(root=machine(tmp_path)) == (*gpus, Device(RAM, 16 * MIB, 8 * MIB))


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF nonsense"])
def test_a_library_that_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    library, load = tmp_path / "libnvidia-ml.so.1", ctypes.CDLL
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr("ctypes.CDLL", lambda name: load(str(library)))
    assert [device.name for device in devices(root=machine(tmp_path))] == [RAM]


MEMORY = Device(RAM, 1, 1)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        (None, ["GPU0", "GPU1"]),
        ("", []),
        ("-1", []),
        ("0", ["GPU0"]),
        ("1,0", ["GPU1", "GPU0"]),
        (" 1 , 0 ", ["GPU1", "GPU0"]),
        ("1,-1,0", ["GPU1"]),  # nothing from the first wrong one on
        ("0,9,1", ["GPU0"]),
        ("0,0", ["GPU0"]),
        ("GPU-bbbb", ["GPU1"]),
        ("GPU-bbbb-2,GPU-aaaa-1", ["GPU1", "GPU0"]),
        ("GPU-", []),  # either
        ("GPU-cccc", []),
        ("MIG-1", []),
        ("NoDevFiles", []),
    ],
)
def test_what_a_child_sees(setting: str | None, names: list[str]) -> None:
    assert [device.name for device in visible((FIRST, SECOND, MEMORY), setting)] == [*names, RAM]
    assert visible((MEMORY,), setting) == (MEMORY,)


def test_what_processes_hold_for_themselves(tmp_path: Path) -> None:
    status = "Name:\tx\nVmRSS:\t 900 kB\nRssAnon:\t 100 kB\nRssFile:\t 795 kB\nRssShmem:\t 5 kB\n"
    machine(tmp_path, **{"proc/7/status": status, "proc/8/status": status})
    assert anonymous_bytes([7, 8, 9], tmp_path) == 2 * 105 * 1024
    assert anonymous_bytes([], tmp_path) == 0
    assert anonymous_bytes([os.getpid()]) > MIB
