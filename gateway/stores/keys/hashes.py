"""How a key's secret is stored: SHA-256 for a generated one, a slow passlib hash for one that a person chose."""

from __future__ import annotations

import functools
import hashlib
import hmac
import re
from typing import Any

PLAINTEXT = re.compile(r"[A-Za-z0-9_-]{16,128}")
SHA256 = re.compile(r"sha256\$[0-9a-fA-F]{64}")

# passlib's own default (29,000) is of 2016; this is OWASP's figure for PBKDF2-HMAC-SHA256, about 0.15 s
PBKDF2_ROUNDS = 600_000

# pbkdf2 is the one that is written: it needs no compiled package. The others are read when someone brings them; the
# crypt(3) ones are left out, as passlib computes them in Python and would hold the interpreter for 0.3 s.
_KDF_SCHEMES = (
    "pbkdf2_sha256",
    "pbkdf2_sha512",
    "pbkdf2_sha1",
    "argon2",
    "bcrypt",
    "bcrypt_sha256",
    "scrypt",
)
_PACKAGES = {"argon2": "argon2-cffi", "bcrypt": "bcrypt", "bcrypt_sha256": "bcrypt"}

# What passlib raises for a broken hash (asserts too), or for a secret that a scheme cannot hash at all (a NUL, over 72
# bytes for bcrypt) and that is therefore not its own. One such line must not keep the others from being tried.
_CANNOT_HASH = (ValueError, TypeError, LookupError, AssertionError, RuntimeError, MemoryError)


def digest(secret: str) -> bytes:
    """SHA-256 of a secret; never raises, whatever a client put into its header."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def fast_hash(secret: str) -> str:
    """The stored form of a generated secret, whose 256 random bits need no slow hash."""
    return f"sha256${digest(secret).hex()}"


def slow_hash(secret: str) -> str:
    """The stored form of a secret that a person chose. Takes about 0.15 s."""
    hashed: str = _context().hash(secret)
    return hashed


def is_slow(stored: str) -> bool:
    return stored.startswith("$")


def stored_digest(stored: str) -> bytes:
    """The SHA-256 digest behind a plaintext or `sha256$` form."""
    return bytes.fromhex(stored.partition("$")[2]) if "$" in stored else digest(stored)


def matches(stored: str, secret: str) -> bool:
    """Whether `secret` is the one behind any stored form, compared in constant time."""
    if not is_slow(stored):
        return hmac.compare_digest(stored_digest(stored), digest(secret))
    try:
        return bool(_context().verify(secret, stored))
    except _CANNOT_HASH:
        return False


def form(stored: str) -> str:
    """`plaintext`, `sha256`, or the name of the slow scheme."""
    if is_slow(stored):
        return str(_context().identify(stored))
    return "sha256" if "$" in stored else "plaintext"


def problem(stored: str) -> str | None:
    """What is wrong with a stored form, in words that never repeat it; None if it can be used."""
    if is_slow(stored):
        return _slow_problem(stored)
    if "$" in stored:
        return None if SHA256.fullmatch(stored) else "a SHA-256 hash must be 'sha256$' and 64 hexadecimal digits"
    if PLAINTEXT.fullmatch(stored):
        return None
    if not stored:
        return "the secret is missing; write key_id:secret, without blanks around the colon"
    if not 16 <= len(stored) <= 128:
        return f"the secret has {len(stored)} characters; it must have 16 to 128"
    return "the secret may hold only letters, digits, '-' and '_' (or be a hash)"


def _slow_problem(stored: str) -> str | None:
    context = _context()
    scheme = context.identify(stored)
    if scheme is None:
        return f"the hash is of no known kind; known: sha256, {', '.join(_KDF_SCHEMES)}"
    handler = context.handler(scheme)
    if not getattr(handler, "has_backend", lambda: True)():
        return f"a {scheme} hash needs a package that is not installed: pip install {_PACKAGES.get(scheme, scheme)}"
    try:
        complete = handler.from_string(stored).checksum is not None
    except _CANNOT_HASH:
        complete = False
    return None if complete else f"the {scheme} hash is malformed or incomplete; make the key again"


@functools.cache
def _context() -> Any:
    # Imported on first need: a gateway whose keys are all generated never pays for it.
    from passlib.context import CryptContext

    return CryptContext(schemes=list(_KDF_SCHEMES), default="pbkdf2_sha256", pbkdf2_sha256__rounds=PBKDF2_ROUNDS)
