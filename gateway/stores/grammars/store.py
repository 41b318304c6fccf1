"""The grammars that requests may name: looked up without waiting, written and tested one after the other.

The folder is the truth (`grammar_files`): what a person or another gateway puts there is found within seconds, and used
when it has passed the test. Until then, and if it fails, the version before it stays in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from gateway.errors import BadRequest, CorralError, GrammarNotFound
from gateway.stores.grammars import files
from gateway.stores.grammars.files import About, Grammar, Passed, Reading, Signature, Version
from gateway.stores.grammars.verdicts import Judge, Verdicts

POLL_SECONDS = 1.0
SAVE_USES_SECONDS = 30.0
MAX_DESCRIPTION = 1024
_TOLD_NAMES = 20

log = logging.getLogger("corral.grammars")
T = TypeVar("T")


class Grammars:
    """Made by `open_grammars`. Belongs to the event loop's thread."""

    def __init__(self, folder: Path, judge: Judge, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._folder, self._now = folder, now
        self._verdicts = Verdicts(judge)
        self._reading = Reading()
        self._signature: Signature = frozenset()
        self._texts: dict[str, tuple[str, str]] = {}  # by `name` and `name@3`: the text, and what it is counted as
        self._uses: Counter[str] = Counter()
        self._unsaved: Counter[str] = Counter()
        self._writing, self._testing = asyncio.Lock(), asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._told: list[str] = []

    # --- looking up

    def text(self, name: str) -> str:
        """Of `name` or `name@3`, and counts a use. Raises GrammarNotFound."""
        found = self._texts.get(name)
        if found is None:
            raise GrammarNotFound(self._why_not(name), param="grammar")
        self._uses[found[1]] += 1
        self._unsaved[found[1]] += 1
        return found[0]

    def names(self) -> list[str]:
        return [name for name in self._texts if "@" not in name]

    def current(self, name: str) -> tuple[Grammar, Version]:
        """The version in use of `name`, or the one that is asked for by `name@3`. Raises GrammarNotFound."""
        found = self._texts.get(name)
        if found is None:
            raise GrammarNotFound(self._why_not(name))
        base, _, number = found[1].rpartition("@")
        grammar = self._reading.grammars[base]
        return grammar, grammar.versions[int(number)]

    def usable(self, grammar: Grammar) -> list[Version]:
        return [version for version in grammar.versions.values() if self._verdicts.is_good(version)]

    def uses(self, name: str, number: int | None = None) -> int:
        """Of a version or of all, those that are gone included."""
        if number is not None:
            return self._uses[f"{name}@{number}"]
        return sum(count for each, count in self._uses.items() if each.rpartition("@")[0] == name)

    @property
    def problems(self) -> list[str]:
        """A line for each thing in the folder that is not used."""
        return self._reading.problems + [
            f"{version.path} is not used: {why}"
            for _, version in self._all()
            if (why := self._verdicts.complaint(version))
        ]

    def _why_not(self, name: str) -> str:
        base, _, number = name.partition("@")
        grammar = self._reading.grammars.get(base)
        versions = grammar.versions if grammar is not None else {}
        numbers = {str(each): version for each, version in versions.items()}
        asked = numbers.get(number) if "@" in name or not versions else versions[max(versions)]
        if asked is not None:
            return f"the grammar {name} is not used: {self._verdicts.complaint(asked) or 'it is being tested'}"
        if versions:
            return f"there is no version {number[:16]!r} of the grammar {base}; there are: {', '.join(numbers)}"
        there = ", ".join(self.names()[:_TOLD_NAMES]) or "none"
        return f"there is no grammar named {name[:80]!r}; there are: {there}"

    def _all(self) -> Iterator[tuple[Grammar, Version]]:
        for grammar in self._reading.grammars.values():
            for version in grammar.versions.values():
                yield grammar, version

    # --- writing

    async def write(self, name: str, text: str, description: str | None, *, new: bool) -> tuple[Grammar, Version]:
        """One more version. Without `new` there must be a grammar of that name. `description` None: as it is.

        Raises BadRequest, GrammarNotFound, and CorralError where it cannot be tested or written.
        """
        _check(name, text, description)
        if not new:
            self._named(name)
        tested = await self._verdicts.accept(text, files.digest(text), self._now())

        def work() -> int:
            reading = files.read_all(self._folder)
            size = len(text.encode())
            if reading.size + size > files.MAX_ALL_BYTES:
                raise BadRequest(f"all grammars together may have {files.MAX_ALL_BYTES >> 20} MB: delete some first")
            grammar = reading.grammars.get(name) or Grammar(name, About(), {})
            about = msgspec.structs.replace(
                grammar.about,
                description=grammar.about.description if description is None else description,
                created=grammar.about.created or tested.created,
            )
            return files.add_version(self._folder, grammar, text, about, tested)

        number = await self._alone(work)
        return self.current(f"{name}@{number}")

    async def delete(self, name: str) -> None:
        """`name` and all its versions, or `name@3` alone. Raises GrammarNotFound, CorralError."""
        base, _, number = name.partition("@")
        self._named(name)

        def work() -> None:
            grammar = files.read_all(self._folder).grammars.get(base)
            if grammar is not None:  # else somebody else was faster
                files.remove(self._folder, grammar, int(number) if number else None, self._now())

        await self._alone(work)

    def _named(self, name: str) -> None:
        """Also of what is not used. Raises GrammarNotFound."""
        base, _, number = name.partition("@")
        grammar = self._reading.grammars.get(base)
        versions = [str(each) for each in grammar.versions] if grammar is not None else []
        if not versions or ("@" in name and number not in versions):
            raise GrammarNotFound(self._why_not(name))

    async def _alone(self, work: Callable[[], T]) -> T:
        """Runs to its end, also if nobody waits for it any more. Raises CorralError."""

        async def run() -> T:
            async with self._writing:
                try:
                    result = await asyncio.to_thread(work)
                except OSError as error:
                    where = f"{self._folder}: {error.strerror or error}"
                    raise CorralError(f"the grammars cannot be written in {where}") from None
                self._take(*await asyncio.to_thread(self._read))
                return result

        return await asyncio.shield(self._task(run()))

    def _task(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name="grammars-write")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- following the folder

    async def load(self) -> None:
        """Reads the folder; what is new there is not tested yet."""
        async with self._writing:
            if not self._uses:
                self._uses.update(await asyncio.to_thread(files.read_uses, self._folder / "uses.json"))
            self._take(*await asyncio.to_thread(self._read))

    async def reload(self) -> None:
        """Reads the folder and tests what is new there."""
        await self.load()
        await self._test_new()

    async def follow(self) -> None:
        """Until cancelled. A change is taken on the second look that finds it the same: it may be half written."""
        seen, saved_at = self._signature, time.monotonic()
        while True:
            await asyncio.sleep(POLL_SECONDS)
            before, seen = seen, await asyncio.to_thread(self._sign)
            if seen != self._signature and seen == before:
                await self.load()
            await self._test_new()
            if self._unsaved and time.monotonic() - saved_at > SAVE_USES_SECONDS:
                saved_at = time.monotonic()
                await self.save_uses()

    async def save_uses(self) -> None:
        """Where that is not possible, they are kept in memory."""
        unsaved, self._unsaved = self._unsaved, Counter()
        if not unsaved:
            return
        try:
            self._uses = Counter(await asyncio.to_thread(files.add_uses, self._folder / "uses.json", unsaved))
            self._uses.update(self._unsaved)
        except OSError:
            self._unsaved.update(unsaved)

    async def close(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.save_uses()

    def _sign(self) -> Signature:
        try:
            return files.signature(self._folder)
        except OSError:
            return self._signature

    def _read(self) -> tuple[Signature, Reading]:
        """Blocking. A folder that cannot be read leaves what was read before in use."""
        signature = self._sign()  # first: what changes meanwhile is looked at again
        try:
            return signature, files.read_all(self._folder)
        except OSError as error:
            problem = f"{self._folder} cannot be read: {error.strerror or error}"
            return signature, Reading(self._reading.grammars, [problem], self._reading.size)

    def _take(self, signature: Signature, reading: Reading) -> None:
        self._signature, self._reading = signature, reading
        self._rebuild()

    def _rebuild(self) -> None:
        self._texts = {}
        for grammar in self._reading.grammars.values():
            for version in self.usable(grammar):  # in order: the last one stays
                counted = f"{grammar.name}@{version.number}"
                self._texts[grammar.name] = self._texts[counted] = version.text, counted
        problems = self.problems
        for problem in problems:
            if problem not in self._told:
                log.warning("%s", problem)
        self._told = problems

    async def _test_new(self) -> None:
        async with self._testing:
            identity = self._verdicts.judge.identity()
            for grammar, version in list(self._all()):
                if not self._verdicts.is_due(version, identity):
                    continue
                tested = await self._verdicts.look_at(version, identity)
                if tested is not None:
                    await self._note(grammar.name, version, tested)
                self._rebuild()

    async def _note(self, name: str, version: Version, tested: Passed) -> None:
        """So that it need not be tested at the next start; where that cannot be written, it will be."""

        def work() -> None:
            grammar = files.read_all(self._folder).grammars.get(name)
            if grammar is None or version.number not in grammar.versions:
                return
            about = grammar.about
            versions = {**about.versions, version.number: tested}
            created = about.created or version.created
            about = msgspec.structs.replace(about, versions=versions, last=grammar.last, created=created, deleted=None)
            files.write_about(self._folder, name, about)

        with contextlib.suppress(CorralError):
            await self._alone(work)


@contextlib.asynccontextmanager
async def open_grammars(folder: Path, judge: Judge) -> AsyncIterator[Grammars]:
    """Read when it begins, followed until it ends."""
    grammars = Grammars(folder, judge)
    await grammars.load()
    task = asyncio.create_task(_following(grammars), name="grammars")
    try:
        yield grammars
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await grammars.close()


async def _following(grammars: Grammars) -> None:
    while True:
        try:
            await grammars.follow()
        except Exception:
            log.exception("following the grammars failed; what is loaded stays in force, and it is tried again")


def _check(name: str, text: str, description: str | None) -> None:
    """Raises BadRequest."""
    if not files.NAME.fullmatch(name):
        allowed = "1 to 64 letters, digits, '.', '_' or '-', the first one a letter or digit, and no .gbnf at the end"
        raise BadRequest(f"name is {name[:80]!r}: must be {allowed}", param="name")
    if description is not None and len(description) > MAX_DESCRIPTION:
        raise BadRequest(f"description may have {MAX_DESCRIPTION} characters at most", param="description")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise BadRequest("content holds half a surrogate pair", param="content") from None
    if size > files.MAX_BYTES:
        raise BadRequest(f"content has {size} bytes: at most {files.MAX_BYTES} are allowed", param="content")
