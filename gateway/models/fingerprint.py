"""What an answer depends on beside its request: the model's files, its arguments and the program, as they are now.

Blocking: it looks at files. Two fingerprints are equal only if a server started for one would be that of the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gateway import __version__
from gateway.models.gguf.header import GGUFError, shards
from gateway.models.registry import ModelSpec
from gateway.settings import Settings

_BLOCK = 1 << 22
_SPLIT = re.compile("[=,:]")  # adapters, templates, control vectors: whatever of the arguments is a file
Stamp = Callable[[Path], str | None]


def fingerprint(spec: ModelSpec, model: Path, binary: Path, settings: Settings, stamp: Stamp) -> str | None:
    """`model` is the file, `stamp` what tells two states of a file apart; None where one cannot be told yet, or is
    gone."""
    words = [*shlex.split(settings.extra_args), *spec.flags]
    files: list[Path] = [model]
    with contextlib.suppress(GGUFError, OSError):
        files = list(shards(model))
    files += [file for file in (spec.mmproj, spec.chat_template_file) if file is not None]
    files += [file for word in words for part in _SPLIT.split(word) if _is_file(file := Path(part))]
    stamps = []
    for file in (*files, binary):
        told = stamp(file)
        if told is None:
            return None
        stamps.append(told)
    template = spec.prompt_template.jinja() if spec.prompt_template is not None else None
    source = [spec.download_url, spec.sha256, spec.hf]
    arguments = [words, sorted(spec.env), spec.slots, spec.embedding, template, source]
    house = [__version__, settings.ctx, settings.parallel, settings.ngl]
    return _digest([spec.id, stamps, arguments, house])


def as_it_lies(file: Path) -> str | None:
    """By place, size and times. A file's ctime is set by every write and rename, and nobody can set it back.

    Not by its inode: buckets that are mounted as a file system give one file ever new ones.
    """
    try:
        told = file.stat()
    except OSError:
        return None
    return f"{file}:{told.st_size}:{told.st_mtime_ns}:{told.st_ctime_ns}"


class Contents:
    """By what is in it, the same on every machine. Read once for each state of a file, in a thread of its own: until
    that is done there is no stamp."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._asked: set[str] = set()
        self._lock = threading.Lock()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reading models")
        self._closing = False

    def __call__(self, file: Path) -> str | None:
        state = as_it_lies(file)
        if state is None:
            return None
        with self._lock:
            found = self._known.get(state)
            if found is None and state not in self._asked and not self._closing:
                self._asked.add(state)
                self._reader.submit(self._read, file, state)
        return found

    def close(self) -> None:
        self._closing = True
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _read(self, file: Path, state: str) -> None:
        digest: str | None = None
        with contextlib.suppress(OSError):
            digest = self._digested(file)
        with self._lock:
            self._asked.discard(state)
            if digest is not None and as_it_lies(file) == state:
                self._known[state] = digest

    def _digested(self, file: Path) -> str | None:
        digest = hashlib.sha256()
        with file.open("rb") as data:
            while block := data.read(_BLOCK):
                if self._closing:
                    return None
                digest.update(block)
        return digest.hexdigest()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a whole template in an argument is too long for a name
        return False


def _digest(facts: Iterable[object]) -> str:
    return hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()
