"""Tables, sizes and times as people read them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.cli.client import one_line

NUMBERS = "RUNNING WAITING SLOTS CONTEXT MIB SECONDS TOKENS/S".split()


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines; None is shown as -, and columns of numbers are set to the right."""
    cells = [list(titles), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_set(*each) for each in zip(row, widths, titles, strict=True)).rstrip() for row in cells]


def _set(text: str, width: int, title: str) -> str:
    return text.rjust(width) if title in NUMBERS else text.ljust(width)


def cell(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, list):
        return one_line(",".join(map(str, value)))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else one_line(str(value))


def ago(at: str | None, now: datetime | None = None) -> str | None:
    """How long an ISO time is past, such as `3 min ago`."""
    try:
        then = datetime.fromisoformat(at or "")
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    seconds = max(0.0, ((now or datetime.now(UTC)) - then).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def state(row: dict[str, Any]) -> str:
    """A model's state, with its progress while it loads."""
    progress, status = row.get("load_progress"), str(row.get("status"))
    if status in ("downloading", "starting", "loading") and isinstance(progress, int | float) and progress > 0:
        return f"{status} {progress:.0%}"
    return status


def why(row: dict[str, Any]) -> str | None:
    """What a model waits for, else what is wrong with it."""
    return row.get("detail") or row.get("error_message")
