"""What a worker tells about its models: `models.<model>.health`, at each change of a state and regularly."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from gateway.runtime import Runtime
from gateway.state import ModelState
from gateway.workers.nats.link import Away, Link

HEALTH_SECONDS = 30.0


class Served(NamedTuple):
    """A model, its name in subjects, and how many jobs for it are in hand."""

    id: str
    name: str
    jobs: int


class Health:
    def __init__(self, runtime: Runtime, link: Link, worker: str, served: Callable[[], list[Served]]) -> None:
        self._runtime, self._link, self._worker, self._served = runtime, link, worker, served
        self._news = asyncio.Event()

    def look(self) -> None:
        """Something may have changed."""
        self._news.set()

    async def tell(self) -> None:
        """Until cancelled."""
        told: dict[str, object] = {}
        due = 0.0
        while True:
            await self._link.up.wait()
            self._news.clear()
            now = time.monotonic()
            all_of_them, due = (True, now + HEALTH_SECONDS) if now >= due else (False, due)
            for model in self._served():
                health = self._of(model)
                states = (health["status"], health["service"])
                if all_of_them or told.get(model.name) != states:
                    with contextlib.suppress(Away):
                        await self._link.publish(f"models.{model.name}.health", msgspec.json.encode(health))
                        told[model.name] = states
            await asyncio.sleep(0.1)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - time.monotonic())):
                    await self._news.wait()

    def _of(self, model: Served) -> dict[str, object]:
        status, queue = self._runtime.board.models.get(model.id), self._runtime.queues.get(model.id)
        return {
            "model": model.id,
            "status": status.state if status else ModelState.OFF,
            "service": self._runtime.board.status,
            "worker": self._worker,
            "slots": queue.capacity if queue else 0,
            "active": queue.active if queue else 0,
            "waiting": queue.waiting if queue else 0,
            "jobs": model.jobs,
            "ts": time.time(),
        }
