"""What memory there is: as the cgroup leaves it, or as NVML tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.models.device import Memory, available_memory

MIB = 1 << 20


def machine(root: Path, cgroup: str = "0::/\n", **files: str) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\nHugePages_Total: 0\n"
ROOT2, ROOT1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def v2(path: str, limit: str, used: str, inactive: int = 0) -> dict[str, str]:
    folder = f"{ROOT2}{path}"
    stat = f"anon 5\ninactive_file {inactive}\n"
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
    assert available_memory(False, root=machine(tmp_path, cgroup, **files)) == Memory(total, free, "ram")


def test_a_machine_without_proc(tmp_path: Path) -> None:
    memory = available_memory(False, root=tmp_path)
    assert memory.kind == "ram" and memory.total == memory.free > 0


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


@pytest.mark.parametrize(("devices", "sums"), [((), (4000, 400)), ((2,), (3000, 300)), ((0, 9), (1000, 100))])
def test_gpus_are_summed(monkeypatch: pytest.MonkeyPatch, devices: tuple[int, ...], sums: tuple[int, int]) -> None:
    nvml = FakeNVML()
    monkeypatch.setattr("ctypes.CDLL", lambda name: nvml)
    assert available_memory(devices=devices) == Memory(*sums, "gpu")
    assert nvml.open == 0


def test_a_broken_nvml_is_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machine(tmp_path)
    for nvml in (FakeNVML(code=999), object()):  # 999: the driver is not loaded; an object without functions
        monkeypatch.setattr("ctypes.CDLL", lambda name, nvml=nvml: nvml)
        assert available_memory(root=root).kind == "ram"
    monkeypatch.setattr("ctypes.CDLL", FakeNVML)  # a name is no code: nvmlInit fails
    assert available_memory(root=root).kind == "ram"
