"""The owner of a model that a foreign llama-server serves (`LLAMA_URL`): nothing is spawned, its health is watched."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable

from gateway.backend import Backend
from gateway.errors import CorralError, ModelLoading
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
        self._absent = f"no healthy llama-server at {self._shown}"

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
        if self.backend is not None and generation == self.generation and (why := await self._wrong()):
            self._away(why)

    async def _live(self) -> None:
        if self.spec.problem:
            await self._until_mended()
        self._set(ModelState.LOADING)
        while True:
            why = await self._wrong()
            if why is None and self.backend is None:
                self._board.set_model(self.spec.id, away=False)
                await self._ready(self._server)
                self._events.emit("model.loaded", f"{self.spec.id} answers at {self._shown}", model=self.spec.id)
            elif why is not None and why != self._board.models[self.spec.id].error_message:
                self._away(why)
            self._wake.clear()
            try:
                async with asyncio.timeout(FAST_POLL_SECONDS if self.backend is None else SLOW_POLL_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _until_mended(self) -> None:
        while problem := await self.look_again():
            self._failed(problem)
            while self.state is ModelState.FAILED:  # a reset lets it be looked at anew
                self._wake.clear()
                await self._wake.wait()
        self._server.close()
        self._server = self._connect(self.spec)  # with the key that it lacked

    def _away(self, why: str) -> None:
        """It is looked for again and again. One that has never been there may still be loading."""
        coming = self.state is ModelState.LOADING and why == self._absent
        self._not_ready()
        self._set(ModelState.LOADING if coming else ModelState.CRASHED, error_message=why, away=True)
        if not coming:
            self._events.emit("model.crashed", f"{self.spec.id}: {why}", logging.WARNING, model=self.spec.id)
        self._wake.set()

    async def _wrong(self) -> str | None:
        """Why it cannot be used. /health alone tells everybody that it is well, whatever their key."""
        try:
            status, _ = await self._server.get("/health", _HEALTH_SECONDS)
        except CorralError:
            return self._absent
        if status != 200:
            return self._absent
        with contextlib.suppress(CorralError):  # whatever else it makes of /props: it need not know it
            status, _ = await self._server.get("/props", _HEALTH_SECONDS)
        if status != 401:  # a 403 may be a proxy's, which hides /props from everybody
            return None
        mend = self.spec.api_key_env or "LLAMA_API_KEY_FILE, or api_key_env in the models file"
        return f"the llama-server at {self._shown} refuses the gateway's key: set {mend}"

    def _too_late(self) -> CorralError:
        why = self._board.models[self.spec.id].error_message
        return ModelLoading(f"{self.spec.id}: {why}", retry_after=5) if why else super()._too_late()
