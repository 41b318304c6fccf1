"""Grammars on disk: a folder for each, `NAME/1.gbnf`, `NAME/2.gbnf` …, and what is said of them in `NAME/about.json`.

A person may put files in: `NAME/3.gbnf`, or `NAME.gbnf`, which is version 1 where there is no `NAME/1.gbnf`. Everything
here blocks; a file is there whole or not at all. What cannot be read is told and left out, and takes nothing else down.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

MAX_BYTES = 64 * 1024  # of one text
MAX_ALL_BYTES = 64 * 1024 * 1024  # they are held in memory
NAME = re.compile(r"(?!.*\.gbnf\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_VERSION = re.compile(r"([1-9]\d{0,8})\.gbnf", re.ASCII)
_ABOUT = "about.json"

Moment = Annotated[datetime, msgspec.Meta(tz=True)]
Signature = frozenset[tuple[str, int, int, int]]


class Passed(msgspec.Struct, frozen=True):
    """That a text was found good, and by which parser."""

    sha256: str
    created: Moment
    parser: str | None = None


class About(msgspec.Struct, frozen=True):
    """What a grammar's own files do not say."""

    description: str = ""
    created: Moment | None = None
    deleted: Moment | None = None
    last: int = 0  # the highest number that was ever given: none is given twice
    versions: dict[int, Passed] = {}


@dataclass(frozen=True, slots=True)
class Version:
    number: int
    text: str
    created: datetime
    path: Path
    sha256: str
    tested: Passed | None  # None: a person put it there, or changed it


@dataclass(frozen=True, slots=True)
class Grammar:
    name: str
    about: About
    versions: Mapping[int, Version]  # in order; empty where it was deleted

    @property
    def last(self) -> int:
        """The highest number in use so far."""
        return max(self.about.last, *self.versions, 0)


@dataclass(slots=True)
class Reading:
    """All that is in the folder; `problems` has a line for each thing that is not as it should be."""

    grammars: dict[str, Grammar] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    size: int = 0  # bytes of all texts


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def signature(folder: Path) -> Signature:
    """Another one whenever a grammar was added, changed or removed. Raises OSError."""
    try:
        return frozenset(
            (str(path), seen.st_ino, seen.st_size, seen.st_mtime_ns)
            for place in (folder, *_folders(folder))
            for path in place.iterdir()
            if path.suffix == ".gbnf" or path.name == _ABOUT
            for seen in _seen(path)
        )
    except FileNotFoundError:
        return frozenset()


def read_all(folder: Path) -> Reading:
    """Raises OSError where the folder cannot be read; that there is none is no fault."""
    reading = Reading()
    try:
        flat = {path.stem: path for path in folder.glob("*.gbnf") if path.is_file() and path.name[0] != "."}
        folders = {path.name: path for path in _folders(folder)}
    except FileNotFoundError:
        return reading
    for name in sorted(flat.keys() | folders.keys()):
        if not NAME.fullmatch(name):
            reading.problems.append(
                f"{name[:80]!r} is no name for a grammar: use up to 64 letters, digits, '.', '_', '-'"
            )
            continue
        grammar = _read(folder / name, flat.get(name), reading)
        if grammar.versions or grammar.about.last:
            reading.grammars[name] = grammar
    return reading


def add_version(folder: Path, grammar: Grammar, text: str, about: About, tested: Passed) -> int:
    """Writes `text` as the version after the last one, and `about` with it; gives its number. Raises OSError.

    Of two gateways that share the folder the slower one takes the next number.
    """
    place = folder / grammar.name
    place.mkdir(parents=True, exist_ok=True)
    number = grammar.last + 1
    with _temporary(place, text.encode()) as temporary:
        while True:
            target = place / f"{number}.gbnf"
            try:
                target.hardlink_to(temporary)
                break
            except FileExistsError:
                number += 1
            except OSError:  # not every file system has links
                if not target.exists():
                    temporary.replace(target)
                    break
                number += 1
    versions = {**about.versions, number: tested}
    write_about(folder, grammar.name, msgspec.structs.replace(about, last=number, versions=versions, deleted=None))
    return number


def write_about(folder: Path, name: str, about: About) -> None:
    """Raises OSError."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    data = msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n"
    with _temporary(place, data) as temporary:
        temporary.replace(place / _ABOUT)


def remove(folder: Path, grammar: Grammar, number: int | None, now: datetime) -> None:
    """One version, or all. What stays behind is the highest number, so that `name@3` never becomes another text.

    Raises OSError.
    """
    gone = list(grammar.versions) if number is None else [number]
    kept = {each: tested for each, tested in grammar.about.versions.items() if each not in gone}
    left = grammar.versions.keys() - set(gone)
    about = msgspec.structs.replace(
        grammar.about,
        last=grammar.last,
        versions=kept,
        deleted=None if left else now,
        description=grammar.about.description if left else "",
        created=grammar.about.created if left else None,
    )
    for each in gone:
        grammar.versions[each].path.unlink(missing_ok=True)
    write_about(folder, grammar.name, about)


def read_uses(path: Path) -> dict[str, int]:
    """How often each `name@version` was used; empty where that is not known."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=dict[str, int])
    return {}


def add_uses(path: Path, more: Mapping[str, int]) -> dict[str, int]:
    """Adds to what is known, for several gateways may share the file. Raises OSError."""
    uses = read_uses(path)
    for name, count in more.items():
        uses[name] = uses.get(name, 0) + count
    with _temporary(path.parent, msgspec.json.format(msgspec.json.encode(uses), indent=2)) as temporary:
        temporary.replace(path)
    return uses


def _read(place: Path, flat: Path | None, reading: Reading) -> Grammar:
    about = About()
    try:
        about = msgspec.json.decode((place / _ABOUT).read_bytes(), type=About)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, msgspec.DecodeError) as error:
        reading.problems.append(f"{place / _ABOUT} cannot be read, the grammar's texts are used all the same: {error}")
    files: dict[int, Path] = {}
    for path in sorted(place.glob("*.gbnf")) if place.is_dir() else ():
        if found := _VERSION.fullmatch(path.name):
            files[int(found[1])] = path
        elif path.name[0] != ".":
            reading.problems.append(f"{path} is no version: name it 1.gbnf, 2.gbnf …")
    if flat is not None and 1 in files:
        reading.problems.append(f"{flat} is not used, for there is {files[1]}")
    elif flat is not None:
        files[1] = flat
    versions = {}
    for number in sorted(files):
        try:
            versions[number] = _version(number, files[number], about, reading)
        except (OSError, ValueError) as error:
            reading.problems.append(f"{files[number]} cannot be used: {error}")
    return Grammar(place.name, about, versions)


def _version(number: int, path: Path, about: About, reading: Reading) -> Version:
    """Raises OSError, ValueError."""
    seen = path.stat()
    if seen.st_size > MAX_BYTES:
        raise ValueError(f"it has {seen.st_size} bytes: at most {MAX_BYTES} are allowed")
    if reading.size + seen.st_size > MAX_ALL_BYTES:
        raise ValueError(f"all grammars together may have {MAX_ALL_BYTES >> 20} MB")
    text = path.read_bytes().decode("utf-8-sig")
    reading.size += seen.st_size
    sha256 = digest(text)
    tested = about.versions.get(number)
    if tested is not None and tested.sha256 != sha256:
        tested = None
    created = tested.created if tested else datetime.fromtimestamp(seen.st_mtime, UTC)
    return Version(number, text, created, path, sha256, tested)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name[0] != "." and path.is_dir()]


def _seen(path: Path) -> Iterator[os.stat_result]:
    with contextlib.suppress(OSError):  # gone meanwhile
        yield path.stat()


@contextlib.contextmanager
def _temporary(folder: Path, data: bytes) -> Iterator[Path]:
    """A file beside the one that it will become; gone afterwards, unless it has become that."""
    path = folder / f".unfinished-{secrets.token_hex(8)}"
    try:
        with path.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
