"""Grammars on disk: what is found, what is left out and told, what writing leaves behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from gateway.stores.grammars import files
from gateway.stores.grammars.files import About, Grammar, Passed

MADE, GONE = (datetime(2026, month, 1, tzinfo=UTC) for month in (1, 2))
TEXT = 'root ::= "a"\n'


def put(folder: Path, path: str, text: str | bytes = TEXT) -> None:
    target = folder / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode() if isinstance(text, str) else text)


def write(folder: Path, name: str, text: str = TEXT, *, description: str = "") -> int:
    grammar = files.read_all(folder).grammars.get(name) or Grammar(name, About(), {})
    about = msgspec.structs.replace(grammar.about, description=description)
    return files.add_version(folder, grammar, text, about, Passed(files.digest(text), MADE, "p"))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_no_folder_is_no_grammar(tmp_path: Path) -> None:
    assert files.read_all(tmp_path / "none") == files.Reading()
    assert files.signature(tmp_path / "none") == frozenset()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert write(tmp_path, "json", "one ::=", description="d") == 1
    assert write(tmp_path, "json", "two ::=", description="d") == 2
    assert names(tmp_path) == ["json/1.gbnf", "json/2.gbnf", "json/about.json"]
    reading = files.read_all(tmp_path)
    versions = reading.grammars["json"].versions
    assert [(number, each.text, each.created) for number, each in versions.items()] == [
        (1, "one ::=", MADE),
        (2, "two ::=", MADE),
    ]
    assert all(each.tested is not None for each in versions.values())
    assert (reading.grammars["json"].about.description, reading.problems) == ("d", [])


def test_what_a_person_puts_there_is_found_and_counts_as_untested(tmp_path: Path) -> None:
    write(tmp_path, "json")
    put(tmp_path, "json/7.gbnf", "seven ::=")
    put(tmp_path, "flat.gbnf", b"\xef\xbb\xbf" + TEXT.encode())
    put(tmp_path, "README.md")
    put(tmp_path, ".hidden.gbnf")
    put(tmp_path, ".git/1.gbnf")
    reading = files.read_all(tmp_path)
    assert reading.problems == []
    found = {name: list(grammar.versions) for name, grammar in reading.grammars.items()}
    assert found == {"flat": [1], "json": [1, 7]}
    assert reading.grammars["json"].versions[7].tested is None
    assert reading.grammars["flat"].versions[1].text == TEXT
    assert write(tmp_path, "json") == 8


def test_a_changed_text_is_untested(tmp_path: Path) -> None:
    write(tmp_path, "json")
    put(tmp_path, "json/1.gbnf", "other ::=")
    version = files.read_all(tmp_path).grammars["json"].versions[1]
    assert (version.text, version.tested) == ("other ::=", None)


@pytest.mark.parametrize(
    ("path", "content", "told"),
    [
        ("-x.gbnf", TEXT, "no name"),
        ("a b/1.gbnf", TEXT, "no name"),
        ("x" * 65 + "/1.gbnf", TEXT, "no name"),
        ("bad/one.gbnf", TEXT, "no version"),
        ("bad/01.gbnf", TEXT, "no version"),
        ("bad/1.gbnf", b"\xff\xfe", "cannot be used"),
        ("bad/1.gbnf", "x" * (files.MAX_BYTES + 1), "at most 65536"),
        ("good.gbnf", TEXT, "is not used, for there is"),
        ("good/about.json", "{", "cannot be read"),
        ("good/about.json", '{"last": "x"}', "cannot be read"),
        ("good/about.json", '{"created": "2026-01-01T00:00:00"}', "cannot be read"),
    ],
)
def test_what_is_broken_is_told_and_takes_nothing_else_down(
    tmp_path: Path, path: str, content: str | bytes, told: str
) -> None:
    put(tmp_path, "good/1.gbnf")
    put(tmp_path, path, content)
    reading = files.read_all(tmp_path)
    assert [line for line in reading.problems if told in line] == reading.problems
    assert len(reading.problems) == 1
    assert [name for name, grammar in reading.grammars.items() if grammar.versions] == ["good"]


def test_all_texts_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ALL_BYTES", len(TEXT))
    put(tmp_path, "a.gbnf")
    put(tmp_path, "b.gbnf")
    reading = files.read_all(tmp_path)
    assert list(reading.grammars) == ["a"]
    assert "together" in reading.problems[0]


def test_a_number_is_never_given_twice(tmp_path: Path) -> None:
    write(tmp_path, "json", description="old")
    write(tmp_path, "json")
    files.remove(tmp_path, files.read_all(tmp_path).grammars["json"], 2, GONE)
    assert files.read_all(tmp_path).grammars["json"].about.deleted is None
    assert write(tmp_path, "json") == 3
    files.remove(tmp_path, files.read_all(tmp_path).grammars["json"], None, GONE)
    gone = files.read_all(tmp_path).grammars["json"]
    assert (dict(gone.versions), gone.about) == ({}, About(deleted=GONE, last=3))
    assert names(tmp_path) == ["json/about.json"]
    assert write(tmp_path, "json") == 4


def test_a_flat_file_gets_more_versions_beside_it_and_can_be_removed(tmp_path: Path) -> None:
    put(tmp_path, "flat.gbnf")
    assert write(tmp_path, "flat", "two ::=") == 2
    grammar = files.read_all(tmp_path).grammars["flat"]
    assert [each.text for each in grammar.versions.values()] == [TEXT, "two ::="]
    files.remove(tmp_path, grammar, 1, GONE)
    assert names(tmp_path) == ["flat/2.gbnf", "flat/about.json"]


def test_two_gateways_do_not_overwrite_each_other(tmp_path: Path) -> None:
    before = Grammar("json", About(), {})
    numbers = [
        files.add_version(tmp_path, before, text, About(), Passed(files.digest(text), MADE)) for text in ("a", "b")
    ]
    assert numbers == [1, 2]
    assert [(tmp_path / f"json/{number}.gbnf").read_text() for number in numbers] == ["a", "b"]


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert [write(tmp_path, "json"), write(tmp_path, "json")] == [1, 2]
    put(tmp_path, "json/3.gbnf", "somebody's ::=")
    stale = Grammar("json", About(last=2), {})
    assert files.add_version(tmp_path, stale, TEXT, About(), Passed("", MADE)) == 4
    assert (tmp_path / "json/3.gbnf").read_text() == "somebody's ::="


CHANGES: list[Callable[[Path], object]] = [
    lambda folder: put(folder, "new.gbnf"),
    lambda folder: put(folder, "json/2.gbnf"),
    lambda folder: put(folder, "json/1.gbnf", "longer than before ::="),
    lambda folder: os.utime(folder / "json/1.gbnf", (1, 1)),
    lambda folder: (folder / "json/1.gbnf").unlink(),
    lambda folder: put(folder, "json/about.json", '{"description": "new"}'),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(tmp_path: Path, change: Callable[[Path], object]) -> None:
    write(tmp_path, "json")
    put(tmp_path, "uses.json", "{}")
    before = files.signature(tmp_path)
    put(tmp_path, "uses.json", '{"json@1": 1}')
    assert files.signature(tmp_path) == before
    change(tmp_path)
    assert files.signature(tmp_path) != before


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "json")
    before = names(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, "json", "two ::=")
    assert names(tmp_path) == before


def test_uses_add_up_and_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "uses.json"
    assert files.read_uses(path) == {}
    files.add_uses(path, {"json@1": 2})
    assert files.add_uses(path, {"json@1": 1, "x@1": 1}) == {"json@1": 3, "x@1": 1}
    path.write_text("[")
    assert files.read_uses(path) == {}
