"""The owner of a model that a foreign llama-server serves (`LLAMA_URL`): nothing is spawned, its health is watched."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

from gateway.backend import Backend
from gateway.errors import CorralError
from gateway.events import Events
from gateway.models.fingerprint import Stamp, as_it_lies
from gateway.models.owner import Owner
from gateway.models.registry import ModelSpec
from gateway.state import Board, ModelState

FAST_POLL_SECONDS = 0.25  # until it answers
SLOW_POLL_SECONDS = 5.0  # while it does
_HEALTH_SECONDS = 5.0


class RemoteOwner(Owner):
    def __init__(self, spec: ModelSpec, board: Board, events: Events, connect: Callable[[ModelSpec], Backend]) -> None:
        super().__init__(spec, board, events)
        assert spec.url is not None
        self._connect = connect
        self._server = connect(spec)
        self._met = secrets.token_hex(8)
        self._shown = spec.url.partition("://")[0] + "://" + spec.url.partition("://")[2].rpartition("@")[2]

    @property
    def server(self) -> Backend:
        return self._server

    async def close(self) -> None:
        await super().close()
        self._server.close()

    def kill(self) -> None:
        return  # it is not ours

    def reset(self) -> None:
        if self.state is ModelState.FAILED:
            self._set(ModelState.LOADING, error_message=None)
        self._wake.set()  # to look at once

    def lies_as(self, stamp: Stamp = as_it_lies) -> str | None:
        """Nobody tells us when a foreign server is given another model: it counts as another one each time that it
        comes back, and to each gateway that asks it."""
        self.started_as = f"{self._shown} {self._met} {self.generation}" if self.backend is not None else None
        return self.started_as

    def _unused(self) -> None:
        return

    async def notice_death(self, generation: int) -> None:
        if self.backend is not None and generation == self.generation and not await self._healthy():
            self._gone()

    async def _live(self) -> None:
        if self.spec.problem:
            await self._until_mended()
        self._set(ModelState.LOADING)
        while True:
            healthy = await self._healthy()
            if healthy and self.backend is None:
                await self._ready(self._server)
                self._events.emit("model.loaded", f"{self.spec.id} answers at {self._shown}", model=self.spec.id)
            elif not healthy and self.backend is not None:
                self._gone()
            self._wake.clear()
            try:
                async with asyncio.timeout(FAST_POLL_SECONDS if self.backend is None else SLOW_POLL_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _until_mended(self) -> None:
        while problem := await self._look_again():
            self._failed(problem)
            while self.state is ModelState.FAILED:  # a reset lets it be looked at anew
                self._wake.clear()
                await self._wake.wait()
        self._server.close()
        self._server = self._connect(self.spec)  # with the key that it lacked

    def _gone(self) -> None:
        self._not_ready()
        message = f"no healthy llama-server at {self._shown}"
        self._set(ModelState.CRASHED, error_message=message)
        self._events.emit("model.crashed", f"{self.spec.id}: {message}", logging.WARNING, model=self.spec.id)
        self._wake.set()

    async def _healthy(self) -> bool:
        try:
            status, _ = await self._server.get("/health", _HEALTH_SECONDS)
        except CorralError:
            return False
        return status == 200
