"""What was found out about grammars since the start: which texts may be used, and why others may not."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from gateway.errors import BadRequest, CorralError
from gateway.stores.grammars.files import Passed, Version

RETRY_SECONDS = 60.0  # for a test that could not be made


class Judge(Protocol):
    """Tells good grammars from bad ones."""

    def identity(self) -> str | None:
        """Another one when its verdicts may be others than before."""

    async def test(self, text: str) -> None:
        """Raises BadRequest for a grammar that must not be used, CorralError where it could not be tested."""


class Verdicts:
    """By a text's digest, each with the identity of the judge who gave it."""

    def __init__(self, judge: Judge, clock: Callable[[], float] = time.monotonic) -> None:
        self.judge = judge
        self._clock = clock
        self._good: dict[str, str | None] = {}
        self._bad: dict[str, tuple[str | None, str]] = {}
        self._unknown: dict[str, tuple[float, str]] = {}  # when it was tried, and what prevented it

    def is_good(self, version: Version) -> bool:
        """What passed another judge's test stays good until this one has refused it."""
        sha256 = version.sha256
        return sha256 not in self._bad and (version.tested is not None or sha256 in self._good)

    def complaint(self, version: Version) -> str | None:
        """Why it is not used, as far as that is known."""
        sha256 = version.sha256
        if sha256 in self._bad:
            return self._bad[sha256][1]
        return self._unknown[sha256][1] if sha256 in self._unknown and not self.is_good(version) else None

    def is_due(self, version: Version, identity: str | None) -> bool:
        """Whether the judge of that identity must still be asked."""
        sha256, nobody = version.sha256, ""
        judges = (
            version.tested.parser if version.tested is not None else nobody,
            self._good.get(sha256, nobody),
            self._bad.get(sha256, (nobody,))[0],
        )
        tried_at = self._unknown[sha256][0] if sha256 in self._unknown else None
        return identity not in judges and (tried_at is None or self._clock() - tried_at >= RETRY_SECONDS)

    async def accept(self, text: str, sha256: str, created: datetime) -> Passed:
        """Raises BadRequest, CorralError."""
        await self.judge.test(text)
        identity = self.judge.identity()
        self._good[sha256] = identity
        self._bad.pop(sha256, None)
        return Passed(sha256, created, identity)

    async def look_at(self, version: Version, identity: str | None) -> Passed | None:
        """None for one that did not pass; what is known of it says why."""
        try:
            return await self.accept(version.text, version.sha256, version.created)
        except BadRequest as error:
            self._good.pop(version.sha256, None)
            self._bad[version.sha256] = identity, error.message
        except CorralError as error:
            self._unknown[version.sha256] = self._clock(), error.message
        return None
