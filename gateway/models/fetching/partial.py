"""A file on its way into the models folder: `<name>.part` under a lock, and beside it what a resumption has to know.

Everything here blocks and belongs into a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

_BLOCK = 1 << 20
_GIGABYTE = 1e9


class DownloadError(Exception):
    """A model could not be fetched; the message says in one sentence what to mend, and holds no secret."""


class Partial:
    """The part file of `label` in `folder`. It is whose who holds its lock; others wait for the finished file.

    Its methods raise DownloadError where the disk is full or not writable.
    """

    def __init__(self, folder: Path, label: str) -> None:
        self.path = folder / f"{label}.part"
        self.notes_path = folder / f"{label}.part.json"
        self.size = 0
        self.resumed = False  # holds bytes of an earlier transfer
        self.notes: dict[str, str | int] = {}  # source, etag, last_modified, total
        self._file: FileIO | None = None
        self._sha256 = hashlib.sha256()

    def try_lock(self) -> bool:
        """Opens the file unless another process, or another task here, is filling it."""
        with disk_errors(self.path):
            file = self.path.open("ab", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):  # else it was finished meanwhile
                self._file = file
                return True
        file.close()
        return False

    def resume(self, source: str, stop: threading.Event) -> None:
        """Takes up what an earlier transfer of `source` left, and hashes it; ends early once `stop` is set."""
        with contextlib.suppress(OSError, ValueError):
            notes = json.loads(self.notes_path.read_text())
            self.notes = notes if isinstance(notes, dict) else {}
        if self.notes.get("source") != source:
            self.rewind()
            self.notes["source"] = source
            return
        with disk_errors(self.path):
            self._sha256, self.size = hash_file(self.path, stop)
        self.resumed = self.size > 0

    def note(self, notes: dict[str, str | int]) -> None:
        """Remembers validators and the total for the next attempt, which may be another process's."""
        self.notes |= {key: value for key, value in notes.items() if value}
        with disk_errors(self.path):
            self.notes_path.write_text(json.dumps(self.notes))

    def rewind(self) -> None:
        assert self._file is not None
        with disk_errors(self.path):
            self._file.truncate(0)
        self._sha256, self.size, self.resumed = hashlib.sha256(), 0, False
        self.notes = {key: value for key, value in self.notes.items() if key == "source"}

    def append(self, data: bytes) -> None:
        assert self._file is not None
        with disk_errors(self.path):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._sha256.update(data)
        self.size += len(data)

    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def commit(self, target: Path) -> None:
        """Makes the part `target`, on disk before in name."""
        assert self._file is not None
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            self.path.replace(target)
            self.notes_path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # some network file systems cannot
                folder = os.open(target.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def discard(self) -> None:
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
            self.notes_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Gives the lock back; the part stays for the next attempt, an empty one does not."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                status = os.fstat(self._file.fileno())
                if status.st_size == 0 and os.path.samestat(status, self.path.stat()):
                    self.path.unlink()
                    self.notes_path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def is_complete(target: Path, sha256: str | None, stop: threading.Event) -> bool:
    """Whether `target` is there and, where a checksum is asked for, has it.

    A file is hashed once: `<name>.sha256-ok` keeps the result for this size and time of change.
    """
    with contextlib.suppress(OSError):
        if not target.is_file():
            return False
        if sha256 is None or _stamp(target, sha256) == _stamp_path(target).read_text():
            return True
    try:
        digest, _ = hash_file(target, stop)
    except OSError:
        return False
    if stop.is_set() or digest.hexdigest() != sha256:
        return False
    stamp(target, digest.hexdigest())
    return True


def stamp(target: Path, sha256: str) -> None:
    """Remembers that `target` as it is now has this checksum; on a read-only volume it is hashed again instead."""
    with contextlib.suppress(OSError):
        _stamp_path(target).write_text(_stamp(target, sha256))


def _stamp_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256-ok")


def _stamp(target: Path, sha256: str) -> str:
    status = target.stat()
    return f"{sha256} {status.st_size} {status.st_mtime_ns}\n"


def hash_file(path: Path, stop: threading.Event) -> tuple[hashlib._Hash, int]:
    """SHA-256 and length; ends early once `stop` is set. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while not stop.is_set() and (block := file.read(_BLOCK)):
            digest.update(block)
            size += len(block)
    return digest, size


def make_room(folder: Path, needed: int, margin: int) -> None:
    """Raises DownloadError unless `needed` bytes fit and leave `margin`."""
    with disk_errors(folder):
        free = shutil.disk_usage(folder).free
    if needed + margin > free:
        raise DownloadError(
            f"the model needs {needed / _GIGABYTE:.2f} GB (and {margin / _GIGABYTE:.2f} GB to spare) but {folder} has "
            f"{free / _GIGABYTE:.2f} GB free; make room there, or set MODELS_DIR to a larger volume"
        )


def safe_name(name: str) -> str:
    """A file name out of one that a stranger chose: no folders, no control characters, and it ends in .gguf."""
    last = "".join(c for c in re.split(r"[/\\]", name)[-1] if c.isprintable())
    stem = re.sub(r"\.gguf$", "", last, flags=re.IGNORECASE).strip(". ")
    return (stem.encode()[:200].decode("utf-8", "ignore").rstrip(". ") or "model") + ".gguf"


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns OSError into DownloadError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"no room is left for {path}; make some, or set MODELS_DIR to a larger volume"
            ) from error
        raise DownloadError(f"{path} cannot be written: {error.strerror}; check the folder's permissions") from error
