"""The store of grammars: look-up, writing, what people put into the folder, tests that fail or cannot be made."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import BadRequest, CorralError, GrammarNotFound
from gateway.stores.grammars import files, store, verdicts
from gateway.stores.grammars.store import Grammars, open_grammars
from tests.house import soon

ONE, TWO, BAD, ODD = 'root ::= "1"', 'root ::= "2"', "bad ::=", "odd ::="


class Judge:
    """Refuses BAD, cannot test ODD, and can be told to take its time."""

    def __init__(self, identity: str | None = "judge") -> None:
        self.who = identity
        self.refused = {BAD}
        self.asked: list[str] = []
        self.go = asyncio.Event()
        self.go.set()

    def identity(self) -> str | None:
        return self.who

    async def test(self, text: str) -> None:
        self.asked.append(text)
        await self.go.wait()
        if text in self.refused:
            raise BadRequest("it is bad", param="content")
        if text == ODD:
            raise CorralError("nobody knows")


@contextlib.asynccontextmanager
async def opened(folder: Path, judge: Judge | None = None) -> AsyncIterator[Grammars]:
    async with open_grammars(folder, judge or Judge()) as grammars:
        yield grammars


def there(grammars: Grammars, name: str) -> bool:
    with contextlib.suppress(GrammarNotFound):
        grammars.current(name)
        return True
    return False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "POLL_SECONDS", 0.01)


async def test_a_name_is_its_newest_version(tmp_path: Path) -> None:
    async with opened(tmp_path) as grammars:
        grammar, version = await grammars.write("json", ONE, "first", new=True)
        assert (grammar.about.description, version.number) == ("first", 1)
        grammar, version = await grammars.write("json", TWO, None, new=False)
        assert (grammar.about.description, version.number) == ("first", 2)
        assert [grammars.text(name) for name in ("json", "json@1", "json@2")] == [TWO, ONE, TWO]
        assert (await grammars.write("json", ONE, "third", new=True))[1].number == 3
        assert grammars.names() == ["json"]


@pytest.mark.parametrize(
    "name", ["nope", "json@2", "json@", "json@x", "json@01", "json@1@1", "@", "", "../json", "x" * 999]
)
async def test_what_is_not_there_is_not_found(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as grammars:
        await grammars.write("json", ONE, None, new=True)
        for look in (grammars.text, grammars.current):
            with pytest.raises(GrammarNotFound):
                look(name)
        with pytest.raises(GrammarNotFound):
            await grammars.delete(name)
        assert grammars.text("json") == ONE


@pytest.mark.parametrize(
    ("name", "text", "description", "param"),
    [
        ("", ONE, None, "name"),
        ("-x", ONE, None, "name"),
        ("a/b", ONE, None, "name"),
        ("a@1", ONE, None, "name"),
        ("..", ONE, None, "name"),
        ("json.gbnf", ONE, None, "name"),
        ("jsön", ONE, None, "name"),
        ("a\n", ONE, None, "name"),
        ("x" * 65, ONE, None, "name"),
        ("x", ONE, "d" * 1025, "description"),
        ("x", "#" * (files.MAX_BYTES + 1), None, "content"),
        ("x", '"\ud800"', None, "content"),
        ("x", BAD, None, "content"),
    ],
)
async def test_what_is_refused_is_not_written(
    tmp_path: Path, name: str, text: str, description: str | None, param: str
) -> None:
    async with opened(tmp_path) as grammars:
        with pytest.raises(BadRequest) as caught:
            await grammars.write(name, text, description, new=True)
        assert caught.value.param == param
    assert files.read_all(tmp_path) == files.Reading()


@pytest.mark.parametrize("name", ["a", "Z9", "a.b-c_d", "x" * 64, "gbnf", "1"])
async def test_good_names(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as grammars:
        await grammars.write(name, ONE, None, new=True)
        assert grammars.text(name) == ONE


async def test_a_version_and_all_of_them_can_go(tmp_path: Path) -> None:
    async with opened(tmp_path) as grammars:
        for text in (ONE, TWO, ONE):
            await grammars.write("json", text, None, new=True)
        await grammars.delete("json@3")
        assert grammars.text("json") == TWO
        await grammars.delete("json")
        with pytest.raises(GrammarNotFound):
            grammars.text("json@1")
        with pytest.raises(GrammarNotFound):
            await grammars.write("json", ONE, None, new=False)
        assert (await grammars.write("json", ONE, None, new=True))[1].number == 4


async def test_another_start_finds_all_of_it_and_tests_nothing_again(tmp_path: Path) -> None:
    async with opened(tmp_path) as grammars:
        await grammars.write("json", ONE, "d", new=True)
        grammars.text("json")
        grammars.text("json@1")
    judge = Judge()
    async with opened(tmp_path, judge) as grammars:
        assert (grammars.text("json"), grammars.uses("json"), grammars.uses("json", 1)) == (ONE, 3, 3)
        await grammars.reload()
    assert judge.asked == []


async def test_what_a_person_puts_there_is_used_when_it_has_passed(tmp_path: Path) -> None:
    judge = Judge()
    async with opened(tmp_path, judge) as grammars:
        await grammars.write("json", ONE, None, new=True)
        judge.go.clear()
        (tmp_path / "json/2.gbnf").write_text(TWO)
        await soon(lambda: judge.asked == [ONE, TWO])
        assert grammars.text("json") == ONE
        with pytest.raises(GrammarNotFound, match="is being tested"):
            grammars.text("json@2")
        judge.go.set()
        await soon(lambda: there(grammars, "json@2"))
        assert grammars.text("json") == TWO
    async with opened(tmp_path, judge) as grammars:
        assert grammars.text("json") == TWO
        await grammars.reload()
    assert judge.asked == [ONE, TWO], "that it has passed is written down"


async def test_what_is_bad_is_told_and_skipped(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json/1.gbnf").write_text(ONE)
    (tmp_path / "json/2.gbnf").write_text(BAD)
    (tmp_path / "flat.gbnf").write_text(BAD)
    async with opened(tmp_path) as grammars:
        await grammars.reload()
        assert grammars.text("json") == ONE
        assert [line.removeprefix(f"{tmp_path}/") for line in grammars.problems] == [
            "flat.gbnf is not used: it is bad",
            "json/2.gbnf is not used: it is bad",
        ]
        with pytest.raises(GrammarNotFound, match="is not used: it is bad"):
            grammars.text("flat")
        await grammars.delete("flat")
        assert not (tmp_path / "flat.gbnf").exists()
        (tmp_path / "json/2.gbnf").write_text(TWO)
        await soon(lambda: grammars.problems == [])
        await soon(lambda: there(grammars, "json@2"))


async def test_what_could_not_be_tested_is_not_used_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd.gbnf").write_text(ODD)
    judge = Judge()
    async with opened(tmp_path, judge) as grammars:
        with pytest.raises(CorralError, match="nobody knows"):
            await grammars.write("x", ODD, None, new=True)
        await grammars.reload()
        asked = len(judge.asked)
        await grammars.reload()
        assert len(judge.asked) == asked, "not at every look"
        with pytest.raises(GrammarNotFound, match="nobody knows"):
            grammars.text("odd")
        monkeypatch.setattr(verdicts, "RETRY_SECONDS", 0.0)
        await soon(lambda: len(judge.asked) > asked)


async def test_another_parser_tests_all_again_and_what_it_refuses_goes(tmp_path: Path) -> None:
    async with opened(tmp_path, Judge("old")) as grammars:
        await grammars.write("a", ONE, None, new=True)
        await grammars.write("b", TWO, None, new=True)
    judge = Judge("new")
    judge.refused.add(ONE)
    judge.go.clear()
    async with opened(tmp_path, judge) as grammars:
        await soon(lambda: bool(judge.asked))
        assert (grammars.text("a"), grammars.text("b")) == (ONE, TWO), "in use until the test says otherwise"
        judge.go.set()
        await soon(lambda: grammars.names() == ["b"])
        await grammars.reload()
    assert sorted(judge.asked) == [ONE, TWO]


async def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes on, uses are counted in memory, and what a person put there is used all the same."""
    (tmp_path / "flat.gbnf").write_text(ONE)

    read = Path.open

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def only_read(path: Path, mode: str = "r", *given: Any) -> Any:
        return read(path, mode, *given) if mode.startswith("r") else refuse()

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "open", only_read)
    monkeypatch.setattr(Path, "unlink", refuse)
    async with opened(tmp_path) as grammars:
        await grammars.reload()
        assert grammars.text("flat") == ONE
        for attempt in (grammars.write("x", TWO, None, new=True), grammars.delete("flat")):
            with pytest.raises(CorralError, match=r"cannot be written in .*: Read-only file system") as caught:
                await attempt
            assert (caught.value.status, caught.value.code) == (500, "internal_error")
        await grammars.save_uses()
        assert (grammars.text("flat"), grammars.uses("flat")) == (ONE, 2)


async def test_a_folder_that_goes_away_and_one_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path) as grammars:
        await grammars.write("json", ONE, None, new=True)

        def refuse(_: Path) -> None:
            raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as sick:
            sick.setattr(files, "read_all", refuse)
            await grammars.reload()
            assert grammars.text("json") == ONE
            assert grammars.problems == [f"{tmp_path} cannot be read: Input/output error"]
        (tmp_path / "json/1.gbnf").unlink()
        await soon(lambda: grammars.names() == [])


async def test_a_client_that_leaves_does_not_stop_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, begun, go = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    add = files.add_version

    def slowly(*given: object) -> int:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return add(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "add_version", slowly)
    async with opened(tmp_path) as grammars:
        task = asyncio.create_task(grammars.write("json", ONE, None, new=True))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        await soon(lambda: grammars.names() == ["json"])
        assert grammars.text("json") == ONE


async def test_writes_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    async with opened(tmp_path) as grammars:
        made = await asyncio.gather(*(grammars.write("json", f"{n} ::=", None, new=True) for n in range(20)))
        assert sorted(version.number for _, version in made) == list(range(1, 21))
        assert all(grammars.text(f"json@{version.number}") == version.text for _, version in made)


async def test_two_gateways_share_a_folder(tmp_path: Path) -> None:
    async with opened(tmp_path) as one, opened(tmp_path, Judge("other build")) as two:
        await one.write("json", ONE, None, new=True)
        await soon(lambda: two.names() == ["json"])
        assert (await two.write("json", TWO, None, new=False))[1].number == 2
        await soon(lambda: there(one, "json@2"))
        one.text("json")
        two.text("json")
        await one.save_uses()
        await two.save_uses()
        assert two.uses("json", 2) == 2
