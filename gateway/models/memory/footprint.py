"""What a llama-server was measured to need, how far its load has come, and whether a load ended for want of memory.

llama-server tells its buffers in lines "CUDA0 KV buffer size = 192.00 MiB". Builds from spring 2026 on print them at
verbosity 4 (trace) only, older ones at their default; there 4 means debug, which shows prompts. So a server that
works is never asked for more: `glance_argv` has the sizes told by one that loads nothing and is ended at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import re
import signal
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
RAISE, MOST_RAISED = 1.25, 2.0
MOST_ENTRIES = 512
_MOST_BYTES = 4 << 20
_LINE = re.compile(rb"(\w+): +(\S+) +(?:([\w ]+?) +)?buffer size *= *(\d{1,9}(?:\.\d*)?) MiB")
_ROW = re.compile(rb"\| +- ([^|]+?) +\|[^|]*?(\d{1,9}) = +\d+ \+ +\d+ \+ +\d+")
_NEW_CONTEXT = b"constructing llama_context"
_MOST_PARTIAL = 4096
_PROGRAM = 24 << 20  # the pages of llama-server's own code
_NO_MATTER = ("--port", "--alias", "--host", "-t", "-lv")  # with their values: no memory depends on them
_OUT_OF_MEMORY = re.compile(
    r"out of (device |host )?memory|insufficient memory|cannot allocate memory|failed to allocate|unable to allocate"
    r"|cudaMalloc failed|OutOf(Device|Host)Memory|bad_alloc|ALLOC_FAILED|alloc_buffer: allocating .* failed",
    re.IGNORECASE,
)


class BufferLog:
    """Collects the buffers out of a llama-server's output, as it comes.

    `gpus` names the devices that the child sees, in its own order: its CUDA0 is `gpus[0]`. A GPU that is not among them
    shares its memory with the machine, or nobody can tell its size: it counts as RAM.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self._gpus = tuple(gpus)
        self._partial = b""
        self._contexts = 0
        self._buffers: dict[tuple[object, ...], tuple[bytes, int]] = {}
        self._projected: dict[str, int] = {}
        self.settled = False  # a glance has told what it will tell

    def feed(self, data: bytes) -> None:
        """Takes the next bytes, wherever they are cut; what is not about buffers costs one look."""
        data = self._partial + data
        end = data.rfind(b"\n") + 1
        self._partial = data[end:][-_MOST_PARTIAL:]
        if b" MiB" not in data and _NEW_CONTEXT not in data and b"breakdown" not in data:
            return
        for line in data[:end].splitlines():
            if b"buffer size" in line:
                self._take_buffer(line)
            elif _NEW_CONTEXT in line:
                self._contexts += 1
            elif b"breakdown" in line:
                self._take_row(line)
            self.settled |= b"projected to use" in line or b"buffer size" in line

    def measured(self) -> dict[str, int]:
        """Bytes by device; empty where the output told nothing."""
        found: dict[str, int] = {}
        for place, size in self._buffers.values():
            for device, share in self._devices(place):
                found[device] = found.get(device, 0) + round(size * share)
        return found

    def projected(self) -> dict[str, int]:
        """Bytes by device out of the last "memory breakdown" table, which `--fit on` prints before it loads."""
        return dict(self._projected)

    def _take_buffer(self, line: bytes) -> None:
        match = _LINE.search(line)
        if match is None:
            return
        where, place, kind, size = match[1], match[2], match[3] or b"model", round(float(match[4]) * MIB)
        key: tuple[object, ...] = (where, place, kind, self._contexts)
        if kind != b"compute":  # a context may reserve its compute buffer again; all others add up, one a file or cache
            key += (len(self._buffers),)
        self._buffers[key] = place, size

    def _take_row(self, line: bytes) -> None:
        if b"| memory breakdown" in line:
            self._projected = {}
        elif match := _ROW.search(line):
            place = match[1].split(b" ")[0]
            for device, share in self._devices(place):
                self._projected[device] = self._projected.get(device, 0) + round(int(match[2]) * MIB * share)

    def _devices(self, place: bytes) -> list[tuple[str, float]]:
        """Whose memory a buffer type's is: "CUDA1" is a GPU, "CUDA_Host", "CPU_Mapped" and "CPU_REPACK" are RAM."""
        if place.startswith(b"Meta") and self._gpus:  # one buffer over all GPUs (--split-mode tensor)
            return [(gpu, 1 / len(self._gpus)) for gpu in self._gpus]
        match = re.fullmatch(rb"[A-Za-z]+(\d+)(?:_Split)?", place)
        index = int(match[1]) if match else len(self._gpus)
        return [(self._gpus[index] if index < len(self._gpus) else "RAM", 1.0)]


def glance_argv(argv: Sequence[str]) -> list[str]:
    """A start like `argv` that tells what it would need, in 20 ms and the time to read the vocabulary.

    Feed its output to a BufferLog, and kill it when that is `settled`, when it ends or after some seconds: it would go
    on and load the model. It gets no requests, so its log shows none. A build that does not know `--fit` tells nothing.
    """
    return [*argv, "--fit", "on", "-lv", "4", "--port", "0"]


def out_of_memory(lines: Sequence[str], exit_status: int | None) -> bool:
    """Whether a load ended for want of memory: by its last lines, or killed, as the kernel does when RAM is used up.

    `exit_status` is negative for a signal, None where the process still runs.
    """
    return exit_status == -signal.SIGKILL or any(_OUT_OF_MEMORY.search(line) for line in lines)


def load_progress(pid: int, file_bytes: int, root: Path = Path("/proc")) -> float | None:
    """How much of `file_bytes` a loading llama-server has taken in, 0 to 0.99; None where nobody may know.

    What it has touched of mapped files, or read: two small files of the kernel's.
    """
    try:
        mapped = int((root / f"{pid}/statm").read_text().split()[2]) * mmap.PAGESIZE
        io = (root / f"{pid}/io").read_text()
        read = int(io.split()[1]) if io.startswith("rchar:") else 0
    except (OSError, ValueError, IndexError):
        return None
    return min(0.99, max(mapped - _PROGRAM, read - _PROGRAM, 0) / file_bytes) if file_bytes > 0 else None


def footprint_key(files: Iterable[Path], argv: Sequence[str], devices: Iterable[str]) -> str:
    """By what a footprint is remembered: the files as they are on disk, the arguments that matter, the devices.

    Blocking. `files` are all parts of the model, and whatever else is loaded; the program itself counts by its own.
    Raises OSError where one is gone.
    """
    facts: list[Any] = []
    for file in (*files, Path(argv[0])):
        status = file.stat()
        facts.append([str(file), status.st_size, status.st_mtime_ns])
    words = [str(word) for word in argv]
    for flag in _NO_MATTER:
        while flag in words:
            at = words.index(flag)
            del words[at : at + 2]
    text = json.dumps([facts, words, list(devices)], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Measured:
    """What one kind of start needs: bytes of buffers by device, and seconds until it was ready (0: it never was).

    `raised`: how many times the buffers it must be given, because it ran out of memory with less.
    """

    buffers: Mapping[str, int]
    load_seconds: float = 0.0
    raised: float = 1.0

    @property
    def need(self) -> dict[str, int]:
        return {device: round(size * self.raised) for device, size in self.buffers.items()}


class FootprintBook:
    """Remembers what was measured, in a file where it is given one.

    Reading happens at the first question, writing at each change; both block for a moment, in any thread. A file that
    cannot be read counts as empty and is overwritten; one that cannot be written is counted in `write_errors`.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, Measured] | None = None
        self._lock = threading.RLock()
        self.write_errors = 0

    def get(self, key: str) -> Measured | None:
        with self._lock:
            return self._read().get(key)

    def put(self, key: str, measured: Mapping[str, int], load_seconds: float) -> None:
        """A load that went well. One that told no buffers leaves those that are known."""
        with self._lock:
            known = self.get(key) or Measured({})
            self._write(key, Measured(measured or known.buffers, load_seconds, min(known.raised, RAISE)))

    def raise_to(self, key: str, needed: Mapping[str, int]) -> Measured:
        """After an out-of-memory where buffers of `needed` had been believed: RAISE times that, at most MOST_RAISED.

        There is a bound because it may have been somebody else who took the memory.
        """
        with self._lock:
            known = self.get(key) or Measured({})
            buffers = {
                device: max(known.buffers.get(device, 0), round(needed.get(device, 0) / known.raised))
                for device in {**known.buffers, **needed}
            }
            raised = Measured(buffers, known.load_seconds, min(known.raised * RAISE, MOST_RAISED))
            self._write(key, raised)
            return raised

    def _read(self) -> dict[str, Measured]:
        if self._entries is None:
            self._entries = {}
            if self._path is not None:
                with contextlib.suppress(OSError), self._path.open("rb") as file:
                    self._entries = _entries(file.read(_MOST_BYTES))
        return self._entries

    def _write(self, key: str, entry: Measured) -> None:
        entries = self._read()
        entries.pop(key, None)
        entries[key] = entry
        for oldest in list(entries)[:-MOST_ENTRIES]:
            del entries[oldest]
        if self._path is None:
            return
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps({name: _row(one) for name, one in entries.items()}))
            new.replace(self._path)
        except OSError:
            self.write_errors += 1
            with contextlib.suppress(OSError):
                new.unlink()


def _row(one: Measured) -> dict[str, object]:
    return {"buffers": dict(one.buffers), "load_seconds": one.load_seconds, "raised": one.raised}


def _entries(data: bytes) -> dict[str, Measured]:
    """What is sound of a file that anybody may have written."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(rows, dict):
        return {}
    sound = {key: _entry(row) for key, row in list(rows.items())[-MOST_ENTRIES:]}
    return {key: entry for key, entry in sound.items() if entry is not None}


def _entry(row: Any) -> Measured | None:
    match row:
        case {
            "buffers": dict(buffers),
            "load_seconds": int() | float() as seconds,
            "raised": int() | float() as raised,
        }:
            sizes = all(type(size) is int and 0 <= size < 1 << 50 for size in buffers.values())
            if sizes and 0 <= seconds < math.inf and 1 <= raised <= MOST_RAISED:
                return Measured(buffers, float(seconds), float(raised))
    return None
