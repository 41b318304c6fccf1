"""The herd's door: leases by model id, preload, and the end of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

from gateway.backend import Backend
from gateway.models.owner import Lease, Owner
from gateway.models.registry import ModelSpec, Registry


class Manager:
    def __init__(self, registry: Registry, make_owner: Callable[[ModelSpec], Owner]) -> None:
        self.registry = registry
        self.owners = {model_id: make_owner(spec) for model_id, spec in registry.specs.items()}

    def start(self, preload: Iterable[str]) -> None:
        for owner in self.owners.values():
            owner.start()
        for model_id in preload:
            self.owners[model_id].want()

    async def close(self) -> None:
        await asyncio.gather(*(owner.close() for owner in self.owners.values()))

    def kill(self) -> None:
        """A second signal: no more grace for any llama-server."""
        for owner in self.owners.values():
            owner.kill()

    def lease(self, model_id: str) -> AbstractAsyncContextManager[Lease]:
        return self.owners[model_id].lease()

    def sweep(self, now: float) -> None:
        """End requests whose server has been silent for too long; `now` is on the loop's clock."""
        for backend in self.loaded().values():
            backend.sweep(now)

    def loaded(self) -> dict[str, Backend]:
        """The servers that are ready now."""
        return {model_id: owner.backend for model_id, owner in self.owners.items() if owner.backend is not None}
