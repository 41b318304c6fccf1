"""Tells a llama-server that is alive but dead from one that works hard: only the first one uses no processor."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gateway.backend import Backend
from gateway.errors import CorralError
from gateway.models.process import Process

WATCH_SECONDS = 15.0
WEDGED_SECONDS = 120.0
_HEALTH_SECONDS = 5.0
_ALIVE = (200, 503)  # a slow disk may keep it loading for long, with hardly any work: that has a bound of its own
IDLE_SHARE = 0.02  # of a core; answering /health takes less


@dataclass(frozen=True)
class Look:
    """What was seen of a llama-server at one moment. Times are in seconds."""

    at: float
    cpu: float | None  # used by the process since its start; None: it cannot be seen
    answers: bool  # it answers /health, also that it loads, and /slots while no request of ours runs
    busy_for_nobody: bool  # a slot works, and no request of ours runs


def wrong(look: Look) -> str | None:
    if not look.answers:
        return "it does not answer"
    return "a slot is busy for a client that has left" if look.busy_for_nobody else None


def works(before: Look, after: Look) -> bool:
    """Whether it used the processor between the two; a long prefill does, a wedged server does not."""
    if before.cpu is None or after.cpu is None:
        return False
    return after.cpu - before.cpu > IDLE_SHARE * (after.at - before.at)


async def until_wedged(process: Process, backend: Backend, serving: Callable[[], int]) -> str:
    """Returns one sentence when something has been wrong for WEDGED_SECONDS and no work was done meanwhile."""
    last = await _look(process, backend, serving)
    since: float | None = None
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        look = await _look(process, backend, serving)
        if wrong(look) is None or works(last, look):
            since = None
        elif since is None:
            since = look.at
        elif look.at - since >= WEDGED_SECONDS:
            return f"llama-server is wedged: {wrong(look)}, and it has done nothing for {look.at - since:.0f} s"
        last = look


async def _look(process: Process, backend: Backend, serving: Callable[[], int]) -> Look:
    busy = False
    try:
        status, _ = await backend.get("/health", _HEALTH_SECONDS)
        if not serving():
            found, body = await backend.get("/slots", _HEALTH_SECONDS)
            busy = found == 200 and any(slot.get("is_processing") for slot in json.loads(body)) and not serving()
        answers = status in _ALIVE
    except (CorralError, ValueError, AttributeError, TypeError):
        answers = False
    return Look(time.monotonic(), cpu_seconds(process.pid), answers, busy)


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100
    except (OSError, ValueError, IndexError):
        return None
