"""One reading of the keys, and all that was learned from it since: dropping the table revokes everything at once."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from gateway.stores.keys import hashes
from gateway.stores.keys.file import Key, KeyFile, Line

ENV_ID = "env"
MAX_SECRET = 512  # characters; nothing longer is anyone's key
MAX_REFUSED = 4096


def keyed(boot_key: bytes, secret: str) -> bytes:
    """The digest that secrets are looked up under. Its key is known to this process alone, so how long a look-up takes
    tells nothing about the keys."""
    return hashlib.blake2b(secret.encode("utf-8", "surrogatepass"), key=boot_key, digest_size=16).digest()


class Table:
    """`fast` decides after a secret's first use; `hashed` and `slow` hold those that were not used yet."""

    def __init__(self, boot_key: bytes) -> None:
        self._boot_key = boot_key
        self.keys: list[Key] = []
        self.problems: list[str] = []
        self.fast: dict[bytes, Key] = {}
        self.slow: dict[str, Key] = {}  # by passlib hash
        self.proven: dict[bytes, str] = {}  # what in `fast` cost a slow hash, and which
        self.refused: OrderedDict[bytes, None] = OrderedDict()
        self.verifying: dict[bytes, asyncio.Future[str | None]] = {}
        self._hashed: dict[bytes, tuple[bytes, Key]] = {}
        self._lines: dict[bytes | str, int] = {}

    @classmethod
    def build(cls, boot_key: bytes, path: Path | None, data: bytes, env: Sequence[str]) -> Table:
        table = cls(boot_key)
        for line in KeyFile(data).lines:
            problem = line.problem or table._add_line(line)
            if problem:
                table.problems.append(f"{path} line {line.number}: {problem}")
        for number, secret in enumerate(env, start=1):
            problem = table._add_env(secret)
            if problem:
                table.problems.append(f"API_KEY, key {number}: {problem}")
        return table

    def recognise(self, digest: bytes, secret: str) -> Key | None:
        """A generated key's first use: its SHA-256 decides."""
        if len(secret) > MAX_SECRET:
            return None
        sha256 = hashes.digest(secret)
        stored, key = self._hashed.get(self._keyed_hash(sha256), (b"", None))
        if key is None or not hmac.compare_digest(stored, sha256):
            return None
        self.fast[digest] = key
        return key

    def hopeless(self, digest: bytes, secret: str) -> bool:
        """Whether no slow hash needs to be computed to know that a secret, not recognised, is wrong."""
        return not self.slow or digest in self.refused or len(secret) > MAX_SECRET

    def slow_in_order(self) -> list[str]:
        """The slow hashes, those first whose secret nobody has used yet: a new secret is hardly one of the others."""
        used = set(self.proven.values())
        return sorted(self.slow, key=used.__contains__)

    def settle(self, digest: bytes, done: asyncio.Future[str | None]) -> None:
        """Remembers what the slow hashes said, though everyone who waited for it may have left."""
        self.verifying.pop(digest, None)
        if done.cancelled() or done.exception():
            return
        stored = done.result()
        if stored is not None:
            self._remember(digest, stored)
            return
        self.refused[digest] = None
        if len(self.refused) > MAX_REFUSED:
            self.refused.popitem(last=False)

    def inherit(self, last: Table) -> None:
        """Keys that stand here as before are not hashed again: a reload must not make their users wait."""
        for digest, stored in last.proven.items():
            if stored in self.slow:
                self._remember(digest, stored)

    def _remember(self, digest: bytes, stored: str) -> None:
        self.fast[digest] = self.slow[stored]
        self.proven[digest] = stored
        # bcrypt takes every secret with the same first 72 bytes: its holder must not fill our memory with them
        if len(self.proven) > 4 * len(self.slow):
            oldest = next(iter(self.proven))
            del self.proven[oldest], self.fast[oldest]

    def _add_line(self, line: Line) -> str | None:
        if line.key is None:
            return None
        slow = hashes.is_slow(line.stored)
        sha256 = b"" if slow else hashes.stored_digest(line.stored)
        first = self._lines.setdefault(line.stored if slow else sha256, line.number)
        if first != line.number:
            return f"its secret stands on line {first} already, and that line counts; remove one of the two"
        self.keys.append(line.key)
        if slow:
            self.slow[line.stored] = line.key
        elif "$" in line.stored:
            self._hashed[self._keyed_hash(sha256)] = (sha256, line.key)
        else:
            self.fast[keyed(self._boot_key, line.stored)] = line.key
        return None

    def _add_env(self, secret: str) -> str | None:
        if len(secret) > MAX_SECRET or not (secret.isascii() and secret.isprintable()) or " " in secret:
            return "it holds blanks or unusual characters, or is too long; it is not used"
        if hashes.digest(secret) in self._lines:
            return None  # the file says more about it
        key = Key(ENV_ID)
        self.keys.append(key)
        self.fast[keyed(self._boot_key, secret)] = key
        return None if len(secret) >= 16 else f"it works, but has only {len(secret)} characters; use 16 or more"

    def _keyed_hash(self, sha256: bytes) -> bytes:
        return hashlib.blake2b(sha256, key=self._boot_key, digest_size=16).digest()
