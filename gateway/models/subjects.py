"""What a model is called where a name may hold only letters, digits, `_` and `-`: in NATS subjects and consumers."""

from __future__ import annotations

import re
from collections.abc import Iterable

_OTHERS = re.compile(r"[^A-Za-z0-9_-]")


def subject_name(model_id: str) -> str:
    return _OTHERS.sub("_", model_id)


def collisions(model_ids: Iterable[str]) -> list[str]:
    """One line for each name that several models would share: their jobs could not be told apart."""
    sharing: dict[str, list[str]] = {}
    for model_id in model_ids:
        sharing.setdefault(subject_name(model_id), []).append(model_id)
    return [
        f"models {', '.join(ids)}: all are called {name!r} in NATS subjects; rename all but one"
        for name, ids in sharing.items()
        if len(ids) > 1
    ]
