"""The live keys: who is behind a secret, decided by one dictionary look-up after its first use; follows the file."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.errors import ExpiredKey, InvalidKey, MissingKey, RateLimitExceeded
from gateway.stores.keys import io as keyio
from gateway.stores.keys.failures import Failures, source
from gateway.stores.keys.file import SCOPES, Key, Priority, format_time
from gateway.stores.keys.table import Table, keyed
from gateway.stores.keys.verify import Verifier

__all__ = ["SCOPES", "Key", "KeyRing", "Priority", "ReloadReport", "RingView", "presented"]

POLL_SECONDS = 0.5
SETTLE_SECONDS = 0.25
# A file that changes all the time (keys made in a loop) is read after as many looks, or nobody would see the first key.
MAX_LOOKS = 3
# An empty file is believed after as many looks, 1.2 s: some tools truncate well before they write.
EMPTY_LOOKS = 5
LOCK_SECONDS = 1.0
# A younger change may be followed by one with the same time stamp: ticks are 4 ms, on some disks 2 s.
FRESH_SECONDS = 3.0

log = logging.getLogger(__name__)


def presented(authorization: str | None, x_api_key: str | None) -> str | None:
    """The secret a request carries: `Authorization: Bearer KEY` or bare `KEY`, else `x-api-key: KEY`."""
    words = (authorization or "").split(None, 1)
    if len(words) == 2 and words[0].lower() == "bearer":
        return words[1].strip()
    if len(words) == 1 and words[0].lower() != "bearer":
        return words[0]
    return (x_api_key or "").strip() or None


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reading of the keys gave; no problem ever contains a secret."""

    loaded: int
    problems: list[str]


@dataclass(frozen=True, slots=True)
class RingView:
    """What /health may tell about the keys."""

    keys: int
    usable: bool


@dataclass(frozen=True, slots=True)
class _Reading:
    """What was last seen of the file; where it could not be read, `content` stays that of the last good reading."""

    at: float
    signature: keyio.Signature | None = None
    content: bytes | None = None  # a digest; None: never read
    error: str | None = None
    table: Table | None = None  # None: as before


@dataclass(frozen=True, slots=True)
class _Unsettled:
    """A change that was noticed, on how many looks the file had changed yet again, and on how many it was empty."""

    signature: keyio.Signature
    looks: int = 1
    empty: int = 0


class KeyRing:
    """The keys of `path` and of `API_KEY` (`env`), loaded when made; `watching()` keeps them as the file is.

    Belongs to the event loop's thread. Only failures are throttled, per address: a right key works from anywhere,
    whatever that address did. One that was never used, and whose hash is dear, may have to wait for its turn.
    """

    def __init__(
        self,
        path: Path | None,
        env: str | None = None,
        *,
        now: Callable[[], float] = time.time,
        failures: Failures | None = None,
    ) -> None:
        self._path = path
        self._env = [secret.strip() for secret in (env or "").split(",") if secret.strip()]
        self._now = now
        self._failures = Failures() if failures is None else failures
        self._boot_key = secrets.token_bytes(32)
        self._callbacks: list[Callable[[ReloadReport], None]] = []
        self._verifier = Verifier(lambda address: self._failures.wait(address, self._now()) > 0)
        self._unsettled: _Unsettled | None = None
        self._table = Table.build(self._boot_key, path, b"", self._env)
        self._reading = _Reading(at=now())
        self._take(self._read(self._reading, LOCK_SECONDS))

    # Who is it

    def lookup(self, secret: str) -> Key | None:
        """The key behind a secret that was used before (or stands in plain text), if it has not expired. About 1 µs."""
        key = self._table.fast.get(keyed(self._boot_key, secret))
        if key is None or (key.expires is not None and key.expires <= self._now()):
            return None
        return key

    async def authenticate(self, secret: str | None, address: str, now: float | None = None) -> Key:
        """The key behind a secret. Raises MissingKey, InvalidKey, ExpiredKey, and RateLimitExceeded: for a wrong one
        after too many failures from this address, or where too many wait for a slow hash."""
        if not secret:
            raise MissingKey("no API key was sent; send Authorization: Bearer KEY, or x-api-key: KEY")
        digest = keyed(self._boot_key, secret)
        while True:
            table = self._table
            key = table.fast.get(digest) or table.recognise(digest, secret)
            if key is None and not table.hopeless(digest, secret):
                stored = await self._verifier.verify(table, digest, secret, source(address))
                key = table.slow[stored] if stored is not None else None
            if table is self._table:  # else the keys changed while the hash was computed
                break
        at = self._now() if now is None else now
        if key is None:
            wait = self._failures.charge(address, at)
            if wait:
                raise RateLimitExceeded(
                    f"too many wrong API keys from {address}; try again in {max(1, round(wait))} s", retry_after=wait
                )
            raise InvalidKey("this API key is not known here; check it, or ask the operator for one")
        if key.expires is not None and key.expired(at):
            raise ExpiredKey(
                f"API key '{key.id}' expired on {format_time(key.expires)}; ask the operator for a new one"
            )
        return key

    def by_id(self, key_id: str) -> Key | None:
        """The last one of that id that has not expired: whose limits count where no secret is sent (NATS_KEY_ID)."""
        now = self._now()
        return next((key for key in reversed(self._table.keys) if key.id == key_id and not key.expired(now)), None)

    def knows(self, key_id: str) -> bool:
        """Whether there is a key of that id, be it expired."""
        return any(key.id == key_id for key in self._table.keys)

    @property
    def usable(self) -> bool:
        now = self._now()
        return any(not key.expired(now) for key in self._table.keys)

    def view(self) -> RingView:
        return RingView(keys=len(self._table.keys), usable=self.usable)

    # Following the file

    @property
    def report(self) -> ReloadReport:
        """The last reading, the first one included."""
        error = [self._reading.error] if self._reading.error else []
        return ReloadReport(len(self._table.keys), error + self._table.problems)

    def subscribe(self, callback: Callable[[ReloadReport], None]) -> None:
        """`callback` hears of every reload, and of a file that has become unreadable."""
        self._callbacks.append(callback)

    def reload(self) -> ReloadReport:
        """Reads the file now, changed or not (SIGHUP, POST /reload)."""
        return self._take(self._read(self._reading, wait=0.1))

    def poll(self) -> ReloadReport | None:
        """One look at the file. A change is taken on the second look that finds it the same, so that a file which
        someone is just writing, without our lock, does not revoke every key for a moment."""
        return self._follow(self._reading, self._look(self._reading, self._unsettled))

    async def watch(self) -> None:
        """Polls until cancelled; a change is in force after 0.3 to 1.5 s. Looks from a thread: network disks hang."""
        while True:
            await asyncio.sleep(SETTLE_SECONDS if self._unsettled else POLL_SECONDS)
            try:
                base = self._reading
                self._follow(base, await asyncio.to_thread(self._look, base, self._unsettled))
            except Exception:
                log.exception("following the keys file failed; the loaded keys stay in force, and it is tried again")

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[KeyRing]:
        """Follows the file inside the block; after it, no more slow hashes are computed."""
        task = asyncio.create_task(self.watch(), name="keys-watch")
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            self.close()

    def close(self) -> None:
        self._verifier.close()

    def _look(self, last: _Reading, unsettled: _Unsettled | None) -> _Reading | _Unsettled | None:
        """None: nothing new. Runs in a thread, so it changes nothing."""
        if self._path is None:
            return None
        try:
            seen = keyio.signature(self._path.stat())
        except OSError:
            return self._read(last, LOCK_SECONDS)
        if seen != last.signature:
            if unsettled is None:
                return _Unsettled(seen, empty=int(keyio.is_empty(seen)))
            if keyio.is_empty(seen) and unsettled.empty < EMPTY_LOOKS:
                return _Unsettled(seen, unsettled.looks, unsettled.empty + 1)
            if unsettled.signature != seen and unsettled.looks < MAX_LOOKS:
                return _Unsettled(seen, unsettled.looks + 1, unsettled.empty)
        elif last.at - keyio.modified(seen) > FRESH_SECONDS:
            return None
        return self._read(last, LOCK_SECONDS)

    def _follow(self, base: _Reading, found: _Reading | _Unsettled | None) -> ReloadReport | None:
        if base is not self._reading:  # reload() was faster
            return None
        self._unsettled = found if isinstance(found, _Unsettled) else None
        if not isinstance(found, _Reading):
            return None
        if (found.content, found.error) == (base.content, base.error):
            self._reading = found
            return None
        return self._take(found)

    def _read(self, last: _Reading, wait: float) -> _Reading:
        at = self._now()
        if self._path is None:
            return _Reading(at)
        try:
            data, signature = keyio.read(self._path, wait=wait)
        except OSError as error:
            return _Reading(at, content=last.content, error=self._complaint(error, last))
        content = hashlib.sha256(data).digest()
        table = None if content == last.content else Table.build(self._boot_key, self._path, data, self._env)
        return _Reading(at, signature, content, self._cut_off(signature), table)

    def _cut_off(self, read: keyio.Signature) -> str | None:
        if self._path is None or not keyio.is_cut_off(self._path, read):
            return None
        return (
            f"{self._path} is mounted, and outside another file has taken its place or it was deleted: no change made "
            "there is seen any more, and the keys last read stay in force; mount its folder instead, and start anew"
        )

    def _complaint(self, error: OSError, last: _Reading) -> str | None:
        missing = isinstance(error, FileNotFoundError)
        if last.content is None:  # nothing of it was ever loaded; that there is none yet is no fault
            return None if missing else f"{self._path} cannot be read ({error.strerror}): no key of it is loaded"
        what = "is gone" if missing else f"cannot be read ({error.strerror})"
        mend = "; to revoke them, put back an empty file" if missing else ""
        return f"{self._path} {what}: the keys last read from it stay in force{mend}"

    def _take(self, reading: _Reading) -> ReloadReport:
        if reading.table:
            reading.table.inherit(self._table)
            self._table = reading.table
        self._reading = reading
        self._unsettled = None
        report = self.report
        for callback in self._callbacks:
            callback(report)
        return report
