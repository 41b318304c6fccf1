"""Secrets of each kind, and what the tests of the ring share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gateway.stores.keys import hashes

PLAIN = "plain-secret-0123456789"
RANDOM = "sk-bob-0123456789abcdefghijklmnopqrstuvwxyz0123456"
CHOSEN = "my-own-secret-0123456789"
HERE = "192.0.2.1"


def write(path: Path, text: str) -> None:
    path.write_text(text)


def slow(secret: str) -> str:
    from passlib.hash import pbkdf2_sha256

    hashed: str = pbkdf2_sha256.using(rounds=1000).hash(secret)
    return hashed


def count_slow(monkeypatch: pytest.MonkeyPatch, gate: threading.Event | None = None) -> list[str]:
    """The slow comparisons that were made; they wait for the gate."""
    made: list[str] = []
    real = hashes.matches

    def counted(stored: str, secret: str) -> bool:
        made.append(secret)
        if gate:
            gate.wait(5)
        return real(stored, secret)

    monkeypatch.setattr(hashes, "matches", counted)
    return made
